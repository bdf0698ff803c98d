"""LayerNorm to RMSNorm without a change of the function."""

import pytest
import torch
from torch import nn

from hf_normswap import RMSNorm, convert_to_rmsnorm, find_norms, restore_norm, swap_norm
from tests.helpers.models import heads, tiny_batch, tiny_model
from tests.helpers.persistence import outputs, same


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("head", heads("gpt2"))
def test_logits_stay(head, dtype, tolerance):
    model = tiny_model("gpt2", head, layer_norm_epsilon=3e-4, add_cross_attention=True).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # embeddings of a mean that is not 0
            module.weight.data += torch.rand(module.weight.shape[0], 1, generator=generator).to(dtype)
    states = torch.randn(2, 5, 16, generator=generator).to(dtype)
    batch = {**tiny_batch(model, lengths=(7, 5), labels=False), "encoder_hidden_states": states}
    if head != "GPT2LMHeadModel" and head != "GPT2Model":
        del batch["encoder_hidden_states"]
    before = outputs(model, batch)
    assert convert_to_rmsnorm(model, untie=True) is model
    assert {type(site.module) for site in find_norms(model)} == {RMSNorm}
    after = outputs(model, batch)
    for name in before:
        error = (after[name] - before[name]).norm() / before[name].norm()
        assert error < tolerance, name


def test_it_is_saved_and_loaded(tmp_path):
    model = convert_to_rmsnorm(tiny_model("gpt2").eval(), untie=True)
    model.save_pretrained(tmp_path)
    for loaded in (type(model).from_pretrained(tmp_path), restore_norm(model)):
        loaded.tie_weights()
        assert same(model.state_dict(), loaded.state_dict())
        assert loaded.lm_head.weight is not loaded.transformer.wte.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("bert").eval(), "post-norm"),
        (lambda: tiny_model("gpt2"), "training mode"),
        (lambda: tiny_model("gpt2").eval(), "untie=True"),
        (lambda: swap_norm(tiny_model("gpt2").eval(), "rbn"), "restore_norm"),
    ],
)
def test_refused_and_untouched(make, message):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert_to_rmsnorm(model)
    assert same(model.state_dict(), before)
