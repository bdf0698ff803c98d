"""BatchNorm against the formula, finite differences and PyTorch's own."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_normswap import BatchNorm
from tests.helpers import reference


CHANNELS = 3
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


@pytest.fixture
def norm():
    norm = BatchNorm(CHANNELS, eps=1e-3, momentum=0.2).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    return norm


def make_tokens(*shape):
    return (1.5 + 2 * torch.randn(*shape, CHANNELS, dtype=torch.float64)).requires_grad_()


def test_output_gradient_and_running_pair_follow_the_formula(norm):
    running_mean, running_var = np.zeros(CHANNELS), np.ones(CHANNELS)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for _ in range(4):
        x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        upstream[~MASK] = 0
        y = norm(x, MASK)
        (dx,) = torch.autograd.grad(y, x, upstream)

        rows, gradients = x[MASK].detach().numpy(), upstream[MASK].numpy()
        x_hat, mean, variance = reference.batchnorm(rows, 1e-3)
        running_mean, running_var = 0.8 * running_mean + 0.2 * mean, 0.8 * running_var + 0.2 * variance
        np.testing.assert_allclose(y[MASK].detach().numpy(), weight * x_hat + bias, rtol=1e-12)
        expected = reference.batchnorm_gradient(rows, weight * gradients, 1e-3)
        np.testing.assert_allclose(dx[MASK].numpy(), expected, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(norm.running_mean.numpy(), running_mean, rtol=1e-12)
        np.testing.assert_allclose(norm.running_var.numpy(), running_var, rtol=1e-12)
    assert norm.num_batches_tracked.item() == 4

    norm.eval()
    expected = weight * (x.detach().numpy() - running_mean) / np.sqrt(running_var + 1e-3) + bias
    np.testing.assert_allclose(norm(x, MASK).detach().numpy(), expected, rtol=1e-12)


def test_agrees_with_pytorch_without_padding(norm):
    theirs = nn.BatchNorm1d(CHANNELS, eps=1e-3, momentum=0.2).double()
    theirs.weight.data, theirs.bias.data = norm.weight.data.clone(), norm.bias.data.clone()
    x = make_tokens(2, 5)
    upstream = torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    y = norm(x)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias], upstream)
    y_theirs = theirs(x.transpose(1, 2)).transpose(1, 2)
    gradients_theirs = torch.autograd.grad(y_theirs, [x, theirs.weight, theirs.bias], upstream)
    for ours, other in zip((y, *gradients), (y_theirs, *gradients_theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    # Theirs is biased in the batch and unbiased in the buffer.
    biased = 0.8 + (theirs.running_var - 0.8) * (10 - 1) / 10
    torch.testing.assert_close(norm.running_var, biased)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_gradcheck(norm, mask):
    def outputs(x, weight, bias):
        y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))
        return y if mask is None else y[mask]

    inputs = make_tokens(2, 4), norm.weight, norm.bias
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def test_one_token_is_the_shift(norm):
    x = make_tokens(1, 1)
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
