"""Folding: the same outputs without norms, for every family, head and norm; saved, loaded, refused."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_normswap import (
    Affine,
    Norm,
    NormSwapConfig,
    calibrate,
    convert_to_rmsnorm,
    distill,
    find_norms,
    fold_norms,
    reestimate_statistics,
    restore_norm,
    swap_norm,
)
from hf_normswap.fusion.equivalence import compare_outputs
from hf_normswap.modeling.replace import set_layer_norm_share
from tests.helpers.folding import norms_in, relative_error, swapped
from tests.helpers.models import FAMILIES, all_heads, tiny_batch, tiny_model
from tests.helpers.persistence import edit_config, is_one_sentence, outputs, run_fresh, same, train


NORMS = ["batchnorm", "rbn", "pnv", NormSwapConfig("powernorm", group_scaling=False), "affine"]
LANGUAGE_MODELS = [("bert", "BertForMaskedLM"), ("roberta", None), ("marian", None), ("gpt2", None)]


def assert_same(model, loaded):
    """Bit for bit the same weights; the outputs are those of other memory addresses, which a CPU rounds otherwise."""
    assert same(model.state_dict(), loaded.state_dict())
    assert relative_error(outputs(model), outputs(loaded)) < 1e-14


def fold_if_possible(model):
    """The report, or `None` where every norm has to stay."""
    try:
        return fold_norms(model, untie=True)
    except ValueError as error:
        if "No norm can be folded" not in str(error):
            raise
        return None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: NormSwapConfig.of(norm).norm)
@pytest.mark.parametrize(("family", "head"), all_heads())
def test_outputs_stay(family, head, norm, dtype, tolerance):
    model = swapped(family, head, norm, dtype=dtype)
    before, sites = outputs(model), find_norms(model)
    report = fold_norms(model, untie=True)
    assert relative_error(before, outputs(model)) < tolerance
    assert report.error < tolerance
    assert norms_in(model) == list(report.kept)
    assert set(report.folded) | set(report.kept) == {site.name for site in sites}
    if head == "MarianForCausalLM":
        assert all("cross" in name or "encoder_attn" in name for name in report.kept)
    elif model.base_model is model:
        assert set(report.kept.values()) == {"hidden states leave the model here"}
        assert len(report.kept) == (2 if family == "marian" else 1)
    else:
        assert not report.kept


@pytest.mark.parametrize(("family", "head"), LANGUAGE_MODELS)
def test_one_affine_stays_before_a_tied_head(family, head):
    model = swapped(family, head)
    before = outputs(model)
    report = fold_norms(model)
    assert relative_error(before, outputs(model)) < 1e-12
    ((name, reason),) = report.kept.items()
    assert "shares its weights with the embeddings" in reason
    assert isinstance(model.get_submodule(name), Affine)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert reason in str(report)
    assert name in str(report)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize(("family", "head"), [*LANGUAGE_MODELS, ("bert", "BertForSequenceClassification")])
def test_a_folded_model_is_saved_and_loaded(family, head, untie, tmp_path):
    model = train(swapped(family, head))
    fold_norms(model, untie=untie)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert_same(model, loaded)
    assert norms_in(loaded) == norms_in(model)
    assert len({id(parameter) for parameter in loaded.parameters()}) == len(set(model.parameters()))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert_same(model, type(model).from_pretrained(again, dtype=torch.float64))


def test_plain_auto_classes_load_it_with_any_head(tmp_path):
    model = swapped("gpt2")
    fold_norms(model, untie=True)
    model.save_pretrained(tmp_path)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert norms_in(classifier) == []
    assert classifier.score.bias is None


@pytest.mark.parametrize("family", ["marian", "gpt2"])
@pytest.mark.parametrize("untie", [False, True])
def test_greedy_generation_is_the_same(family, untie):
    model = swapped(family)
    inputs = tiny_batch(model, lengths=(6, 6), labels=False)
    inputs.pop("decoder_input_ids", None)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    fold_norms(model, untie=untie)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["blocks", "attention", "ffn", "decoder", "embedding", "head", "final"])
def test_what_was_not_swapped_stays(family, where):
    try:
        model = swapped(family, where=where)
    except ValueError:
        pytest.skip(f"{family} has no such norm")
    before = outputs(model)
    stock = {site.name for site in find_norms(model) if not isinstance(site.module, Norm)}
    report = fold_if_possible(model)
    if report is None:  # each one stands between two LayerNorms
        assert where in ("attention", "ffn", "embedding")
        return
    assert relative_error(before, outputs(model)) < 1e-12
    assert {name for name, reason in report.kept.items() if reason == "it was not swapped"} == stock
    for name in stock:
        assert isinstance(model.get_submodule(name), nn.LayerNorm)


def test_twelve_layers_with_gains_of_zero():
    """A channel of gain 0 cannot be divided by: an affine stays there, and everything else goes."""
    model = swapped("bert", num_hidden_layers=12)
    zero = {"bert.encoder.layer.3.output.LayerNorm", "bert.encoder.layer.8.attention.output.LayerNorm"}
    for name in zero:
        model.get_submodule(name).weight.data[[2, 5]] = 0
    model.bert.embeddings.LayerNorm.weight.data[3] = 0  # goes into the tables, gain 0 or not
    model.bert.encoder.layer[11].output.LayerNorm.weight.data[1] = 0  # the pooler reads it, whatever it is
    last = "bert.encoder.layer.11.output.LayerNorm"
    before = outputs(model)
    report = fold_norms(model)
    assert relative_error(before, outputs(model)) < 1e-12
    assert set(report.kept) - {last} == zero
    assert report.kept[min(zero)] == "2 of its gains are 0"


@pytest.mark.parametrize("family", ["bert", "marian"])
def test_affines_keep_the_stream_in_range(family):
    """Gains of 1e-3 make A 1e-72 after 24 norms, beyond float32; some affines stay, at most one in ten norms."""
    layers = {"num_hidden_layers": 12} if family == "bert" else {"encoder_layers": 12, "decoder_layers": 8}
    model = swapped(family, dtype=torch.float32, **layers)
    for site in find_norms(model):
        site.module.weight.data *= 1e-3
    before = outputs(model)
    report = fold_norms(model, untie=True, dtype=torch.float32)
    assert relative_error(before, outputs(model)) < 1e-5
    assert report.float16_error is None
    assert 1 <= len(report.kept) <= 5
    assert set(report.kept.values()) == {"the stream would leave the range of float32 without it"}


def spread_stream(family, layers):
    """A calibrated model, some channels of whose stream are 8 times as large as the others."""
    model = tiny_model(family, **layers).double().eval()
    for index, norm in enumerate(module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.weight.data[[3, 5 + index % 2]] *= 8
    batches = [tiny_batch(model, lengths=(9, 8), labels=False, seed=seed) for seed in range(8)]
    return swap_norm(model, "batchnorm", where="all", calibrate_on=batches), batches


def ranges_of_inputs(model, batches):
    """Largest value over the median one, of the channels that come to each linear layer of a block; the mean."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("query", "q_proj", "intermediate.dense", "fc1")):

            def note(module, args, name=name):
                found.setdefault(name, []).append(args[0].detach().flatten(0, -2).abs().amax(0))

            module.register_forward_pre_hook(note)
    for batch in batches:
        outputs(model, batch)
    sizes = [torch.stack(values).amax(0) for values in found.values()]
    return torch.stack([size.max() / size.median() for size in sizes]).mean().item()


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("bert", {"num_hidden_layers": 4}),
        ("roberta", {"num_hidden_layers": 4}),
        ("marian", {"encoder_layers": 4, "decoder_layers": 1}),
    ],
)
def test_the_channels_of_a_folded_stream_are_even(family, layers):
    model, batches = spread_stream(family, layers)
    before, uneven = outputs(model, batches[0]), ranges_of_inputs(copy.deepcopy(model), batches)
    report = fold_norms(model, dtype=torch.float32, affine_every=2)
    assert relative_error(before, outputs(model, batches[0])) < 1e-11
    assert any(reason.startswith("one norm in 2 evens out") for reason in report.kept.values())
    assert ranges_of_inputs(model, batches) < 0.5 * uneven


