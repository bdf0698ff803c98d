"""How exact the norms are on each path: as LayerNorm of PyTorch in the same dtype, on easy and hard tokens."""

import pytest
import torch
from torch import nn

from hf_normswap import BatchNorm, PowerNorm, PowerNormV, RMSNorm


C = 64
NORMS = {
    "batchnorm": lambda: BatchNorm(C),
    "pnv": lambda: PowerNormV(C),
    "powernorm": lambda: PowerNorm(C, group_scaling=False),
    "powernorm-groups": lambda: PowerNorm(C, num_groups=4),
    "rmsnorm": lambda: RMSNorm(C),
}


def easy():
    return torch.randn(2, 200, C)


def with_a_mean():
    return torch.randn(2, 200, C) + 100  # as hard for a norm over tokens as for one over channels


def with_outliers():
    x = torch.randn(2, 200, C)
    x[0, 3, 5], x[1, 7, :8] = 1e4, -1e4
    return x


def with_denormals():
    return torch.randn(2, 200, C) * 1e-39


def with_constant_channels():
    x = torch.randn(2, 200, C)
    x[..., :8] = torch.arange(8.0)
    return x


TOKENS = [easy, with_a_mean, with_outliers, with_denormals, with_constant_channels]


def run(norm, x, upstream, *mask):
    """Output and gradients of the second step, whose running statistics are no longer those of the start."""
    for _ in range(2):
        x = x.detach().requires_grad_()
        norm.zero_grad()
        y = norm(x, *mask)
        y.backward(upstream)
    return [y, x.grad, norm.weight.grad, norm.bias.grad]


def error(found, expected):
    found, expected = found.double(), expected.double()
    # What is smaller than any normal number cannot be exact, in no norm.
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_tokens", TOKENS)
@pytest.mark.parametrize("name", NORMS)
def test_errors_are_no_larger_than_those_of_layer_norm(name, make_tokens, dtype, kernels):
    x, upstream = make_tokens().to(dtype), torch.randn(2, 200, C).to(dtype)
    mask = torch.arange(200) < torch.tensor([[200], [150]])

    def errors(make, *mask):
        torch.manual_seed(0)
        found, exact = make().to(dtype), make().double()
        expected = run(exact, x.double(), upstream.double(), *mask)
        results = run(found, x, upstream, *mask)
        assert all(value.isfinite().all() for value in results)
        return [error(*pair) for pair in zip(results, expected, strict=True)]

    theirs = errors(lambda: nn.LayerNorm(C))
    # A few units in the last place: the errors of LayerNorm vary as much from one draw of tokens to the next.
    slack = 3 * torch.finfo(dtype).eps
    for ours, of_layer_norm in zip(errors(NORMS[name], mask), theirs, strict=True):
        assert ours <= of_layer_norm + slack
