"""DyT and Derf against their equations."""

import math

import numpy as np
import pytest
import torch

from hf_normswap import NormSwapConfig, calibrate, find_norms, fold_norms, swap_norm
from hf_normswap.modeling.norms import Derf, DyT
from tests.helpers.calibration import batches, inputs_and_outputs, stock
from tests.helpers.models import tiny_model
from tests.helpers.norms import assert_computes, assert_gradients_are_those_of_differences, make_norm
from tests.helpers.persistence import is_one_sentence, outputs, same, train


def test_dyt_follows_the_formula():
    norm = DyT(5, alpha=0.8, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)
    assert_computes(norm, lambda x: np.tanh(0.8 * x))
    assert DyT(5).alpha.tolist() == [0.5]


def test_derf_follows_the_formula():
    norm = Derf(5, alpha=0.8, shift=-0.25, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight)
    assert_computes(norm, lambda x: np.vectorize(math.erf)(0.8 * x - 0.25))
    assert (Derf(5).alpha.tolist(), Derf(5).shift.tolist()) == ([0.5], [0.0])


@pytest.mark.parametrize("name", ["dyt", "derf"])
def test_gradients(name):
    norm = make_norm(name)
    assert_gradients_are_those_of_differences(norm, None)
    parameters = {key: value for key, value in norm.named_parameters() if key not in ("weight", "bias")}
    x = torch.randn(2, 4, dtype=torch.float64)

    def output(*values):
        return torch.func.functional_call(norm, dict(zip(parameters, values)), (x,))

    assert torch.autograd.gradcheck(output, tuple(parameters.values()))


def test_the_first_alpha_is_recorded_and_the_trained_one_saved(tmp_path):
    model = train(swap_norm(tiny_model("gpt2"), NormSwapConfig("derf", alpha=0.75, shift=0.1)))
    assert model.config.norm_swap["norms"][0]["options"] == {"alpha": 0.75, "shift": 0.1}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    norms = [site.module for site in find_norms(loaded) if site.kind == "derf"]
    assert all(norm.alpha.item() != 0.75 and norm.shift.item() != 0.1 for norm in norms)
    assert same(outputs(loaded), outputs(model))


@pytest.mark.parametrize("name", ["dyt", "derf"])
def test_calibration_takes_the_slope_that_fits_best(name):
    """In numpy: the least residual over slopes of an affine fit of the LayerNorm's outputs, channel by channel."""
    original, function = stock("gpt2"), np.tanh if name == "dyt" else np.vectorize(math.erf)
    model, data = swap_norm(stock("gpt2"), NormSwapConfig(name, alpha=7.0), where="blocks"), batches(original)
    report = calibrate(model, data, linears=False)
    assert [fit.name for fit in report][0] == "transformer.h.0.ln_1"
    norm, before = model.transformer.h[0].ln_1, inputs_and_outputs(original, data, ["transformer.h.0.ln_1"])
    ((x, wanted),) = before.values()

    def residual(alpha):
        total = 0
        for channel in range(x.shape[1]):
            design = np.stack([function(alpha * x[:, channel]), np.ones(len(x))], axis=1)
            total += np.linalg.lstsq(design, wanted[:, channel], rcond=None)[1].sum()
        return total

    slopes = 2.0 ** (np.arange(-20, 9) / 2)
    assert norm.alpha.item() == pytest.approx(slopes[np.argmin([residual(slope) for slope in slopes])])
    assert residual(norm.alpha.item()) < 0.95 * residual(7.0)
    assert name == "dyt" or norm.shift.item() == 0
    variance = ((wanted - wanted.mean(0)) ** 2).sum()
    assert report[0].r2 == pytest.approx(1 - residual(norm.alpha.item()) / variance, abs=1e-9)


@pytest.mark.parametrize("name", ["dyt", "derf"])
def test_it_does_not_fold(name):
    model = swap_norm(tiny_model("gpt2").eval(), name)
    with pytest.raises(ValueError, match=rf"a {name} \(16\), computes no affine map at inference: ") as error:
        fold_norms(model)
    assert is_one_sentence(str(error.value))