@pytest.mark.parametrize(("every", "kept"), [(1, 8), (2, 4), (3, 2), (4, 2), (9, 0), (None, 0)])
def test_one_norm_in_so_many_stays(every, kept):
    """Of the eight norms of four blocks, behind that of the embeddings; the pooler reads the last."""
    model, batches = spread_stream("bert", {"num_hidden_layers": 4})
    before = outputs(model, batches[0])
    report = fold_norms(model, dtype=torch.float32, affine_every=every)
    assert len(report.kept) == kept
    assert relative_error(before, outputs(model, batches[0])) < 1e-11
    if kept:
        (saved,) = model.config.norm_swap["norms"]
        assert len(saved["modules"]) == kept


def test_no_norm_in_zero_can_stay():
    model = swapped("bert")
    with pytest.raises(ValueError, match="pass a positive affine_every"):
        fold_norms(model, affine_every=0)


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "BertLMHeadModel"), ("marian", "MarianForCausalLM"), ("gpt2", "GPT2LMHeadModel")]
)
@pytest.mark.parametrize("where", ["all", "cross_attention", "attention"])
def test_a_decoder_with_cross_attention_and_without(family, head, where):
    """It is the same model with the output of an encoder and without one, which leaves out a sublayer and its norm."""
    options = {} if family == "marian" else {"add_cross_attention": True}
    model = swapped(family, head, where=where, **options)
    alone = tiny_batch(model, labels=False)
    states = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = [alone, {**alone, "encoder_hidden_states": states}]
    before = [outputs(model, batch) for batch in given]
    report = fold_if_possible(model)
    if where == "all":
        assert len(report.kept) == (0 if family == "gpt2" else 2)
    for batch, output in zip(given, before, strict=True):
        assert relative_error(output, outputs(model, batch)) < 1e-12


