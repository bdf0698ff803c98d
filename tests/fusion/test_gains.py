"""Gains and shifts of stock norms in the linear layers behind them."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from hf_normswap import fold_gains, swap_norm
from tests.helpers.architectures import architectures, norm_modules, tiny_architecture
from tests.helpers.folding import architecture_of, relative_error
from tests.helpers.persistence import clone, is_one_sentence, outputs, run_fresh, same


# How many norms of each architecture are folded with a head that is untied, and how many are kept.
COUNTS = {
    "bert": (1, 4),
    "roberta": (2, 4),
    "electra": (2, 3),
    "roberta-prelayernorm": (5, 1),
    "modernbert": (5, 1),
    "esm": (6, 0),
    "gpt2": (5, 0),
    "gptj": (3, 0),
    "gpt_neox": (5, 0),
    "opt": (5, 0),
    "bloom": (5, 1),
    "falcon": (3, 0),
    "llama": (5, 0),
    "qwen3": (5, 4),
    "gemma2": (5, 4),
    "stablelm": (5, 0),
    "mixtral": (3, 2),
    "bart": (2, 10),
    "mbart": (12, 2),
    "pegasus": (12, 0),
    "t5": (11, 1),
    "mt5": (12, 0),
    "vit": (5, 0),
    "dinov2": (4, 1),
    "segformer": (4, 5),
    "clip": (10, 1),
    "whisper": (12, 0),
    "wav2vec2": (6, 2),
}
# Their norms compute in float32, or their experts know no float64.
FLOAT32_INSIDE = {"gemma2", "mixtral"}


def stored_gain(norm):
    """The value of the stored gain at which the norm multiplies by 1."""
    return 0.0 if "Gemma" in type(norm).__name__ else 1.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_outputs_stay(name, dtype, tolerance):
    if dtype == torch.float64 and name in FLOAT32_INSIDE:
        pytest.skip("it does not compute in float64")
    model, batch = architecture_of(name, dtype)
    before, kept = outputs(model, batch), clone(model.named_parameters())
    cls, fields = type(model), model.config.to_dict()
    report = fold_gains(model, untie=True)
    assert (len(report.folded), len(report.kept)) == COUNTS[name]
    assert report.error < tolerance
    assert relative_error(before, outputs(model, batch)) < tolerance
    assert type(model) is cls
    assert model.config.to_dict() in (fields, {**fields, "tie_word_embeddings": False})
    for path in report.folded:
        assert (model.get_submodule(path).weight == stored_gain(model.get_submodule(path))).all()
    for path in report.kept:
        norm = dict(model.get_submodule(path).named_parameters(prefix=path))
        assert same(norm, {key: kept[key] for key in norm})


@torch.no_grad()
def biases_behind(model, batch):
    """For each norm whether the linear layers that are given its output have a bias, by the memory of the tensors."""
    made, given, handles = {}, [], []
    for path, norm in norm_modules(model).items():
        note = lambda module, args, output, path=path: made.update({path: output})  # noqa: E731
        handles.append(norm.register_forward_hook(note))
    for linear in model.modules():
        if isinstance(linear, nn.Linear | Conv1D):
            note = lambda module, args: given.append((args[0], module.bias is not None))  # noqa: E731
            handles.append(linear.register_forward_pre_hook(note))
    model(**batch)
    for handle in handles:
        handle.remove()
    return {path: [has for x, has in given if x.data_ptr() == output.data_ptr()] for path, output in made.items()}


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit", "pegasus", "gpt_neox", "gptj", "falcon", "stablelm"])
def test_the_shift_goes_where_all_readers_have_a_bias(name):
    model, batch = architecture_of(name)
    biases = biases_behind(model, batch)
    shifts = {path: norm.bias / norm.weight for path, norm in norm_modules(model).items()}
    for path in fold_gains(model, untie=True).folded:
        assert biases[path]
        expected = torch.zeros_like(shifts[path]) if all(biases[path]) else shifts[path]
        torch.testing.assert_close(model.get_submodule(path).bias.data, expected, rtol=1e-12, atol=0)


def test_a_folded_model_loads_without_the_package(tmp_path):
    names = ["gpt2", "llama", "gemma2", "vit", "mbart", "mt5", "bert"]
    expected = {}
    for name in names:
        model, batch = architecture_of(name, torch.float32)
        fold_gains(model, untie=True)
        model.save_pretrained(tmp_path / name)
        torch.save(batch, tmp_path / f"{name}.batch")
        expected[name] = outputs(model, batch)["logits"]
    autos = {each.name: each.auto for each in architectures() if each.name in names}
    script = """
