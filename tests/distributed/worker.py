"""Trains in every process of a launcher and leaves what rank 0, and each rank's statistics, ended with."""

import sys

import torch

from tests.invariant.test_accumulation import rows, train


if __name__ == "__main__":
    family, norm, warmup, folder = sys.argv[1:]
    options = {"batch": 4, "accumulation": 1, "norm_warmup_ratio": float(warmup)}
    recorder = train(family, norm, rows(family, 16), folder, **options)
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    torch.save({"gradients": recorder.gradients, "buffers": recorder.buffers}, f"{folder}/rank{rank}.pt")
