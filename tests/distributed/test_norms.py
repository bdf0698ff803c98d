"""Bare norms whose tokens are on two ranks compute what one with all of them does: even, unequal and empty shares."""

import pytest
import torch

from tests.distributed.norm_worker import CASES, SHARES, make, step, tokens
from tests.helpers.launch import TORCHRUN, run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run(*TORCHRUN, "-m", "tests.distributed.norm_worker", folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.distributed
@pytest.mark.parametrize(("norm", "division"), CASES)
def test_two_ranks_are_one(ranks, norm, division):
    alone = step(make(norm), *tokens())
    first, second = (dict(rank[norm, division]) for rank in ranks)
    assert first.pop("collectives") == second.pop("collectives") == ["all_gather", "all_reduce"]
    rows = SHARES[division]
    for name in ("y", "dx"):
        together = torch.cat([first.pop(name)[:rows], second.pop(name)])
        expected = alone.pop(name)
        if name == "dx" and "penalty" in alone:
            # Each rank adds the penalty to its loss: the gradient is that of the sum of both.
            expected = gradient_with_two_penalties(norm)
        torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)
    for name in [name for name in alone if name.startswith("d")]:  # of parameters
        torch.testing.assert_close(first.pop(name) + second.pop(name), alone.pop(name), rtol=1e-10, atol=1e-10)
    for name, expected in alone.items():
        if name not in ("pending", "pending_gradient", "nu", "largest_gamma"):
            torch.testing.assert_close(first[name], expected, rtol=1e-10, atol=1e-10, msg=name)
            assert torch.equal(first[name], second[name]), name


def gradient_with_two_penalties(name):
    norm, (x, upstream, mask) = make(name), tokens()
    x.requires_grad_()
    y = norm(x, mask)
    (dx,) = torch.autograd.grad([y, norm.penalty()], x, [upstream, torch.tensor(2.0, dtype=x.dtype)])
    return dx
