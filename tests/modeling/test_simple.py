"""LayerNorm-simple and RMSNorm without a gain, against the formulas and PyTorch's own."""

import pytest
import torch
from torch import nn

from hf_normswap import NormSwapConfig, calibrate, find_norms, get_norm, restore_norm, swap_norm
from hf_normswap.modeling.norms import LayerNormSimple, RMSNormSimple
from hf_normswap.modeling.replace import set_layer_norm_share
from tests.helpers import reference
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.norms import WITHOUT_GAIN, assert_computes, assert_gradients_are_those_of_differences, make_norm
from tests.helpers.persistence import is_one_sentence, outputs, same, train


@pytest.mark.parametrize(
    ("cls", "formula", "theirs"),
    [
        (LayerNormSimple, reference.layernorm, nn.LayerNorm(6, eps=1e-3, elementwise_affine=False)),
        (RMSNormSimple, reference.rmsnorm, nn.RMSNorm(6, eps=1e-3, elementwise_affine=False)),
    ],
)
def test_follows_the_formula_and_agrees_with_pytorch(cls, formula, theirs):
    norm = cls(6, eps=1e-3)
    assert not list(norm.parameters())
    assert not norm.state_dict()
    assert_computes(norm.double(), lambda x: formula(x, 1e-3))
    x = torch.randn(3, 6)
    assert torch.equal(norm.float()(x), theirs(x))


@pytest.mark.parametrize("name", ["layernorm_simple", "rmsnorm_simple"])
def test_gradients(name):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(get_norm(name)(4), x)
    assert_gradients_are_those_of_differences(make_norm(name), None)


@pytest.mark.parametrize("norm", WITHOUT_GAIN)
def test_restoring_keeps_the_function_of_a_norm_without_gain(norm):
    """A LayerNorm whose gain is that of each channel, in the dtype of the model."""
    model = swap_norm(tiny_model("bert").bfloat16(), norm, where="all")
    restore_norm(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for site in find_norms(model):
        assert site.module.weight.eq(1).all()
        assert not site.module.bias.any()
    model.float()
    fresh = tiny_model("bert")
    with torch.no_grad():
        for site in find_norms(fresh):
            site.module.weight.fill_(1)
            site.module.bias.zero_()
    assert same(outputs(model), outputs(fresh.bfloat16().float()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_shift_on_demand_is_saved(bias, tmp_path):
    model = train(swap_norm(tiny_model("bert"), NormSwapConfig("layernorm_simple", bias=bias)))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    norms = [site.module for site in find_norms(loaded) if site.kind == "layernorm_simple"]
    assert {norm.bias is not None for norm in norms} == {bias}
    assert same(outputs(loaded), outputs(model))


@pytest.mark.parametrize("norm", WITHOUT_GAIN)
def test_what_needs_gains_refuses(norm):
    model = swap_norm(tiny_model("bert").eval(), norm)
    before = outputs(model)
    batch = tiny_batch(model, labels=False)
    for act in (lambda: calibrate(model, [batch]), lambda: set_layer_norm_share(model, 0.5)):
        with pytest.raises(ValueError, match=f"a {norm}") as error:
            act()
        assert is_one_sentence(str(error.value))
    assert same(outputs(model), before)
