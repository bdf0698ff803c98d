"""Swapping and restoring: exactly what was asked for changes, and where something is wrong nothing does."""

import copy
import re

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, BertModel

from hf_normswap import (
    NormSwapConfig,
    PowerNorm,
    available_norms,
    find_norms,
    norm_penalty,
    restore_norm,
    set_norm_placement,
    swap_norm,
)
from tests.helpers.architectures import tiny_architecture
from tests.helpers.models import FAMILIES, all_heads, tiny_batch, tiny_model
from tests.helpers.norms import WITHOUT_GAIN, family_is_causal, head_is_causal, norms_in
from tests.helpers.persistence import is_one_sentence, outputs, same, train
from tests.helpers.sites import STANDS_FOR, full_model, layer_norms
from tests.helpers.surgery import refuses, state


IN_HEADS = [(*place, norm) for place, norm in norms_in(all_heads(), head_is_causal)]
IN_FAMILIES = norms_in(list(FAMILIES), family_is_causal)


# Which norms


@settings(deadline=None, max_examples=40)
@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_a_list_stands_for_all_that_its_names_stand_for(family, data):
    known = STANDS_FOR[family]
    where = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=4))
    model = full_model(family)
    names = layer_norms(model)
    assert swap_norm(model, "layernorm", where=where) is model
    assert layer_norms(model) == [n for n in names if not any(re.search(known[name], n) for name in where)]


def test_a_filter_narrows_where():
    seen = []

    def attention_of_the_first_layer(module, name):
        seen.append((name, type(module)))
        return "layer.0.attention" in name

    model = tiny_model("bert", "BertForMaskedLM")
    blocks = [name for name in layer_norms(model) if "encoder.layer" in name]
    swap_norm(model, "pn", filter_fn=attention_of_the_first_layer)
    assert seen == [(name, nn.LayerNorm) for name in blocks]
    assert [s.name for s in find_norms(model) if s.kind == "powernorm"] == [
        "bert.encoder.layer.0.attention.output.LayerNorm"
    ]


@pytest.mark.parametrize("where", ["encoder", ("encoder",), {"encoder": 1}.keys(), (name for name in ["encoder"])])
def test_where_is_a_name_or_any_iterable(where):
    model = swap_norm(tiny_model("marian"), "pn", where=where)
    assert [s.stack for s in find_norms(model) if s.kind == "powernorm"] == ["encoder"] * 4


def test_two_swaps_of_disjoint_parts():
    model = swap_norm(tiny_model("marian"), "pn", where="encoder")
    swap_norm(model, NormSwapConfig("rbn", lambda_mean=0.5), where="decoder")
    assert {(s.stack, s.kind) for s in find_norms(model)} == {("encoder", "powernorm"), ("decoder", "rbn")}
    first, second = model.config.norm_swap["norms"]
    assert (first["norm"], second["norm"], second["options"]["lambda_mean"]) == ("powernorm", "rbn", 0.5)
    assert not set(first["modules"]) & set(second["modules"])


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_the_attention_heads(family):
    model = swap_norm(tiny_model(family), "powernorm")
    assert {s.module.num_groups for s in find_norms(model) if s.kind == "powernorm"} == {4}


# What stays


