"""PN-V against the formula and finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_normswap import PowerNormV
from tests.helpers import reference


CHANNELS = 3
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


@pytest.fixture
def norm():
    norm = PowerNormV(CHANNELS, eps=1e-3, momentum=0.2).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    return norm


def make_tokens(*shape):
    return (1.5 + 2 * torch.randn(*shape, CHANNELS, dtype=torch.float64)).requires_grad_()


def test_output_gradient_and_running_power_follow_the_formula(norm):
    running_power = np.ones(CHANNELS)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for _ in range(4):
        x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        upstream[~MASK] = 0
        y = norm(x, MASK)
        (dx,) = torch.autograd.grad(y, x, upstream)

        rows, gradients = x[MASK].detach().numpy(), upstream[MASK].numpy()
        x_hat, power = reference.pnv(rows, 1e-3)
        running_power = 0.8 * running_power + 0.2 * power
        np.testing.assert_allclose(y[MASK].detach().numpy(), weight * x_hat + bias, rtol=1e-12)
        expected = reference.pnv_gradient(rows, weight * gradients, 1e-3)
        np.testing.assert_allclose(dx[MASK].numpy(), expected, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(norm.running_power.numpy(), running_power, rtol=1e-12)

    norm.eval()
    expected = weight * x.detach().numpy() / np.sqrt(running_power + 1e-3) + bias
    np.testing.assert_allclose(norm(x, MASK).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_gradcheck(norm, mask):
    def outputs(x, weight, bias):
        y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))
        return y if mask is None else y[mask]

    inputs = make_tokens(2, 4), norm.weight, norm.bias
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


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