def test_without_biases_in_norms():
    model = swapped("bert", norm=NormSwapConfig("batchnorm", bias=False))
    before = outputs(model)
    fold_norms(model)
    assert relative_error(before, outputs(model)) < 1e-12


def blend(model):
    set_layer_norm_share(model, {site.path: 0.5 for site in find_norms(model)})


def overflow(model):
    """Finite in float16 as it is: large weights between small inputs and a small gain."""
    model.half().bert.pooler.dense.weight.data.fill_(3e4)
    model.bert.encoder.layer[1].output.LayerNorm.running_var.fill_(0.01)


def poison(model):
    model.bert.encoder.layer[0].output.LayerNorm.running_var.fill_(torch.inf)
    model.bert.encoder.layer[0].output.LayerNorm.weight.data.fill_(torch.inf)


def put_aside(model):
    output = model.bert.encoder.layer[0].output
    output.spare, output.LayerNorm = output.LayerNorm, nn.LayerNorm(16, dtype=torch.float64)
    model.eval()


@pytest.mark.parametrize(
    ("norm", "change", "message"),
    [
        ("batchnorm", lambda model: model.train(), "training mode"),
        ("powernorm", lambda model: None, "group_scaling=False"),
        ("rmsnorm", lambda model: None, "needs statistics of each token"),
        ("layernorm", lambda model: None, "needs statistics of each token"),
        (NormSwapConfig("rbn", center_tokens=True), lambda model: None, "without center_tokens"),
        ("batchnorm", overflow, "range of float16"),
        ("batchnorm", poison, "not finite"),
        ("batchnorm", put_aside, "does not call the norm"),
        ("batchnorm", lambda model: find_norms(model)[1].module.register_forward_hook(print), "hooks"),
        ("batchnorm", lambda model: model.bert.encoder.layer[1].output.dense.register_forward_hook(print), "hooks"),
        ("batchnorm", lambda model: blend(model), "LayerNorm still has a share"),
        ("batchnorm", lambda model: fold_norms(model), "folded away"),
        ("batchnorm", lambda model: restore_norm(model), "no swapped norms"),
    ],
)
def test_refused_and_untouched(norm, change, message, capsys):
    model = swapped("bert", norm=norm, dtype=torch.float32)
    change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, config = [name for name, _ in model.named_modules()], copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=message) as error:
        fold_norms(model)
    assert is_one_sentence(error.value)
    assert [name for name, _ in model.named_modules()] == modules
    assert same(model.state_dict(), before)
    assert model.config.to_dict() == config.to_dict()


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = swapped("bert", dtype=torch.float32)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    with pytest.raises(ValueError, match="merge adapters"):
        fold_norms(model.eval())


def test_a_fold_that_would_change_the_outputs_is_refused(monkeypatch):
    monkeypatch.setattr("hf_normswap.fusion.fold._Plan._scale_outputs", lambda *args: None)  # an error in the algebra
    model = swapped("bert", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="outputs would change"):
        fold_norms(model)
    assert same(model.state_dict(), before)


