"""Calibrates in every process, each with its share of the batches, and leaves what it ended with."""

import sys

import torch
from accelerate import PartialState

from hf_normswap import calibrate, measure_tid, reestimate_statistics, swap_norm
from tests.helpers.models import tiny_batch, tiny_model


def data(family):
    model = tiny_model(family)
    return [tiny_batch(model, lengths=(6, 3, 9, 5), seed=seed) for seed in range(4)]


def estimated(family, batches):
    """The states of calibrated models, and of one whose statistics alone were estimated, and the TID of that one."""
    states = []
    for norm, estimate in (("dyt", calibrate), ("batchnorm", calibrate), ("batchnorm", reestimate_statistics)):
        model = swap_norm(tiny_model(family).double().eval(), norm, where="all")
        estimate(model, batches)
        states.append(model.state_dict())
    report = measure_tid(model, batches)
    states.append({tid.name: torch.tensor([tid.mean, tid.variance, tid.batches]) for tid in report})
    return states


if __name__ == "__main__":
    family, division, folder = sys.argv[1:]
    rank = PartialState(cpu=True).process_index
    shares = {"even": slice(rank, None, 2), "unequal": slice(3) if rank == 0 else slice(3, None)}
    shares["empty"] = slice(0) if rank == 0 else slice(None)
    torch.save(estimated(family, data(family)[shares[division]]), f"{folder}/rank{rank}.pt")
