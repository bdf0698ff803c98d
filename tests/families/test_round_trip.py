"""A swapped model is saved and loaded like any other model of transformers."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from hf_normswap import NormSwapConfig, find_norms, restore_norm, swap_norm
from tests.helpers.models import FAMILIES, USUAL_HEAD, all_heads, heads, tiny_batch, tiny_model
from tests.helpers.norms import WITHOUT_GAIN, family_is_causal, head_is_causal, norms_in
from tests.helpers.persistence import clone, edit_config, is_one_sentence, outputs, same, train


NUMBER_OF_HEADS = {"bert": 9, "roberta": 7, "marian": 3, "gpt2": 6}
AUTO_CLASSES = {
    "Model": "AutoModel",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "MTModel": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "DoubleHeadsModel": None,  # transformers has no Auto class for it
}
PREFIX = {"bert": "Bert", "roberta": "Roberta", "marian": "Marian", "gpt2": "GPT2"}
# What a norm's buffers are before any batch, by the definition of each statistic.
FRESH = {
    "running_mean": 0.0,
    "running_var": 1.0,
    "running_power": 1.0,
    "nu": 0.0,
    "num_batches_tracked": 0,
    "pending": 0.0,
    "pending_gradient": 0.0,
    "loss_scale": 1.0,
    "largest_gamma": 0.0,
    "weight": 1.0,  # of a norm without a gain
    "power_window": 0.0,
    "gradient_window": 0.0,
    "gradient_mean": 0.0,
}
SAVED = ("running_mean", "running_var", "running_power", "nu", "num_batches_tracked")
SAVED += ("power_window", "gradient_window", "gradient_mean")
# Pairs that share a parameter in each usual head.
TIES = {
    "bert": ("BertForMaskedLM", "bert.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
    "roberta": ("RobertaForMaskedLM", "roberta.embeddings.word_embeddings.weight", ["lm_head.decoder.weight"]),
    "marian": (
        "MarianMTModel",
        "model.shared.weight",
        ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"],
    ),
    "gpt2": ("GPT2LMHeadModel", "transformer.wte.weight", ["lm_head.weight"]),
}


def auto_class(family, head):
    name = AUTO_CLASSES[head.removeprefix(PREFIX[family])]
    return getattr(transformers, name) if name else None


def statistics(model):
    """The running values of a model, those that are saved."""
    named = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[2] in SAVED}
    return clone((name, value) for name, value in named.items() if value.is_floating_point())


def mixed(family, head=None):
    """A trained model with norms of two kinds, swapped one after the other: every sort of buffer is in it."""
    model = swap_norm(tiny_model(family, head), "powernorm", where="attention")
    return train(swap_norm(model, "rbn", where=["ffn", "cross_attention", "embedding", "head", "final"]))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """Family, a trained model, its folder, and what it returned; tests leave all of them as they are."""
    model = mixed(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    return request.param, model, folder, outputs(model)


def load(family, folder, head=None, **options):
    return auto_class(family, head or USUAL_HEAD[family]).from_pretrained(folder, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_of_transformers_is_covered(family):
    assert len(heads(family)) == NUMBER_OF_HEADS[family]


@pytest.mark.parametrize(("place", "norm"), norms_in(all_heads(), head_is_causal))
def test_a_saved_model_loads_as_it_was(place, norm, tmp_path):
    family, head = place
    model = swap_norm(tiny_model(family, head), norm, where="all")
    names = [site.name for site in find_norms(model)]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    for site in find_norms(model):
        # The decoder alone is given no encoder states: its cross-attention does not run.
        if site.sublayer != "cross_attention" or head != "MarianForCausalLM":
            # A threshold of 0 has no gradient where the loss is the square of what it lets through.
            trained = [name for name, _ in site.module.named_parameters() if name not in ("bias", "threshold")]
            assert {f"{site.name}.{name}" for name in trained} <= moved
            assert {f"{site.name}.{name}" for name, _ in site.module.named_buffers() if name in SAVED} <= moved
    expected = outputs(model)

    model.save_pretrained(tmp_path)
    auto = auto_class(family, head) or type(model)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)

    assert type(loaded) is type(model)
    assert type(loaded).__name__ == f"NormSwap{head}"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert [(site.name, site.kind) for site in find_norms(loaded)] == [(name, norm) for name in names]
    assert same(outputs(loaded), expected)
    assert same(loaded.state_dict(), model.state_dict())
    for name, buffer in loaded.named_buffers():
        kind = name.rpartition(".")[2]
        if kind in FRESH and kind not in SAVED:
            assert (buffer == FRESH[kind]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_folder_is_opened_swapped_and_saved(family, tmp_path):
    """The usual way in: a configuration read from a file has its model type as a value of its own."""
    tiny_model(family).save_pretrained(tmp_path / "stock")
    model = train(swap_norm(load(family, tmp_path / "stock"), "powernorm"))
    assert model.config.model_type == f"normswap_{family}"
    model.save_pretrained(tmp_path / "swapped")
    loaded = load(family, tmp_path / "swapped")
    assert type(loaded) is type(model)
    assert same(outputs(loaded), outputs(model))
    restore_norm(loaded).save_pretrained(tmp_path / "restored")
    assert loaded.config.model_type == family
    assert type(load(family, tmp_path / "restored")) is getattr(transformers, USUAL_HEAD[family])


def test_a_loaded_model_trains_as_the_saved_one_does(saved):
    family, model, folder, _ = saved
    first, second = train(copy.deepcopy(model)), train(load(family, folder))
    assert not same(statistics(first), statistics(model))
    assert same(first.state_dict(), second.state_dict())


def test_shards(saved, tmp_path):
    family, model, _, expected = saved
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = load(family, tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(outputs(loaded), expected)


def test_bfloat16_leaves_statistics_in_float32(saved, tmp_path):
    family, model, folder, _ = saved
    loaded = load(family, folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in statistics(loaded).values()} == {torch.float32}
    assert same(statistics(loaded), statistics(model))

    loaded.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(torch.equal(stored[name], value) for name, value in statistics(model).items())
    again = load(family, tmp_path, dtype="auto")
    assert again.dtype is torch.bfloat16
    assert same(statistics(again), statistics(model))
    assert same(outputs(again), outputs(loaded))


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casts_leave_statistics_in_float32(saved, cast):
    _, model, _, _ = saved
    cast_model = getattr(copy.deepcopy(model), cast)()
    assert {parameter.dtype for parameter in cast_model.parameters()} == {
        getattr(torch, cast.replace("half", "float16"))
    }
    assert same(statistics(cast_model), statistics(model))
    assert same(statistics(cast_model.float()), statistics(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights_stay_tied(family, tmp_path):
    head, source, others = TIES[family]
    model = tiny_model(family, head)
    parameter = model.get_parameter(source)
    mixed_model = train(swap_norm(model, "powernorm", where="all"))
    mixed_model.save_pretrained(tmp_path)
    for each in (mixed_model, load(family, tmp_path, head), copy.deepcopy(mixed_model)):
        assert all(each.get_parameter(other) is each.get_parameter(source) for other in others)
    assert mixed_model.get_parameter(source) is parameter


def test_copies(saved, tmp_path):
    family, _, folder, _ = saved
    model = load(family, folder).train()
    model(**tiny_batch(model))  # leaves statistics that hang on a graph
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = outputs(model)
    for loaded in (*copies, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(loaded) is type(model)
        assert loaded.config.to_dict() == model.config.to_dict()
        assert same(outputs(loaded), expected)
        assert not {id(p) for p in loaded.parameters()} & {id(p) for p in model.parameters()}


def test_device_map(saved):
    family, _, folder, expected = saved
    assert same(outputs(load(family, folder, device_map="cpu")), expected)


def test_from_config(saved):
    family, model, _, _ = saved
    made = auto_class(family, USUAL_HEAD[family]).from_config(model.config)
    assert type(made) is type(model)
    assert [(s.name, s.kind) for s in find_norms(made)] == [(s.name, s.kind) for s in find_norms(model)]
    assert_fresh(made)
    made.load_state_dict(model.state_dict())
    assert same(outputs(made), outputs(model))


def test_meta_device_and_assignment(saved):
    _, model, _, expected = saved
    with torch.device("meta"):
        made = type(model)(model.config)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert made.load_state_dict(model.state_dict(), assign=True) == ([], [])
    made.tie_weights()
    for name, buffer in made.named_buffers():
        if buffer.is_meta:  # not saved: transformers' own position ids
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, model.get_buffer(name))
    assert same(outputs(made), expected)


def assert_fresh(model):
    for site in find_norms(model):
        for name, buffer in site.module.named_buffers():
            assert (buffer == FRESH[name]).all(), f"{site.name}.{name}"


@pytest.fixture
def poisoned_memory():
    """Fills what nobody initialises with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("family", "norm"), norms_in(list(FAMILIES), family_is_causal))
