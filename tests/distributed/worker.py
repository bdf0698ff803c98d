"""Trains in every process of a launcher and leaves what rank 0, and each rank's statistics, ended with."""

import json
import os
import sys

import torch

from tests.helpers.trainer import rows, train


if __name__ == "__main__":
    family, norm, folder, options = sys.argv[1:]
    if ranks := os.environ.get("RANKS_OF_A_NODE"):  # torchrun says that of one machine
        os.environ["LOCAL_WORLD_SIZE"] = ranks
    recorder = train(family, norm, rows(family, 16), folder, accumulation=1, **json.loads(options))
    rank = torch.distributed.get_rank()
    torch.save({"gradients": recorder.gradients, "buffers": recorder.buffers}, f"{folder}/rank{rank}.pt")
