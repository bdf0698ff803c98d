"""LayerNorm to RMSNorm without a change of the function."""

import pytest
import torch
from torch import nn

from hf_normswap import RMSNorm, convert_to_rmsnorm, find_norms, restore_norm, swap_norm
from tests.helpers.folding import architecture_of, relative_error
from tests.helpers.models import heads, tiny_batch, tiny_model
from tests.helpers.persistence import clone, is_one_sentence, outputs, same


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


CONVERTED = {
    "xlm-roberta-xl": 5,
    "esm": 5,  # and one in the head
    "gpt2": 5,
    "gpt_neo": 5,
    "gptj": 3,
    "gpt_neox": 5,
    "opt": 5,
    "falcon": 3,
    "phi": 3,
    "stablelm": 5,
    "pegasus": 12,
    "blenderbot": 12,
    "vit": 5,
    "deit": 5,
    "beit": 5,
    "dinov2": 5,
    "siglip": 5,
}


def means_that_norms_read(model, batch):
    """The largest mean over the channels of a token, relative to its size, that any RMSNorm reads."""
    means, handles = [], []
    for module in model.modules():
        if isinstance(module, RMSNorm):
            note = lambda module, args: means.append(args[0].mean(-1).abs().max() / args[0].std())  # noqa: E731
            handles.append(module.register_forward_pre_hook(note))
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    return max(means)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", CONVERTED)
def test_every_architecture_computes_the_same(name, dtype, tolerance):
    model, batch = architecture_of(name, dtype)
    before = outputs(model, batch)
    convert_to_rmsnorm(model, untie=True)
    norms = [site for site in find_norms(model) if isinstance(site.module, RMSNorm)]
    assert len(norms) == CONVERTED[name]
    assert relative_error(before, outputs(model, batch)) < tolerance
    assert means_that_norms_read(model, batch) < tolerance
    assert {site.module.eps for site in norms} == {site.module.stock.eps for site in norms}


@pytest.mark.parametrize("name", ["pegasus", "vit", "dinov2", "opt", "blenderbot", "xlm-roberta-xl"])
def test_every_architecture_is_saved_and_loaded(name, tmp_path):
    model, batch = architecture_of(name)
    convert_to_rmsnorm(model, untie=True).save_pretrained(tmp_path)
    expected = outputs(model, batch)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert same(model.state_dict(), loaded.state_dict())
    assert relative_error(expected, outputs(loaded, batch)) < 1e-12
    # A LayerNorm subtracts a mean that is not there any more.
    assert relative_error(expected, outputs(restore_norm(loaded), batch)) < 1e-12


def test_a_tied_table_of_encoder_and_decoder_loses_its_mean_once():
    model, batch = architecture_of("pegasus")
    table = model.get_input_embeddings().weight.detach().clone()
    convert_to_rmsnorm(model, untie=True)
    for stack in (model.model.encoder, model.model.decoder):
        expected = table - table.mean(-1, keepdim=True)
        torch.testing.assert_close(stack.embed_tokens.weight.data, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(model.lm_head.weight, table)


def test_a_factor_of_the_channels_goes_into_the_layer():
    model, batch = architecture_of("dinov2")
    before = outputs(model, batch)
    factors = {name: value for name, value in model.named_parameters() if "lambda1" in name}
    assert factors
    assert not any((value == 1).any() for value in factors.values())
    convert_to_rmsnorm(model)
    assert all((value == 1).all() for value in factors.values())
    assert relative_error(before, outputs(model, batch)) < 1e-12


# Its output is the residual stream, and has no mean but that of its shift where all its gains are the same.
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("bloom", "transformer.word_embeddings_layernorm"),
        ("roberta-prelayernorm", "roberta_prelayernorm.embeddings.LayerNorm"),
        ("clip", "vision_model.pre_layrnorm"),
    ],
)
def test_a_norm_that_makes_the_stream(name, norm):
    model, batch = architecture_of(name)
    before = clone(model.state_dict().items())
    with pytest.raises(ValueError, match=f"{norm} writes to it") as error:
        convert_to_rmsnorm(model, untie=True)
    assert is_one_sentence(error.value)
    assert same(model.state_dict(), before)
    model.get_submodule(norm).weight.data.fill_(1.5)
    before = outputs(model, batch)
    convert_to_rmsnorm(model, untie=True)
    assert isinstance(model.get_submodule(norm), RMSNorm)
    assert relative_error(before, outputs(model, batch)) < 1e-12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "post-norm"),
        ("llama", "RMSNorms already"),
        ("t5", "RMSNorms already"),
        ("mbart", "layernorm_embedding writes to it"),
        ("m2m_100", "the buffer model.encoder.embed_positions.weights writes to it"),
        ("whisper", "gelu in model.encoder writes to it"),
        ("wav2vec2", "gelu in .* writes to it"),
        ("modernbert", "model.embeddings.norm writes to it"),
        ("swin", "writes to it"),
        ("segformer", "writes to it"),
        ("convnext", "do not stand around a residual stream"),
        ("mobilebert", "do not stand around a residual stream"),
        ("opt", "pass untie=True"),
        ("pegasus", "pass untie=True"),
    ],
)
def test_an_architecture_is_refused_and_untouched(name, message):
    model, _ = architecture_of(name)
    before, fields = clone(model.state_dict().items()), model.config.to_dict()
    with pytest.raises(ValueError, match=message) as error:
        convert_to_rmsnorm(model, untie=name not in ("opt", "pegasus"))
    assert is_one_sentence(error.value)
    assert same(model.state_dict(), before)
    assert model.config.to_dict() == fields


def read_stream(model):
    """Let a linear layer read the stream itself."""
    model.transformer.h[1].ln_2 = nn.Identity().eval()


class AddPositions(nn.Module):
    """Adds rows of a table that have gone through something that is not linear."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return x + self.table.weight[: x.shape[1]].relu()


def write_rows(model):
    """Let a sublayer add what no layer with weights has made."""
    model.transformer.h[1].mlp.dropout = AddPositions(model.transformer.wpe).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (read_stream, "linear in transformer.h.1.mlp.c_fc reads it too"),
        (write_rows, "relu in transformer.h.1.mlp.dropout writes to it"),
    ],
)
def test_what_else_touches_the_stream(change, message):
    model = tiny_model("gpt2").eval()
    change(model.eval())
    before = clone(model.state_dict().items())
    with pytest.raises(ValueError, match=message) as error:
        convert_to_rmsnorm(model, untie=True)
    assert is_one_sentence(error.value)
    assert same(model.state_dict(), before)


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