@pytest.mark.parametrize(("family", "head", "norm"), IN_HEADS)
def test_parameters_and_flags_stay(family, head, norm):
    model = tiny_model(family, head)
    sites = find_norms(model)
    sites[0].module.eval()
    sites[1].module.requires_grad_(False)
    parameters = dict(model.named_parameters())
    flags = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in parameters.items()}
    training = {name: module.training for name, module in model.named_modules()}
    assert swap_norm(model, norm, where="all") is model
    new = {f"{site.name}.{name}" for site in sites for name, _ in model.get_submodule(site.name).named_parameters()}
    gone = {f"{site.name}.{name}" for site in sites for name in ("weight", "bias")} - new
    assert bool(gone) == (norm in WITHOUT_GAIN)
    kept = {name: parameter for name, parameter in model.named_parameters() if name in parameters}
    assert list(kept) == [name for name in parameters if name not in gone]
    assert all(parameter is parameters[name] for name, parameter in kept.items())
    assert {name: (p.requires_grad, p.dtype) for name, p in kept.items()} == {name: flags[name] for name in kept}
    assert {name: module.training for name, module in model.named_modules()} == training
    assert type(model).__name__ == f"NormSwap{head}"
    assert isinstance(model, getattr(transformers, head))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_optimizer_built_before_goes_on(family):
    model, reference = tiny_model(family), tiny_model(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swap_norm(model, "layernorm", where="all")
    expected = torch.optim.SGD(reference.parameters(), lr=0.1)
    for each, stepper in ((model, optimizer), (reference, expected)):
        each(**tiny_batch(each)).loss.backward()
        stepper.step()
    assert same(dict(model.named_parameters()), dict(reference.named_parameters()))
    assert not same(dict(model.named_parameters()), dict(tiny_model(family).named_parameters()))


@pytest.mark.parametrize(("dtype", "norm"), norms_in([torch.bfloat16, torch.float16, torch.float64]))
def test_device_and_dtype_stay(norm, dtype):
    model = swap_norm(tiny_model("bert").to(dtype), norm, where="all")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    buffers = [b for s in find_norms(model) for name, b in s.module.named_buffers() if name != "weight"]
    floats = {b.dtype for b in buffers if b.is_floating_point()}
    assert floats <= {torch.float64 if dtype is torch.float64 else torch.float32}
    assert outputs(model)["logits"].dtype is dtype
    with torch.device("meta"):
        on_meta = tiny_like_meta()
    swap_norm(on_meta, norm, where="all")
    assert {tensor.device.type for s in find_norms(on_meta) for tensor in s.module.state_dict().values()} <= {"meta"}


def tiny_like_meta():
    return BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))


def test_hooks_stay_and_can_be_removed():
    model = tiny_model("bert")
    norm = find_norms(model)[1].module
    calls = []
    handles = [
        norm.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module)))),
        norm.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(("post", type(module))), with_kwargs=True
        ),
        norm.register_full_backward_hook(lambda module, *gradients: calls.append(("backward", type(module)))),
        model.register_forward_hook(lambda module, *_: calls.append(("model", None))),
    ]

    def run():
        calls.clear()
        model(**tiny_batch(model)).loss.backward()
        return list(calls)

    swap_norm(model, "powernorm")
    expected = [("pre", PowerNorm), ("post", PowerNorm), ("model", None), ("backward", PowerNorm)]
    assert run() == expected
    restore_norm(model)
    assert run() == [(event, nn.LayerNorm if kind else None) for event, kind in expected]
    swap_norm(model, "powernorm")
    for handle in handles:
        handle.remove()
    assert run() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_callers_configuration_stays(family):
    first = tiny_model(family)
    second = type(first)(first.config)
    shared, content = first.config, first.config.to_dict()
    swap_norm(first, "powernorm")
    assert second.config is shared
    assert (type(shared), shared.to_dict()) == (type(tiny_model(family).config), content)
    assert not hasattr(shared, "norm_swap")
    # Every part of the swapped model that had the model's configuration has its new one.
    assert {id(m.config) for m in first.modules() if hasattr(m, "config")} == {id(first.config)}
    first.config.use_cache = not shared.use_cache
    first.config.id2label[0] = "of the first model"
    assert shared.to_dict() == content
    third = swap_norm(second, "rbn")
    assert [entry["norm"] for entry in first.config.norm_swap["norms"]] == ["powernorm"]
    assert [entry["norm"] for entry in third.config.norm_swap["norms"]] == ["rbn"]


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_layernorm_for_layernorm_computes_the_same(family, head):
    model = tiny_model(family, head)
    expected = outputs(model)
    swap_norm(model, "layernorm", where="all")
    assert same(outputs(model), expected)
    assert not [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]


def test_a_swap_says_what_it_did(caplog):
    with caplog.at_level("INFO", logger="hf_normswap"):
        swap_norm(tiny_model("bert", "BertForMaskedLM"), "powernorm")
    assert "4 of 6 norms" in caplog.text
    assert "powernorm" in caplog.text
    assert "num_groups" in caplog.text


# Restoring


