"""DyT and Derf against their equations."""

import math

import numpy as np
import pytest
import torch

from hf_normswap import NormSwapConfig, find_norms, swap_norm
from hf_normswap.modeling.norms import Derf, DyT
from tests.helpers.models import tiny_model
from tests.helpers.norms import assert_computes, assert_gradients_are_those_of_differences, make_norm
from tests.helpers.persistence import outputs, same, train


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
