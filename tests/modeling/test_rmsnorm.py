"""RMSNorm against the formula, PyTorch's own and finite differences."""

import numpy as np
import torch
from torch import nn

from hf_normswap import RMSNorm
from tests.modeling import reference


def test_follows_the_formula_and_agrees_with_pytorch():
    norm, theirs = RMSNorm(5, eps=1e-3, bias=False).double(), nn.RMSNorm(5, eps=1e-3).double()
    nn.init.uniform_(norm.weight)
    theirs.load_state_dict(norm.state_dict())
    x = (1 + torch.randn(2, 3, 5, dtype=torch.float64)).requires_grad_()
    y = norm(x)
    expected = norm.weight.detach().numpy() * reference.rmsnorm(x.detach().numpy(), 1e-3)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(y, theirs(x))
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [x, norm.weight], upstream)
    for ours, other in zip(gradients, torch.autograd.grad(theirs(x), [x, theirs.weight], upstream), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)


def test_shift():
    norm = RMSNorm(4).double()
    nn.init.uniform_(norm.bias)
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = reference.rmsnorm(x.numpy(), 1e-5) + norm.bias.detach().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-12)


def test_gradcheck():
    norm = RMSNorm(3, eps=1e-3).double()
    assert torch.autograd.gradcheck(norm, torch.randn(2, 3, dtype=torch.float64, requires_grad=True))
