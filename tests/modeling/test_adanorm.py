"""AdaNorm against its equation; the factor φ(y) has no gradient."""

import numpy as np
import torch

from hf_normswap.modeling.norms import AdaNorm
from tests.helpers import reference
from tests.helpers.norms import assert_computes


def test_follows_the_formula():
    for scale, k in ((1.0, 0.1), (2.0, 0.3)):
        norm = AdaNorm(6, scale=scale, k=k, eps=1e-3).double()
        y = lambda x: reference.layernorm(x, 1e-3)  # noqa: E731
        assert_computes(norm, lambda x: scale * (1 - k * y(x)) * y(x))  # noqa: B023


def test_the_gradient_is_that_of_layernorm_times_the_factor():
    norm, x = AdaNorm(6, scale=2.0).double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 6, dtype=torch.float64)
    (dx,) = torch.autograd.grad(norm(x), x, upstream)
    values = x.detach().numpy()
    y = reference.layernorm(values, 1e-5)
    g = upstream.numpy() * 2.0 * (1 - y / 10)
    sigma = np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    expected = (g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True)) / sigma
    np.testing.assert_allclose(dx.numpy(), expected, rtol=1e-10, atol=1e-13)
