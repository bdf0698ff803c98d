"""ScaleNorm against its equation."""

import numpy as np
import torch

from hf_normswap import find_norms, restore_norm, swap_norm
from hf_normswap.modeling.norms import ScaleNorm
from tests.helpers.models import tiny_model
from tests.helpers.norms import assert_computes, assert_gradients_are_those_of_differences, make_norm


def test_follows_the_formula():
    norm = ScaleNorm(6, eps=1e-3, dtype=torch.float64)
    assert dict(norm.named_parameters()).keys() == {"gain"}
    length = lambda x: np.sqrt((x**2).sum(-1, keepdims=True) + 1e-3)  # noqa: E731
    assert_computes(norm, lambda x: 6**0.5 * x / length(x))
    with torch.no_grad():
        norm.gain.fill_(0.3)
    assert_computes(norm, lambda x: 0.3 * x / length(x))


def test_gradients():
    assert_gradients_are_those_of_differences(make_norm("scalenorm"), None)


def test_the_gain_goes_over_to_the_layernorm_that_is_restored():
    model = swap_norm(tiny_model("bert"), "scalenorm")
    sites = [site for site in find_norms(model) if site.kind == "scalenorm"]
    with torch.no_grad():
        for number, site in enumerate(sites, 1):
            site.module.gain.fill_(4.0 * number)  # of 16 channels
    restore_norm(model)
    for number, site in enumerate(sites, 1):
        torch.testing.assert_close(model.get_submodule(site.name).weight, torch.full((16,), float(number)))