import json, sys, torch, transformers
for name, auto in json.loads(sys.argv[1]).items():
    model = getattr(transformers, auto).from_pretrained(name)
    print(type(model).__name__, type(model).__module__.split(".")[0])
    with torch.no_grad():
        torch.save(model(**torch.load(f"{name}.batch")).logits, f"{name}.logits")
"""
    done = run_fresh(script, tmp_path, json.dumps(autos), package=False)
    assert len(done.stdout.split()) == 2 * len(names)
    assert set(done.stdout.split()[1::2]) == {"transformers"}
    for name in names:
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.logits"), expected[name], rtol=1e-5, atol=1e-6)


def gpt2(**fields):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 40, "use_cache": False}
    config = GPT2Config(**{**sizes, **fields})
    model = GPT2LMHeadModel(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    for norm in norm_modules(model).values():
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
    return model, config


def test_a_tied_head_is_kept_or_untied():
    model, config = gpt2()
    assert "shares its weights" in fold_gains(copy.deepcopy(model)).kept["transformer.ln_f"]
    ids = torch.arange(8)[None]
    before = model(ids).logits
    table = model.transformer.wte.weight.detach().clone()
    assert "transformer.ln_f" in fold_gains(model, untie=True).folded
    assert torch.equal(model.transformer.wte.weight, table)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert not model.config.tie_word_embeddings
    assert config.tie_word_embeddings  # of the caller, who may have made other models of it
    model.tie_weights()
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-12)


def test_an_untied_encoder_decoder_is_saved_as_it_is(tmp_path):
    model, batch = architecture_of("pegasus")
    fold_gains(model, untie=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert same(model.state_dict(), loaded.state_dict())
    assert torch.equal(outputs(model, batch)["logits"], outputs(loaded, batch)["logits"])


def test_it_generates_the_same():
    model, batch = architecture_of("mbart")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    fold_gains(model, untie=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), before)


def test_folding_twice_finds_nothing():
    model, _ = architecture_of("opt")
    fold_gains(model, untie=True)
    with pytest.raises(ValueError, match="no gain and no shift to fold") as error:
        fold_gains(model, untie=True)
    assert is_one_sentence(error.value)


def hook(model):
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, args, output: output)


def hook_norm(model):
    model.transformer.h[0].ln_1.register_forward_hook(lambda module, args, output: 2 * output)


def share(model):
    model.transformer.h[1].attn.c_attn.weight = model.transformer.h[0].attn.c_attn.weight


def share_norms(model):
    model.transformer.h[0].ln_1.weight = model.transformer.h[1].ln_1.weight


def call_twice(model):
    model.transformer.h[1] = model.transformer.h[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "has hooks"),
        (hook_norm, "has hooks"),
        (share, "shares its weights with transformer.h.1.attn.c_attn"),
        (share_norms, "shares its weights with transformer.h.1.ln_1"),
        (call_twice, "called 2 times"),
    ],
)
def test_a_norm_is_kept(change, reason):
    model, _ = gpt2(n_layer=2)
    change(model)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    report = fold_gains(model, untie=True)
    assert reason in report.kept["transformer.h.0.ln_1"]
    assert "transformer.ln_f" in report.folded
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-12)


def test_a_gain_of_zero_keeps_its_shift():
    model, batch = architecture_of("stablelm")
    norms = model.model.layers[0].input_layernorm, model.model.layers[1].input_layernorm
    for norm in norms:
        norm.weight.data[3] = 0
    norms[1].bias.data[3] = 0
    before = outputs(model, batch)
    report = fold_gains(model)
    assert report.kept == {"model.layers.0.input_layernorm": report.kept["model.layers.0.input_layernorm"]}
    assert "1 of its gains are 0" in report.kept["model.layers.0.input_layernorm"]
    assert (norms[1].weight == 1).all()
    assert relative_error(before, outputs(model, batch)) < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: swap_norm(tiny_architecture("gpt2")[0], "rmsnorm"), "fold_norms"),
        (lambda: tiny_architecture("gpt2")[0].train(), "training mode"),
        (lambda: tiny_architecture("bert-generation")[0], "residual sum"),
        (lambda: tiny_architecture("mobilebert")[0], "reads it"),
    ],
)
def test_refused_and_untouched(make, message):
    model = make()
    before, fields = clone(model.state_dict().items()), model.config.to_dict()
    with pytest.raises(ValueError, match=message) as error:
        fold_gains(model)
    assert is_one_sentence(error.value)
    assert same(model.state_dict(), before)
    assert model.config.to_dict() == fields