def test_a_layernorm_checkpoint_in_a_swapped_class(family, norm, tmp_path):
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path)
    swapped = swap_norm(copy.deepcopy(stock), norm, where="all")
    loaded, info = type(swapped).from_pretrained(tmp_path, config=swapped.config, output_loading_info=True)
    own, theirs = swapped.state_dict().keys(), stock.state_dict().keys()
    assert {n for n in own if n.rpartition(".")[2] in SAVED} <= own - theirs == set(info["missing_keys"])
    assert set(info["unexpected_keys"]) == theirs - own
    assert bool(theirs - own) == (norm in WITHOUT_GAIN)
    assert_fresh(loaded)
    kept = own & theirs
    assert same(*({n: p for n, p in each.named_parameters() if n in kept} for each in (loaded, stock)))
    assert same(loaded.state_dict(), swapped.state_dict())
    assert loaded.config.model_type == f"normswap_{family}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layernorm_checkpoint_opened_as_a_swapped_one(family, tmp_path):
    """Its config.json says another model type, which must not be what is saved again."""
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path / "stock")
    swapped = swap_norm(copy.deepcopy(stock), "powernorm")
    opened = type(swapped).from_pretrained(tmp_path / "stock", norm_swap=swapped.config.norm_swap)
    assert opened.config.model_type == f"normswap_{family}"
    opened.save_pretrained(tmp_path / "swapped")
    loaded = load(family, tmp_path / "swapped")
    assert type(loaded) is type(swapped)
    assert same(outputs(loaded), outputs(swapped))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_swaps_on_parts_of_a_model(family, tmp_path):
    """Different norms, one after the other, where filter_fn tells the two parts from each other."""
    first = {"marian": "encoder"}.get(family, "blocks")
    model = tiny_model(family)
    swap_norm(model, NormSwapConfig("pn", group_scaling=False), where=first, filter_fn=lambda _, name: "1" not in name)
    swap_norm(model, NormSwapConfig("rbn", momentum=0.3), filter_fn=lambda _, name: "1" in name or "decoder" in name)
    train(model).save_pretrained(tmp_path)
    loaded = load(family, tmp_path)
    assert same(outputs(loaded), outputs(model))
    kinds = {site.name: site.kind for site in find_norms(loaded)}
    assert kinds == {site.name: site.kind for site in find_norms(model)}
    assert {"powernorm", "rbn"} <= set(kinds.values())
    for site in find_norms(loaded):
        if site.kind == "powernorm":
            assert not site.module.group_scaling
        if site.kind == "rbn":
            assert site.module.momentum == 0.3


