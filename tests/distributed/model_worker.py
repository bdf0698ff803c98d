"""Trains every case of a family in every process of a launcher, and leaves what each rank ended with."""

import sys

import torch
from accelerate import PartialState

from tests.distributed.test_models import CASES, hash_buffers, train


if __name__ == "__main__":
    family, folder = sys.argv[1:]
    rank = PartialState(cpu=True).process_index
    assert torch.distributed.get_world_size() == 2
    results = {}
    for case in CASES[family]:
        results[case] = train(*case, rank)
        print(f"rank {rank} of 2, {'-'.join(case)}: {hash_buffers(results[case])}", flush=True)
    torch.save(results, f"{folder}/rank{rank}.pt")
