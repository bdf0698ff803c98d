"""RMSNorm against the formula, PyTorch's own and finite differences."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from hf_normswap import RMSNorm
from tests.helpers import reference


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
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_every_path_agrees_with_pytorch(kernels, dtype, bias):
    norm, theirs = RMSNorm(48, bias=bias), nn.RMSNorm(48, eps=1e-5).double()
    nn.init.uniform_(norm.weight)
    x, upstream = torch.randn(2, 70, 48).to(dtype), torch.randn(2, 70, 48).to(dtype)
    norm.to(dtype)
    theirs.weight.data.copy_(norm.weight.data)

    def run(norm, x, upstream):
        x = x.detach().requires_grad_()
        y = norm(x)
        return y, *torch.autograd.grad(y, [x, norm.weight], upstream)

    for ours, exact in zip(run(norm, x, upstream), run(theirs, x.double(), upstream.double()), strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error <= 4 * torch.finfo(dtype).eps


def test_tracers_and_transforms_see_the_operations():
    norm, x, other = RMSNorm(4), torch.randn(3, 4), torch.randn(3, 4)
    for traced in (torch.jit.trace(norm, x), make_fx(norm)(x)):
        torch.testing.assert_close(traced(other), norm(other))
    torch.testing.assert_close(torch.vmap(norm)(other), norm(other))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, other))).tangent
    torch.testing.assert_close(tangent, torch.autograd.functional.jvp(norm, x, other)[1])


def test_a_subclass_normalizes_in_its_own_way():
    class Halved(RMSNorm):
        def normalize(self, x, mask):
            return super().normalize(x, mask) / 2

    x = torch.randn(3, 4)
    torch.testing.assert_close(Halved(4)(x), RMSNorm(4)(x) / 2)


def test_a_single_token_of_one_dimension():
    x = torch.randn(4, requires_grad=True)
    (dx,) = torch.autograd.grad(RMSNorm(4)(x).square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(RMSNorm(4)(x[None]).square().sum(), x)
    torch.testing.assert_close(dx, again)


def test_gains_of_another_width_are_refused():
    with pytest.raises(ValueError, match="1 statistics or coefficients do not fit tokens of 64 channels"):
        functional_call(RMSNorm(64), {"weight": torch.ones(1)}, (torch.randn(3, 64),))
