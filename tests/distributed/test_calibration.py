"""Two processes that share the data calibrate, and measure, as one that has it all."""

import pytest
import torch

from hf_normswap import calibrate, measure_tid, reestimate_statistics, swap_norm
from tests.distributed.launch import TORCHRUN, run
from tests.models import tiny_batch, tiny_model


def data(family):
    model = tiny_model(family)
    return [tiny_batch(model, lengths=(6, 3, 9, 5), seed=seed) for seed in range(4)]


def estimated(family, batches):
    """The states of a calibrated model, and of one whose statistics alone were estimated, and the TID of that one."""
    states = []
    for estimate in (calibrate, reestimate_statistics):
        model = swap_norm(tiny_model(family).double().eval(), "batchnorm", where="all")
        estimate(model, batches)
        states.append(model.state_dict())
    report = measure_tid(model, batches)
    states.append({tid.name: torch.tensor([tid.mean, tid.variance, tid.batches]) for tid in report})
    return states


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "division"), [("bert", "even"), ("marian", "unequal"), ("gpt2", "empty"), ("bert", "unequal")]
)
def test_two_ranks_are_one(family, division, tmp_path):
    run(*TORCHRUN, "-m", "tests.distributed.calibration_worker", family, division, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for alone, *shared in zip(estimated(family, data(family)), *ranks, strict=True):
        for state in shared:
            for name, value in alone.items():
                torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        for name, value in shared[0].items():
            assert torch.equal(value, shared[1][name]), name
