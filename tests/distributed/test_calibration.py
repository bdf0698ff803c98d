"""Two processes that share the data calibrate, and measure, as one that has it all."""

import pytest
import torch

from tests.distributed.calibration_worker import data, estimated
from tests.helpers.launch import TORCHRUN, run


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
