"""BatchNorm against the formula, finite differences and PyTorch's own."""

import pytest
import torch
from torch import nn

from tests.helpers import reference
from tests.helpers.norms import (
    CHANNELS,
    MASK,
    assert_follows_the_formula,
    assert_gradients_are_those_of_differences,
    make_norm,
    make_tokens,
)


@pytest.fixture
def norm():
    return make_norm("batchnorm", eps=1e-3, momentum=0.2)


def test_output_gradient_and_running_pair_follow_the_formula(norm):
    assert_follows_the_formula(norm, reference.batchnorm, reference.batchnorm_gradient)


def test_agrees_with_pytorch_without_padding(norm):
    theirs = nn.BatchNorm1d(CHANNELS, eps=1e-3, momentum=0.2).double()
    theirs.load_state_dict({name: value.clone() for name, value in norm.state_dict().items()}, strict=False)
    kept = 0.8 * norm.running_var
    x = make_tokens(2, 5).requires_grad_()
    upstream = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    y = norm(x)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias], upstream)
    y_theirs = theirs(x.transpose(1, 2)).transpose(1, 2)
    gradients_theirs = torch.autograd.grad(y_theirs, [x, theirs.weight, theirs.bias], upstream)
    for ours, other in zip((y, *gradients), (y_theirs, *gradients_theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    # Theirs is biased in the batch and unbiased in the buffer.
    biased = kept + (theirs.running_var - kept) * (10 - 1) / 10
    torch.testing.assert_close(norm.running_var, biased)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_gradcheck(norm, mask):
    assert_gradients_are_those_of_differences(norm, mask)


def test_one_token_is_the_shift(norm):
    x = make_tokens(1, 1).requires_grad_()
    y = norm(x)
    torch.testing.assert_close(y[0, 0], norm.bias)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.zeros_like(dx))


def test_constant_channels_have_a_finite_gradient(norm):
    x = torch.full((2, 3, CHANNELS), 5.0, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    assert y.isfinite().all()
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.isfinite().all()
