"""Calibrates in every process, each with its share of the batches, and leaves what it ended with."""

import sys

import torch
from accelerate import PartialState

from tests.distributed.test_calibration import data, estimated


if __name__ == "__main__":
    family, division, folder = sys.argv[1:]
    rank = PartialState(cpu=True).process_index
    shares = {"even": slice(rank, None, 2), "unequal": slice(3) if rank == 0 else slice(3, None)}
    shares["empty"] = slice(0) if rank == 0 else slice(None)
    torch.save(estimated(family, data(family)[shares[division]]), f"{folder}/rank{rank}.pt")
