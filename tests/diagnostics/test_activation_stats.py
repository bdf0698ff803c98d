"""Scale and condition of activations, against a computation by hand."""

import math

import pytest
import torch

from hf_normswap import find_norms, probe_activations, set_norm_placement, swap_norm
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [None, "rmsnorm", "placement"])
def test_they_are_those_of_real_tokens(family, norm):
    model = tiny_model(family).double().eval()
    if norm == "placement":
        set_norm_placement(model, "pre")
    elif norm:
        swap_norm(model, norm, where="all")
    lengths, before = (9, 7, 8, 9), count_hooks(model)
    plain, padded = (
        probe_activations(model, [tiny_batch(model, lengths, **options)])
        for options in ({}, {"columns": 14, "filler": 7})
    )
    assert [probe.name for probe in plain] == [site.name for site in find_norms(model)]
    for ours, theirs in zip(plain, padded, strict=True):
        assert ours.tokens == theirs.tokens
        for name in ("input_scale", "output_scale"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name))
    assert count_hooks(model) == before


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_against_numbers_of_one_norm(norm):
    model = swap_norm(tiny_model("bert").double(), norm, where="all")
    model(**tiny_batch(model))
    kept = {}
    site = find_norms(model.eval())[1]
    site.module.register_forward_hook(lambda module, args, output: kept.update(x=args[0], y=output))
    probe = probe_activations(model, [tiny_batch(model, (9, 9, 9, 9, 9))])[1]
    x, y = kept["x"].flatten(0, -2), kept["y"].flatten(0, -2)
    assert probe.input_scale == pytest.approx(x.square().mean().sqrt().item())
    assert probe.output_scale == pytest.approx(y.square().mean().sqrt().item())
    assert probe.tokens == len(y) == 45
    values = torch.linalg.svdvals(y - y.mean(0)).square()
    # LayerNorm takes one direction away.
    smallest = values[-2 if norm == "layernorm" else -1]
    assert probe.condition == pytest.approx((values[0] / smallest).item(), rel=1e-4)
    assert math.isnan(probe_activations(model, [tiny_batch(model, (9,))])[1].condition)


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_model_in_training_is_refused():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="training mode"):
        probe_activations(model, [tiny_batch(model)])
    with pytest.raises(ValueError, match="data is empty"):
        probe_activations(model.eval(), [])
    assert torch.is_grad_enabled()