@pytest.mark.parametrize(("family", "head", "norm"), IN_HEADS)
def test_restoring(family, head, norm):
    model = tiny_model(family, head)
    if norm in WITHOUT_GAIN:
        with torch.no_grad():  # what it leaves behind is what a new LayerNorm has
            for site in find_norms(model):
                site.module.weight.fill_(1)
                site.module.bias.zero_()
    expected, before = outputs(model), state(model.train())
    swap_norm(model, norm, where="all")
    assert restore_norm(model) is model
    tensors, (cls, _, config, _, parameters, hooks) = state(model.train())
    if norm in WITHOUT_GAIN:  # and what stands there afterwards has parameters of its own
        parameters = before[1][4]
    assert (cls, config, parameters, hooks) == (before[1][0], *before[1][2:3], *before[1][4:])
    assert type(model.config) is type(before[1][1])
    assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == {id(model.config)}
    assert list(tensors) == list(before[0])
    assert same(tensors, before[0])
    assert same(outputs(model), expected)
    assert [type(site.module) for site in find_norms(model)] == [nn.LayerNorm] * len(find_norms(model))
    swap_norm(model, "batchnorm")
    train(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_keeps_what_was_learned_and_each_eps(family):
    model = tiny_model(family)
    for number, site in enumerate(find_norms(model)):
        site.module.eps = 10.0**-number
    train(swap_norm(model, "powernorm", where="all"))
    learned = dict(model.named_parameters())
    restore_norm(model)
    assert all(parameter is learned[name] for name, parameter in model.named_parameters())
    assert [site.module.eps for site in find_norms(model)] == [10.0**-n for n in range(len(find_norms(model)))]


def test_restoring_without_a_shift_gives_one_of_zeros():
    model = swap_norm(tiny_model("bert"), NormSwapConfig("rmsnorm", bias=False))
    assert all(site.module.bias is None for site in find_norms(model) if site.kind == "rmsnorm")
    for site in find_norms(restore_norm(model)):
        assert site.module.bias.shape == (16,)
    outputs(model)


def test_a_loaded_model_restores(tmp_path):
    model = train(swap_norm(tiny_model("gpt2"), "powernorm", where="all"))
    model.save_pretrained(tmp_path)
    loaded = restore_norm(type(model).from_pretrained(tmp_path))
    assert type(loaded) is transformers.GPT2LMHeadModel
    assert type(loaded.config) is transformers.GPT2Config
    assert same(outputs(loaded), outputs(restore_norm(model)))


# Activation checkpointing


@pytest.mark.parametrize(("family", "norm"), IN_FAMILIES)
def test_checkpointing_enabled_before_or_after(family, norm):
    plain, before, after, toggled = (tiny_model(family) for _ in range(4))
    before.activation_checkpointing_enable()
    toggled.activation_checkpointing_enable()
    for model in (plain, before, after, toggled):
        swap_norm(model, norm)
    after.activation_checkpointing_enable()
    restore_norm(toggled)
    swap_norm(toggled, norm)
    for model in (plain, before, after, toggled):
        batch = tiny_batch(model)
        (model(**batch, use_cache=False).loss if family != "bert" else model(**batch).loss).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    for model in (before, after, toggled):
        assert model.is_activation_checkpointing
        assert same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
        assert same(model.state_dict(), plain.state_dict())


def test_a_later_swap_counts_for_checkpointing_too(monkeypatch):
    """Only batch statistics are refused under torch.compile, whichever swap brought them."""
    model = tiny_model("bert")
    model.activation_checkpointing_enable()
    swap_norm(model, "layernorm", where="attention")
    layer = model.bert.encoder.layer[0]
    block = nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer._gradient_checkpointing_func(block, torch.ones(1, 2))
    swap_norm(model, "batchnorm", where="ffn")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="torch.compile"):
        layer._gradient_checkpointing_func(block, torch.ones(1, 2))


def test_restoring_leaves_the_checkpoint_function_of_transformers():
    model, stock = tiny_model("bert"), tiny_model("bert")
    for each in (model, stock):
        each.activation_checkpointing_enable({"use_reentrant": False})
    restore_norm(swap_norm(swap_norm(model, "pn", where="attention"), "rbn", where="ffn"))
    ours = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    theirs = [m._gradient_checkpointing_func for m in stock.modules() if hasattr(m, "_gradient_checkpointing_func")]
    assert ours
    assert [(f.func, f.keywords) for f in ours] == [(f.func, f.keywords) for f in theirs]


# Refusals


