"""One training step of bare norms in every process, each with its share of the tokens."""

import sys

import torch
from accelerate import PartialState

from hf_normswap import set_norm_process_group
from tests.distributed.test_norms import CASES, make, share, step


if __name__ == "__main__":
    (folder,) = sys.argv[1:]
    rank = PartialState(cpu=True).process_index
    assert torch.distributed.get_world_size() == 2
    results, calls = {}, []
    for name in ("all_gather", "all_reduce"):
        function = getattr(torch.distributed, name)

        def count(*args, function=function, name=name, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        setattr(torch.distributed, name, count)
    for case in CASES:
        norm, (x, upstream, mask) = make(case[0]), share(case[1], rank)
        set_norm_process_group(norm)
        before = len(calls)
        results[case] = {**step(norm, x, upstream, mask), "collectives": calls[before:]}
    torch.save(results, f"{folder}/rank{rank}.pt")
