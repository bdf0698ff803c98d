"""The norm of Fixup, and the initial weights of new models without norms."""

import re

import pytest
import torch

from hf_normswap import fold_norms, initialize_fixup, initialize_weightnorm, set_norm_placement, swap_norm
from hf_normswap.modeling.fixup import Fixup
from hf_normswap.modeling.linears import WeightNormalized
from tests.helpers.architectures import tiny_architecture
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.norms import assert_computes
from tests.helpers.persistence import outputs, same, train


# Residual branches, the linear layers in them, and the last ones; two layers in a row in each branch.
WEIGHTS = {
    "bert": (4, r"\.layer\.\d\..*(query|key|value|dense)\.weight", r"\d\.(attention\.)?output\.dense\.weight"),
    "marian": (10, r"layers\.\d\..*(_proj|fc1|fc2)\.weight", r"(out_proj|fc2)\.weight"),
    "gpt2": (4, r"h\.\d\..*c_\w+\.weight", r"c_proj\.weight"),
    "llama": (4, r"layers\.\d\..*_proj\.weight", r"(o_proj|down_proj)\.weight"),
}


def test_follows_the_formula():
    norm = Fixup(6, dtype=torch.float64)
    assert dict(norm.named_parameters()).keys() == {"multiplier", "offset"}
    assert_computes(norm, lambda x: x)
    with torch.no_grad():
        norm.multiplier.fill_(0.3)
        norm.offset.fill_(2)
    assert_computes(norm, lambda x: 0.3 * x + 2)


def build(name):
    return tiny_architecture(name)[0] if name == "llama" else tiny_model(name)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_scaled_or_zero(name):
    count, inside, last = WEIGHTS[name]
    model = swap_norm(build(name), "fixup", where="all")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    assert initialize_fixup(model) is model
    seen = 0
    for key, value in model.named_parameters():
        if re.search(inside, key):
            seen += 1
            expected = 0 * before[key] if re.search(last, key) else before[key] * count ** (-1 / 2)
        elif key.startswith("classifier") or (name == "llama" and key == "lm_head.weight"):  # not tied
            expected = 0 * before[key]
        elif re.sub("bias$", "weight", key) != key and re.search(last, re.sub("bias$", "weight", key)):
            expected = 0 * before[key]
        else:
            expected = before[key]
        torch.testing.assert_close(value.detach(), expected)
    assert seen == {"bert": 12, "marian": 32, "gpt2": 8, "llama": 14}[name]


def test_a_new_model_is_its_embeddings_and_trains():
    model = initialize_fixup(swap_norm(tiny_model("gpt2", "GPT2Model"), "fixup", where="all")).eval()
    batch = tiny_batch(model)
    ids = batch["input_ids"]
    embedded = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))
    torch.testing.assert_close(model(**batch).last_hidden_state, embedded, rtol=0, atol=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    assert not torch.equal(model.h[0].mlp.c_proj.weight, before["h.0.mlp.c_proj.weight"])


def test_it_is_saved_loaded_and_folded(tmp_path):
    model = train(initialize_fixup(swap_norm(tiny_model("bert"), "fixup", where="all")))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(outputs(model), outputs(loaded))
    assert fold_norms(loaded.double().eval()).error < 1e-10
    model.name_or_path = "a checkpoint"
    with pytest.raises(ValueError, match="would erase weights of this pretrained one"):
        initialize_fixup(model)


def test_a_tied_head_stays(caplog):
    model = swap_norm(tiny_model("gpt2"), "fixup", where="all")
    head = model.lm_head.weight.clone()
    with caplog.at_level("WARNING", logger="hf_normswap"):
        initialize_fixup(model)
    assert "lm_head is tied to the embeddings" in caplog.text
    assert torch.equal(model.lm_head.weight, head)


def test_it_needs_the_norms_of_fixup():
    with pytest.raises(ValueError, match="has no fixup norms"):
        initialize_fixup(tiny_model("bert"))


def test_the_placement_decides_what_a_branch_is():
    """The second sum of rSkip adds no branch of its own."""
    weights = []
    for placement in ("post", "rskip"):
        model = swap_norm(set_norm_placement(tiny_model("bert"), placement), "fixup", where="all")
        weights.append(initialize_fixup(model).bert.encoder.layer[0].intermediate.dense.weight)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "marian", "gpt2", "llama"])
def test_outputs_have_mean_0_and_variance_1_over_real_tokens(name):
    """Pads are in no sum, and the layers without a bias keep their means."""
    model = swap_norm(build(name).double(), "weightnorm", where="all").train()
    lengths = (6,) * 9 if name == "marian" else (6, 3, 9, 5, 8, 9, 7)
    batch = tiny_batch(model, lengths) if name != "llama" else {"input_ids": torch.randint(9, (9, 6))}
    assert initialize_weightnorm(model, batch) is model
    assert model.training
    found = {}

    def note(layer, args, output):
        found[layer] = output

    layers = [module for module in model.modules() if isinstance(module, WeightNormalized)]
    for layer in layers:
        layer.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(**batch)
    assert found.keys() == set(layers)
    for layer, output in found.items():
        is_padded = "attention_mask" in batch and batch["attention_mask"].shape == output.shape[:-1]
        values = output[batch["attention_mask"].bool()] if is_padded else output.flatten(0, -2)
        torch.testing.assert_close(values.var(0, correction=0), torch.ones_like(values[0]))
        if layer.bias is not None:
            torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]))


def test_a_deep_model_without_norms_keeps_the_size_of_its_stream():
    model = swap_norm(tiny_model("bert", num_hidden_layers=12, initializer_range=0.25), "weightnorm", where="all")
    batch = tiny_batch(model, (8,) * 8)
    with torch.no_grad():
        before = model.eval().bert(batch["input_ids"]).last_hidden_state.std()
        after = initialize_weightnorm(model, batch).bert(batch["input_ids"]).last_hidden_state.std()
    assert before > 100
    assert after < 6  # 24 branches of variance 1


def test_initialisation_by_data_is_for_new_models_with_weight_norm():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="has no weight normalisation: call swap_norm"):
        initialize_weightnorm(model, tiny_batch(model))
    swap_norm(model, "weightnorm").name_or_path = "a checkpoint"
    with pytest.raises(ValueError, match="initialize_weightnorm is for a new model"):
        initialize_weightnorm(model, tiny_batch(model))