@pytest.mark.parametrize(
    ("name", "closest"), [("powernrm", "'powernorm'"), ("batch norm 1d", "'batchnorm'"), ("layer", "'layernorm'")]
)
def test_an_unknown_norm(name, closest):
    model = tiny_model("bert")
    said = refuses(model, lambda: swap_norm(model, name), closest)
    assert repr(name) in said


def test_an_unknown_norm_like_no_other():
    model = tiny_model("bert")
    said = refuses(model, lambda: swap_norm(model, "qqq"), "choose among")
    assert all(repr(norm) in said for norm in available_norms())


def test_an_unknown_option():
    model = tiny_model("bert")
    refuses(model, lambda: swap_norm(model, NormSwapConfig("rbn", lamda_mean=1.0)), "did you mean 'lambda_mean'")


def test_an_option_without_meaning():
    model = tiny_model("bert")
    refuses(model, lambda: swap_norm(model, NormSwapConfig("rbn", distance="euclid")), "'sigma_l2'")


@pytest.mark.parametrize("where", ["encodr", ["attention", "mlp"], "encoder.all", ""])
def test_an_unknown_where(where):
    model = tiny_model("bert")
    refuses(model, lambda: swap_norm(model, "pn", where=where), "cross_attention")


def test_no_norm_matches():
    model = tiny_model("bert", "BertModel")
    refuses(model, lambda: swap_norm(model, "pn", where="head"), "'attention': 2")
    refuses(model, lambda: swap_norm(model, "pn", where=[]), "where=[]")
    refuses(model, lambda: swap_norm(model, "pn", filter_fn=lambda module, name: False), "filter_fn")


def test_an_error_in_the_filter_changes_nothing():
    model = tiny_model("bert")
    before = state(model)
    with pytest.raises(KeyError):
        swap_norm(model, "pn", filter_fn=lambda module, name: {}[name])
    assert before[1] == state(model)[1]


def test_groups_that_do_not_divide():
    model = tiny_model("bert")
    refuses(model, lambda: swap_norm(model, NormSwapConfig("pn", num_groups=5)), "num_groups")


def test_swapped_twice():
    model = swap_norm(tiny_model("marian"), "pn", where="encoder")
    refuses(model, lambda: swap_norm(model, "rbn"), "restore_norm(model) first")
    refuses(model, lambda: swap_norm(model, "pn", where="encoder"), "model.encoder.layers.0")


def test_wrapped_models(tmp_path):
    model = tiny_model("bert")
    refuses(model, lambda: swap_norm(nn.DataParallel(model), "pn"), "before wrapping")
    refuses(model, lambda: swap_norm(torch.compile(model), "pn"), "before wrapping or compiling")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        refuses(model, lambda: swap_norm(DistributedDataParallel(model), "pn"), "before wrapping")
    finally:
        torch.distributed.destroy_process_group()
    swap_norm(model, "pn")
    refuses(model, lambda: restore_norm(nn.DataParallel(model)), "before wrapping")
    refuses(model, lambda: restore_norm(torch.compile(model)), "before wrapping or compiling")


def test_a_user_class_with_the_name_of_a_stock_one():
    """It is swapped as itself, never taken for the class of transformers."""
    namesake = type("BertForMaskedLM", (BertForMaskedLM,), {"forward": lambda self, **batch: "its own"})
    model = swap_norm(namesake(tiny_model("bert").config), "pn")
    assert (type(model).__name__, model(input_ids=None)) == ("NormSwapBertForMaskedLM", "its own")
    assert type(swap_norm(tiny_model("bert", "BertForMaskedLM"), "pn")) is not type(model)


# Chunks of a feed-forward network: BERT and RoBERTa call its norm once for each


