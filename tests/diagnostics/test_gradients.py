"""Norms of gradients, against autograd, and the theorem on depth."""

import math

import pytest
import torch

from hf_normswap import find_norms, gradient_norms, norm_penalty, study_depth, swap_norm
from tests.helpers.models import FAMILIES, all_heads, tiny_batch, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [None, "rbn", "powernorm"])
def test_groups_make_up_the_whole_gradient(family, norm):
    model = tiny_model(family).double()
    if norm:
        swap_norm(model, norm)
    batch = tiny_batch(model, (6, 3, 9))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = gradient_norms(model, batch)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.training
    (model(**batch).loss + norm_penalty(model)).backward()
    squares = {name: p.grad.square().sum() for name, p in model.named_parameters() if p.grad is not None}
    assert math.sqrt(sum(item.value**2 for item in report)) == pytest.approx(sum(squares.values()).sqrt().item())
    blocks = [site for site in find_norms(model) if site.block]
    for site in blocks:
        ours = next(i for i in report if (i.stack, i.layer, i.group) == (site.stack, site.layer, "norm"))
        inside = [s.name for s in blocks if (s.stack, s.layer) == (site.stack, site.layer)]
        expected = sum(value for name, value in squares.items() if name.rpartition(".")[0] in inside)
        assert ours.value == pytest.approx(expected.sqrt().item())
    assert {item.group for item in report} >= {"attention", "ffn", "norm", "embedding"}
    assert "gradient" in str(report)


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_every_head(family, head):
    model = tiny_model(family, head)
    if head in ("BertModel", "RobertaModel", "MarianModel", "GPT2Model"):
        with pytest.raises(ValueError, match="returns no loss"):
            gradient_norms(model, tiny_batch(model))
    else:
        assert all(item.value >= 0 for item in gradient_norms(model, tiny_batch(model)))


@pytest.mark.release
def test_slopes_are_those_of_the_theorem():
    study = study_depth(["layernorm", "pnv", "powernorm"], seeds=4)
    slopes = {(item.norm, item.placement): item.slope for item in study}
    assert slopes["layernorm", "post"] == pytest.approx(0.0, abs=0.1)
    assert slopes["layernorm", "pre"] == pytest.approx(-0.5, abs=0.1)
    # PowerNorm is in its warm-up, which is PN-V with group scaling.
    assert slopes["powernorm", "pre"] == pytest.approx(slopes["pnv", "pre"], abs=0.1)
    assert [row[:2] for row in study.rows()] == [("norm", "placement"), *((i.norm, i.placement) for i in study)]


def test_every_placement_has_a_slope():
    placements = ["deep", "sub", "peri", "rskip"]
    study = study_depth(["layernorm"], placements=placements, depths=[2, 8], width=16, seeds=1)
    slopes = {item.placement: item.slope for item in study}
    assert list(slopes) == placements
    assert all(math.isfinite(slope) for slope in slopes.values())
    # DeepNorm keeps the update of the whole model bounded: the share of each layer falls with the depth.
    assert slopes["deep"] < -0.25 < slopes["rskip"]


def test_a_slope_needs_two_depths():
    with pytest.raises(ValueError, match="two depths"):
        study_depth(["layernorm"], depths=[2, 2])
