"""LayerNorm is PyTorch's, bit for bit."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_normswap import LayerNorm
from tests.helpers import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False], ids=["shift", "no_shift"])
def test_is_that_of_pytorch_bit_for_bit(dtype, bias):
    ours, theirs = LayerNorm(8, eps=1e-12, bias=bias, dtype=dtype), nn.LayerNorm(8, eps=1e-12, bias=bias, dtype=dtype)
    nn.init.uniform_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    upstream = torch.randn(2, 3, 8, dtype=dtype)
    expected = theirs(x)
    expected_gradients = torch.autograd.grad(expected, [x, *theirs.parameters()], upstream)
    for given in (None, mask):
        y = ours(x, given)
        assert torch.equal(y, expected)
        gradients = torch.autograd.grad(y, [x, *ours.parameters()], upstream)
        assert all(map(torch.equal, gradients, expected_gradients))


def test_follows_the_formula():
    norm = LayerNorm(6, eps=1e-3).double()
    x = 2 + torch.randn(4, 6, dtype=torch.float64)
    np.testing.assert_allclose(norm(x).detach().numpy(), reference.layernorm(x.numpy(), 1e-3), rtol=1e-12, atol=1e-14)


def test_is_that_of_pytorch_under_autocast():
    ours, theirs = LayerNorm(8), nn.LayerNorm(8)
    x = torch.randn(2, 3, 8)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = ours(x.to(dtype)), theirs(x.to(dtype))
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