@pytest.mark.parametrize("norm", ["pn", "rbn", "batchnorm", "pnv"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_chunked_feed_forward(family, norm):
    model = tiny_model(family, chunk_size_feed_forward=2)
    refuses(model, lambda: swap_norm(model, norm), "chunk_size_feed_forward=0")
    refuses(model, lambda: swap_norm(model, norm, where="ffn"), "layer.0.output.LayerNorm")
    swap_norm(model, norm, where="attention")  # not in the chunks


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "affine"])
def test_norms_of_tokens_do_not_mind_chunks(norm):
    model, plain = (swap_norm(tiny_model("bert", chunk_size_feed_forward=chunk), norm) for chunk in (2, 0))
    batch = tiny_batch(model, lengths=(6, 4))
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("family", ["marian", "gpt2"])
def test_families_without_chunks_do_not_mind_the_setting(family):
    model = swap_norm(tiny_model(family, chunk_size_feed_forward=2), "batchnorm")
    model(**tiny_batch(model))
    assert {site.module.num_batches_tracked.item() for site in find_norms(model) if site.kind == "batchnorm"} == {1}


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_chunks_given_at_loading(norm, tmp_path):
    model = swap_norm(tiny_model("bert"), norm)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chunk_size_feed_forward=0") as caught:
        type(model).from_pretrained(tmp_path, chunk_size_feed_forward=2)
    assert is_one_sentence(caught.value)
    config = copy.deepcopy(model.config)
    config.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="chunk_size_feed_forward=0"):
        type(model)(config)


def test_chunks_in_the_other_placement():
    model = set_norm_placement(tiny_model("bert", chunk_size_feed_forward=2), "pre")
    refuses(model, lambda: swap_norm(model, "batchnorm", where="ffn"), "chunk_size_feed_forward=0")


@pytest.mark.parametrize("thing", ["bert-base-uncased", None, nn.Linear(2, 2), nn.LayerNorm(4), BertModel])
def test_what_is_no_model(thing):
    for call in (lambda: swap_norm(thing, "pn"), lambda: restore_norm(thing)):
        with pytest.raises(ValueError, match="model of transformers") as caught:
            call()
        assert is_one_sentence(caught.value)


def test_restoring_what_is_not_swapped():
    model = tiny_model("bert")
    refuses(model, lambda: restore_norm(model), "swap_norm")


@pytest.mark.parametrize("reentrant", [{"use_reentrant": True}, {"preserve_rng_state": False}])
def test_rbn_with_reentrant_checkpointing(reentrant):
    """PyTorch's checkpoint is reentrant also where nothing is said of it."""
    model = tiny_model("marian")
    model.activation_checkpointing_enable(reentrant)
    refuses(model, lambda: swap_norm(model, "rbn"), "'use_reentrant': False")
    swap_norm(model, "powernorm", where="encoder")
    refuses(model, lambda: swap_norm(model, "rbn", where="decoder"), "'use_reentrant': False")

    other = swap_norm(tiny_model("marian"), "rbn")
    refuses(other, lambda: other.activation_checkpointing_enable(reentrant), "'use_reentrant': False")
    assert not other.is_activation_checkpointing
    other.activation_checkpointing_enable()
    assert other.is_activation_checkpointing


def test_a_part_that_never_runs_has_no_penalty():
    """Cross-attention without an encoder is skipped; its norms must not stand in the way of the others."""
    model = swap_norm(tiny_model("marian", "MarianForCausalLM"), "rbn")
    loss = model(**tiny_batch(model)).loss
    penalty = norm_penalty(model)
    (loss + penalty).backward()
    assert penalty > 0
    with pytest.raises(RuntimeError, match="training mode"):
        norm_penalty(model)


def test_deep_copies_are_independent():
    model = swap_norm(tiny_model("bert"), "powernorm")
    twin = copy.deepcopy(model)
    train(twin)
    assert not same(twin.state_dict(), model.state_dict())
    restore_norm(twin)
    assert {site.kind for site in find_norms(model)} == {"layernorm", "powernorm"}
    assert model.config.norm_swap is not None


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_shift_without_a_place_is_not_lost_in_silence(shift, caplog):
    model, _ = tiny_architecture("llama")
    swap_norm(model, NormSwapConfig("rmsnorm", bias=True), where="all")
    for site in find_norms(model):
        nn.init.constant_(site.module.bias, shift)
    with caplog.at_level("WARNING", logger="hf_normswap"):
        restore_norm(model)
    assert ("the shift of model.layers.0.input_layernorm" in caplog.text) is bool(shift)


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), 0.25])
def test_numbers_of_other_libraries_are_saved_as_numbers(value, tmp_path):
    """As a search over options has them."""
    model = swap_norm(tiny_model("bert"), NormSwapConfig("batchnorm", momentum=value))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {site.module.momentum for site in find_norms(again) if site.kind == "batchnorm"} == {0.25}
