"""Scale and condition of activations, against a computation by hand."""

import pytest
import torch

from hf_normswap import find_norms, probe_activations, swap_norm
from tests.models import FAMILIES, tiny_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [None, "rmsnorm"])
def test_they_are_those_of_real_tokens(family, norm):
    model = tiny_model(family).double().eval()
    if norm:
        swap_norm(model, norm, where="all")
    lengths = (9, 7, 8, 9)
    plain, padded = (
        probe_activations(model, [tiny_batch(model, lengths, **options)])
        for options in ({}, {"columns": 14, "filler": 7})
    )
    assert [probe.name for probe in plain] == [site.name for site in find_norms(model)]
    for ours, theirs in zip(plain, padded, strict=True):
        assert ours.tokens == theirs.tokens
        for name in ("input_scale", "output_scale"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name))
    assert not model._forward_hooks or norm


def test_against_numbers_of_one_norm():
    model = tiny_model("bert").double().eval()
    kept = {}
    site = find_norms(model)[1]
    site.module.register_forward_hook(lambda module, args, output: kept.update(x=args[0], y=output))
    batches = [tiny_batch(model, (9, 9, 9, 9, 9), seed=seed) for seed in range(1)]
    probe = probe_activations(model, batches)[1]
    x, y = kept["x"].flatten(0, -2), kept["y"].flatten(0, -2)
    assert probe.input_scale == pytest.approx(x.square().mean().sqrt().item())
    assert probe.output_scale == pytest.approx(y.square().mean().sqrt().item())
    assert probe.tokens == len(y) == 45
    # LayerNorm takes one direction away, up to its gain and shift.
    assert probe.condition > 1e6


def test_a_model_in_training_is_refused():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="training mode"):
        probe_activations(model, [tiny_batch(model)])
    with pytest.raises(ValueError, match="data is empty"):
        probe_activations(model.eval(), [])
    assert torch.is_grad_enabled()
