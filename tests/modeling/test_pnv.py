"""PN-V against the formula and finite differences."""

import pytest
import torch

from hf_normswap import PowerNormV
from tests.helpers import reference
from tests.helpers.norms import (
    CHANNELS,
    MASK,
    assert_follows_the_formula,
    assert_gradients_are_those_of_differences,
    make_norm,
)


@pytest.fixture
def norm():
    return make_norm("pnv", eps=1e-3, momentum=0.2)


def test_output_gradient_and_running_power_follow_the_formula(norm):
    assert_follows_the_formula(norm, reference.pnv, reference.pnv_gradient)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_gradcheck(norm, mask):
    assert_gradients_are_those_of_differences(norm, mask)


def test_large_means_shrink_the_gradient():
    """The Lipschitz argument of the paper: against batch normalisation the gradient is smaller by σ² / ψ²."""
    x = 5 + torch.randn(200, 1, dtype=torch.float64)
    x.requires_grad_()
    norm = PowerNormV(1, eps=0.0).double()
    upstream = torch.randn(200, 1, dtype=torch.float64)
    (dx,) = torch.autograd.grad(norm(x), x, upstream)
    x_hat = (x / x.square().mean().sqrt()).detach()
    power = x.detach().square().mean()
    expected = (upstream.square().sum() - (upstream * x_hat).sum().square() / 200) / power
    torch.testing.assert_close(dx.square().sum(), expected)
    of_batchnorm = reference.batchnorm_gradient(x.detach().numpy(), upstream.numpy(), 0.0)
    assert dx.square().sum() < 0.1 * (of_batchnorm**2).sum()


def test_powers_are_those_of_the_tokens_in_float32_with_a_large_mean():
    """ψ² from the two-pass variance and the mean is as good as the direct sum."""
    x = 1e3 + torch.randn(4096, CHANNELS)
    norm = PowerNormV(CHANNELS, momentum=1.0)
    norm(x)
    torch.testing.assert_close(norm.running_power.double(), x.double().square().mean(0), rtol=1e-6, atol=0)
