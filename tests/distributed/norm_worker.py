"""One training step of bare norms in every process, each with its share of the tokens."""

import itertools
import sys

import torch
from accelerate import PartialState

from hf_normswap import set_norm_process_group
from tests.helpers.norms import make_norm, make_tokens, train_step


NORMS = ["batchnorm", "rbn", "rbn-reference", "pnv", "powernorm-warm-up"]
NORMS += ["batchrenorm-bounds", "repbn", "switchablenorm", "mabn", "unifiednorm"]
SHARES = {"even": 3, "unequal": 1, "empty": 0}  # rows of the first rank, of six
CASES = list(itertools.product(NORMS, SHARES))


def make(norm):
    return make_norm(norm, eps=1e-3)


def tokens():
    generator = torch.Generator().manual_seed(5)
    return make_tokens(6, 5), make_tokens(6, 5, seed=1), torch.rand(6, 5, generator=generator) < 0.7


def share(name, rank):
    """The part of a rank. Where it has no real token, its share is padding alone."""
    x, upstream, mask = tokens()
    rows = slice(SHARES[name]) if rank == 0 else slice(SHARES[name], None)
    if name == "empty" and rank == 0:
        return x[:1], torch.zeros_like(x[:1]), torch.zeros_like(mask[:1])
    return x[rows], upstream[rows], mask[rows]


def step(norm, x, upstream, mask):
    return train_step(norm, x, upstream, mask)


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