def test_folded_norms_cannot_be_restored():
    model = swapped("bert")
    fold_norms(model)
    with pytest.raises(ValueError, match="folded away: load it"):
        restore_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_after_training(family):
    model = train(swapped(family))
    before = outputs(model)
    fold_norms(model, untie=True)
    assert relative_error(before, outputs(model)) < 1e-12


def test_it_loads_where_the_package_is_missing(tmp_path):
    """From the code beside the weights."""
    for family, auto in {"bert": "AutoModelForSequenceClassification", "gpt2": "AutoModelForCausalLM"}.items():
        model = swapped(family)
        fold_norms(model, untie=True)
        model.save_pretrained(tmp_path / family)
        batch = tiny_batch(model, labels=False)
        torch.save((auto, batch, outputs(model, batch)["logits"]), tmp_path / family / "expected.pt")
    script = """
import sys
from pathlib import Path

import torch
import transformers

for folder in map(Path, sys.argv[1:]):
    auto, batch, expected = torch.load(folder / "expected.pt")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-10, atol=1e-12)
    assert "hf_normswap" not in sys.modules
    assert not any("norm" in name.lower() or "ln_" in name for name, _ in model.named_modules())
"""
    run_fresh(script, tmp_path, tmp_path / "bert", tmp_path / "gpt2", package=False)


def test_nothing_else_takes_a_folded_model():
    model = swapped("gpt2")
    fold_norms(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [tiny_batch(model, labels=False)]
    for change in (
        lambda: calibrate(model, data),
        lambda: distill(model, tiny_model("gpt2").double().eval(), data),
        lambda: reestimate_statistics(model, data),
        lambda: swap_norm(model, "rbn"),
        lambda: restore_norm(model),
        lambda: set_layer_norm_share(model, 1.0),
        lambda: convert_to_rmsnorm(model, untie=True),
    ):
        with pytest.raises(ValueError, match="folded away|no swapped norms|swapped already"):
            change()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("family", ["marian", "gpt2", "bert"])
def test_the_vocabulary_of_an_untied_model(family):
    model = swapped(family, "BertForMaskedLM" if family == "bert" else None)
    fold_norms(model, untie=True)
    if family == "marian":
        with pytest.raises(ValueError, match="resize it before"):
            model.resize_token_embeddings(50)
    else:
        model.resize_token_embeddings(50)
        assert outputs(model)["logits"].shape[-1] == 50


def test_embeddings_of_a_marian_that_are_not_shared():
    vocabulary = {"decoder_vocab_size": 30, "pad_token_id": 29, "decoder_start_token_id": 29}
    model = swapped("marian", share_encoder_decoder_embeddings=False, **vocabulary)
    ids = torch.randint(29, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    before = outputs(model, batch)
    report = fold_norms(model)
    assert "lm_head shares its weights with the embeddings" in report.kept.values()
    assert relative_error(before, outputs(model, batch)) < 1e-12


def test_hidden_states_of_a_model_folded_with_a_head(tmp_path, caplog):
    """Loaded without it they mean something else, and a warning says so."""
    model = swapped("bert")
    fold_norms(model)
    model.save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = logging.getLogger("hf_normswap").propagate = True
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert "coordinates of their own" not in caplog.text
    AutoModel.from_pretrained(tmp_path)
    assert "coordinates of their own" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["norm_swap"]["folded"].append("bert.nonsense"), "no norm of this family"),
        (lambda config: config.update(num_hidden_layers=1), "number of layers"),
    ],
)
def test_a_configuration_that_lists_something_else_is_refused(change, message, tmp_path):
    model = swapped("bert")
    fold_norms(model)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_head_of_zeros_and_tuples_as_outputs():
    model = swapped("bert")
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    model.config.return_dict = False
    assert fold_norms(model).error == 0


def test_nan_is_never_close():
    model = swapped("bert", "BertForPreTraining")
    other = copy.deepcopy(model)
    other.cls.seq_relationship.bias.data[0] = torch.nan
    assert math.isnan(compare_outputs(model, other))


def test_a_frozen_model_stays_frozen():
    model = swapped("gpt2").requires_grad_(False)
    fold_norms(model, untie=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_head_is_untied_only_where_that_helps():
    model = swapped("gpt2", where="blocks")
    report = fold_norms(model, untie=True)
    assert report.kept == {"transformer.ln_f": "it was not swapped"}
    assert model.lm_head.weight is model.transformer.wte.weight
