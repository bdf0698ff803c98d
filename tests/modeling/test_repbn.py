"""RepBN against its equation, folded, calibrated, and in the progressive swap of its paper."""

import numpy as np
import torch

from hf_normswap import NormSwapConfig, calibrate, find_norms, fold_norms, swap_norm
from hf_normswap.modeling.norms import RepBN
from hf_normswap.modeling.replace import set_layer_norm_share
from tests.helpers import reference
from tests.helpers.calibration import batches, stock
from tests.helpers.models import tiny_model
from tests.helpers.norms import MASK, assert_gradients_are_those_of_differences, make_tokens
from tests.helpers.persistence import outputs, train


def make_norm(**options):
    norm = RepBN(4, eta=0.7, eps=1e-2, dtype=torch.float64, **options)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(norm.bias)
    return norm


def test_follows_the_equation():
    norm, x = make_norm(), make_tokens(2, 4).requires_grad_()
    upstream = torch.randn(2, 4, 4, dtype=torch.float64) * MASK.unsqueeze(-1)
    y = norm(x, MASK)
    dx, deta = torch.autograd.grad(y, [x, norm.eta], upstream)
    rows, g = x[MASK].detach().numpy(), upstream[MASK].numpy()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    x_hat, mean, variance = reference.batchnorm(rows, 1e-2)
    np.testing.assert_allclose(y[MASK].detach().numpy(), weight * x_hat + bias + 0.7 * rows, rtol=1e-11)
    expected = reference.batchnorm_gradient(rows, g * weight, 1e-2) + 0.7 * g
    np.testing.assert_allclose(dx[MASK].numpy(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(deta.item(), (g * rows).sum(), rtol=1e-11)
    assert_gradients_are_those_of_differences(make_norm(), None)

    x = make_tokens(2, 4, seed=3)
    norm.eval()
    mean, variance = 0.1 * mean, 0.9 + 0.1 * variance
    expected = weight * (x.numpy() - mean) / np.sqrt(variance + 1e-2) + bias + 0.7 * x.numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-11)
    gain, shift = norm.affine_map()
    np.testing.assert_allclose((gain * x + shift).detach().numpy(), expected, rtol=1e-11)
    assert make_norm(center_tokens=True).affine_map() is None


def test_it_folds():
    model = train(swap_norm(tiny_model("gpt2"), NormSwapConfig("repbn", eta=0.5)))
    expected = outputs(model)["logits"]
    assert len(fold_norms(model).folded) == 4
    torch.testing.assert_close(outputs(model)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_calibrated_it_is_batchnorm():
    data = batches(stock("bert"))
    models = []
    for norm in (NormSwapConfig("repbn", eta=0.5), "batchnorm"):
        models.append(swap_norm(stock("bert"), norm))
        calibrate(models[-1], data)
    assert not any(site.module.eta.item() for site in find_norms(models[0]) if site.kind == "repbn")
    torch.testing.assert_close(outputs(models[0], data[0])["logits"], outputs(models[1], data[0])["logits"])


def test_prepbn_is_the_mixture_of_layernorm_and_this_norm():
    model = swap_norm(
        tiny_model("bert"), NormSwapConfig("prepbn", eta=0.5), filter_fn=lambda _, name: "0.output" in name
    )
    set_layer_norm_share(model, 0.25)
    (norm,) = [site.module for site in find_norms(model) if site.kind == "repbn"]
    x = torch.randn(2, 3, 16)
    y = norm.eval()(x).detach().numpy()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    of_layernorm = reference.layernorm(x.numpy(), norm.stock.eps) * weight + bias
    of_repbn = weight * x.numpy() / np.sqrt(1 + 1e-5) + bias + 0.5 * x.numpy()
    np.testing.assert_allclose(y, 0.25 * of_layernorm + 0.75 * of_repbn, rtol=1e-4, atol=1e-5)