@pytest.mark.parametrize("head", ["BertModel", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_language_model_opens_with_another_head(head, tmp_path):
    model = mixed("bert", "BertForMaskedLM")
    model.save_pretrained(tmp_path / "language")
    opened = load("bert", tmp_path / "language", head)
    assert type(opened).__name__ == f"NormSwap{head}"
    body = {n.removeprefix("bert."): v for n, v in model.state_dict().items() if n.startswith("bert.")}
    opened_body = opened.base_model.state_dict()
    assert all(torch.equal(opened_body[name], value) for name, value in body.items())
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert torch.equal(
        outputs(opened.base_model, batch)["last_hidden_state"], outputs(model.base_model, batch)["last_hidden_state"]
    )

    opened.save_pretrained(tmp_path / "other")
    back = load("bert", tmp_path / "other", "BertForMaskedLM")
    assert [(s.name, s.kind) for s in find_norms(back)] == [(s.name, s.kind) for s in find_norms(model)]
    assert all(torch.equal(back.bert.state_dict()[name], value) for name, value in body.items())
    head_norm = back.cls.predictions.transform.LayerNorm
    assert all((buffer == FRESH[name]).all() for name, buffer in head_norm.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_opens_with_a_head(family, tmp_path):
    head = USUAL_HEAD[family]
    base = mixed(family, PREFIX[family] + "Model")
    base.save_pretrained(tmp_path)
    opened, info = load(family, tmp_path, output_loading_info=True)
    assert type(opened).__name__ == f"NormSwap{head}"
    # A language model has no pooler, and a base model has no language model head.
    assert all(name.startswith("pooler.") for name in info["unexpected_keys"])
    assert not [name for name in info["missing_keys"] if name.startswith(opened.base_model_prefix + ".")]
    body = opened.base_model.state_dict()
    assert same(body, {name: base.state_dict()[name] for name in body})


def test_a_translation_model_opens_as_a_language_model(tmp_path):
    """What the decoder alone misses is what it misses in transformers: the tied embedding is saved as `shared`."""
    tiny_model("marian").save_pretrained(tmp_path / "stock")
    _, expected = load("marian", tmp_path / "stock", "MarianForCausalLM", output_loading_info=True)
    model = mixed("marian")
    model.save_pretrained(tmp_path / "swapped")
    opened, info = load("marian", tmp_path / "swapped", "MarianForCausalLM", output_loading_info=True)
    assert type(opened).__name__ == "NormSwapMarianForCausalLM"
    assert set(info["missing_keys"]) == set(expected["missing_keys"])
    layers = {name: value for name, value in opened.state_dict().items() if ".layers." in name}
    assert any("running" in name for name in layers)
    assert same(layers, {name: model.state_dict()[name] for name in layers})
    assert same(opened.state_dict() | layers, opened.state_dict())


def test_fewer_attention_heads_keep_the_recorded_groups(tmp_path):
    model = train(swap_norm(tiny_model("bert"), "powernorm"))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(num_attention_heads=2))
    loaded = load("bert", tmp_path)
    assert {s.module.num_groups for s in find_norms(loaded) if s.kind == "powernorm"} == {4}
    assert same(loaded.state_dict(), model.state_dict())


def test_fewer_layers_are_refused(saved):
    family, _, folder, _ = saved
    field = {"marian": "encoder_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    with pytest.raises(ValueError, match="number of layers") as caught:
        load(family, folder, **{field: 1})
    assert is_one_sentence(caught.value)


def test_the_stock_class_refuses_a_swapped_folder(saved):
    family, _, folder, _ = saved
    with pytest.raises(ValueError, match="hf_normswap"):
        getattr(transformers, USUAL_HEAD[family]).from_pretrained(folder)


@pytest.mark.parametrize("keep", [0.5, 0.01, 0.0])
def test_damaged_weights_are_named(saved, keep, tmp_path):
    family, model, _, _ = saved
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(OSError, match="damaged") as caught:
        load(family, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert is_one_sentence(caught.value)


def test_a_restored_model_is_saved_as_stock(saved, tmp_path):
    family, model, _, _ = saved
    restored = restore_norm(copy.deepcopy(model))
    restored.save_pretrained(tmp_path)
    stock = json.loads(tiny_model(family).config.to_json_string(use_diff=False))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == [USUAL_HEAD[family]]
    assert content["model_type"] == family
    assert content.keys() <= stock.keys()
    assert not list(tmp_path.glob("*.py"))
    loaded, info = load(family, tmp_path, output_loading_info=True)
    assert type(loaded) is getattr(transformers, USUAL_HEAD[family])
    assert {type(site.module) for site in find_norms(loaded)} == {nn.LayerNorm}
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(outputs(loaded), outputs(restored))
