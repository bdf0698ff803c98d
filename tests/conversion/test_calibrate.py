"""Calibration against what numpy finds on the activations of the finished model."""

import copy
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertTokenizer

from hf_normswap import (
    BatchNorm,
    NormSwapConfig,
    calibrate,
    find_norms,
    reestimate_statistics,
    restore_norm,
    swap_norm,
)
from hf_normswap.conversion.fitting import estimate_statistics
from hf_normswap.conversion.sequential import ActivationStore
from hf_normswap.modeling.base import BatchStatisticNorm
from hf_normswap.modeling.replace import set_layer_norm_share
from tests.helpers.calibration import WORDS, batches, distance, inputs_and_outputs, states, stock
from tests.helpers.counting import SPELLINGS
from tests.helpers.models import FAMILIES, tiny_batch


def assert_close(state, other, tolerance):
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(
            value, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_gains_and_shifts_are_those_of_numpy(family, linears):
    original = stock(family)
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
    data = batches(original)
    report = calibrate(model, data, linears=linears)
    sites = {site.name: site.module for site in find_norms(model)}
    assert {fit.name for fit in report} == set(sites)
    now = inputs_and_outputs(model, data, sites)
    before = inputs_and_outputs(original, data, sites)
    for fit in report:
        norm, (x, y), (_, wanted) = sites[fit.name], now[fit.name], before[fit.name]
        np.testing.assert_allclose(norm.running_mean, x.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(norm.running_var, x.var(0), rtol=1e-9, atol=1e-9)
        # That of GPT-2 is fitted to the predictions: tests/conversion/test_predictions.py.
        for channel in range(0 if fit.is_last else x.shape[1]):
            design = np.stack([x[:, channel], np.ones(len(x))], axis=1)
            (gain, shift), *_ = np.linalg.lstsq(design, wanted[:, channel], rcond=None)
            np.testing.assert_allclose(y[:, channel], gain * x[:, channel] + shift, rtol=1e-6, atol=1e-6)
        assert fit.tokens == len(x)
        assert fit.r2 == pytest.approx(
            1 - ((y - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum(), abs=1e-9
        )
        assert fit.error == pytest.approx(np.linalg.norm(y - wanted) / np.linalg.norm(wanted), abs=1e-9)
    untouched = {k: v for k, v in original.state_dict().items() if not any(k.startswith(name) for name in sites)}
    same = all(torch.equal(model.state_dict()[name], value) for name, value in untouched.items())
    assert same != linears


def shared(mask):
    return mask[:1]  # (1, 1, 1, T), one mask for all rows


MASKS_OF_SOURCES = {**SPELLINGS, "shared": shared, "shared additive": lambda mask: SPELLINGS["infinite"](mask[:1])}


@pytest.mark.parametrize("name", MASKS_OF_SOURCES)
@pytest.mark.parametrize("family", ["marian", "bert"])
def test_a_4_dimensional_mask_of_the_source_is_the_2_dimensional_one(family, name):
    """The keys and values of cross-attention are fitted at real tokens of the source."""
    original = stock(family, "BertLMHeadModel", add_cross_attention=True) if family == "bert" else stock(family)
    data = [tiny_batch(original, lengths=(5, 5, 5), columns=7, seed=seed) for seed in range(3)]
    argument = "attention_mask"
    if family == "bert":
        argument = "encoder_attention_mask"
        for batch in data:
            sources = tiny_batch(original, lengths=(4, 4, 4), columns=6, seed=7, labels=False)
            batch["encoder_hidden_states"] = original.get_input_embeddings()(sources["input_ids"]).detach()
            batch["encoder_attention_mask"] = sources["attention_mask"]
    other = [{**batch, argument: MASKS_OF_SOURCES[name](batch[argument].bool()[:, None, None])} for batch in data]
    of_2_dimensions, of_4 = (swap_norm(copy.deepcopy(original), "batchnorm", where="all") for _ in range(2))
    calibrate(of_2_dimensions, data)
    calibrate(of_4, other)
    assert_close(states(of_4), states(of_2_dimensions), 1e-9)


@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "pnv", "powernorm", "rmsnorm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_model_is_nearer_to_the_original(family, norm):
    original = stock(family)
    data = batches(original, rows=48)
    naive = swap_norm(copy.deepcopy(original), norm, where="all")
    plain = swap_norm(copy.deepcopy(original), norm, where="all")
    calibrate(plain, data, linears=False)
    corrected = swap_norm(copy.deepcopy(original), norm, where="all", calibrate_on=data)
    gaps = [distance(model, original, data) for model in (corrected, plain, naive)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 0.7 * gaps[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_and_division_of_the_data_and_the_padding_do_not_matter(family):
    original = stock(family)
    data = batches(original)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for batch in data for i in range(6)]
    others = [
        rows[::-1],
        batches(original, columns=12, filler=3),
        [{**batch, "attention_mask": batch["attention_mask"]} for batch in reversed(data)],
    ]
    for estimate in (calibrate, reestimate_statistics):
        results = []
        for given in (data, *others):
            model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
            estimate(model, given)
            results.append(states(model))
        for result in results[1:]:
            assert_close(result, results[0], 1e-7)


def test_pads_may_hold_anything():
    original = stock("bert")
    results = []
    for filler in (0.0, float("nan")):
        model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
        embeddings = torch.randn(4, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0], [1] * 6])
        embeddings[mask == 0] = filler
        walk_norm = find_norms(model)[0].module
        estimate_statistics(find_norms(model)[0].name, walk_norm, [(embeddings, mask.bool())])
        results.append(states(walk_norm))
    assert_close(*results, 0)


def test_a_teacher_can_be_given():
    original = stock("bert")
    data = batches(original)
    once = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=data)
    again = copy.deepcopy(once)
    with pytest.raises(ValueError, match="calibrated already.*teacher"):
        calibrate(again, data)
    given = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
    calibrate(given, data, teacher=original)
    assert_close(states(given), states(once), 1e-9)


def test_what_is_no_original_is_no_teacher():
    original = stock("bert")
    data = batches(original)
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
    for teacher in (model, stock("bert", "BertModel"), stock("roberta")):
        with pytest.raises(ValueError, match="no LayerNorm .*from before the swap"):
            calibrate(model, data, teacher=teacher)
    with pytest.raises(ValueError, match="teacher is in training mode"):
        calibrate(model, data, teacher=original.train())


def test_a_trained_model_is_not_calibrated_to_what_it_was_trained_to():
    model = swap_norm(stock("bert"), "batchnorm")
    data = batches(model)
    model.train()(**data[0])
    with pytest.raises(ValueError, match="trained.*teacher"):
        calibrate(model.eval(), data)


def test_a_mixture_with_layernorm_is_not_calibrated():
    model = swap_norm(stock("bert"), "batchnorm")
    set_layer_norm_share(model, 0.5)
    with pytest.raises(ValueError, match="finish the progressive swap"):
        calibrate(model, batches(model))


@pytest.mark.parametrize("linears", [False, True])
def test_a_block_without_swapped_norms_is_not_skipped(linears):
    original = stock("bert", num_hidden_layers=3)
    data = batches(original)
    model = swap_norm(copy.deepcopy(original), "batchnorm", filter_fn=lambda module, name: ".1." not in name)
    calibrate(model, data, linears=linears)
    norms = {site.name: site.module for site in find_norms(model) if site.kind == "batchnorm"}
    assert len(norms) == 4
    for name, (x, _) in inputs_and_outputs(model, data, norms).items():
        np.testing.assert_allclose(norms[name].running_mean, x.mean(0), rtol=1e-9, atol=1e-9)


def test_an_interruption_leaves_the_norms_in_evaluation(monkeypatch):
    model = swap_norm(stock("bert"), "batchnorm")

    def interrupt(self, x, mask):
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchNorm, "forward_train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, batches(model))
    assert not any(module.training for module in model.modules())
    assert not any(site.module.accumulating for site in find_norms(model) if site.kind == "batchnorm")


def test_two_swaps_are_calibrated_one_after_the_other():
    original = stock("bert")
    data = batches(original)
    model = swap_norm(original, "batchnorm", where="attention", calibrate_on=data)
    first = states(find_norms(model)[1].module)
    swap_norm(model, "rbn", where="ffn", calibrate_on=data)
    assert_close(states(find_norms(model)[1].module), first, 0)
    assert set(model.config.norm_swap["calibration"]) == {
        site.path for site in find_norms(model) if site.sublayer in ("attention", "ffn")
    }


def test_a_calibrated_model_is_saved_with_its_record(tmp_path):
    original = stock("bert")
    data = batches(original)
    model = swap_norm(original, "batchnorm", calibrate_on=data)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.norm_swap == model.config.norm_swap
    assert distance(again, model, data) == 0
    with pytest.raises(ValueError, match="calibrated already"):
        calibrate(again, data)


def test_group_scaling_is_off_in_a_calibrated_swap_unless_asked_for():
    data = batches(stock("bert"))

    def swapped(norm):
        return swap_norm(stock("bert"), norm, calibrate_on=data).config.norm_swap["norms"][0]["options"]

    assert swapped("powernorm")["group_scaling"] is False
    assert swapped(NormSwapConfig("powernorm", group_scaling=True))["group_scaling"] is True


def test_a_naive_swap_of_a_pretrained_model_says_what_it_costs(tmp_path, caplog):
    stock("bert").save_pretrained(tmp_path)

    def load():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)

    data = batches(stock("bert"))
    with caplog.at_level(logging.WARNING, logger="hf_normswap"):
        for norm, options in (("rmsnorm", {}), ("batchnorm", {"calibrate_on": data})):
            swap_norm(load(), norm, **options)
            assert "without calibration" not in caplog.text
        swap_norm(stock("bert"), "batchnorm")
        assert "without calibration" not in caplog.text
        swap_norm(load(), "batchnorm")
    assert "without calibration" in caplog.text


@pytest.mark.parametrize("family", ["gpt2", "marian"])
def test_the_models_own_output_stands_in_for_missing_targets(family):
    """A decoder of a translation model reads what the original model writes; others need no targets."""
    original = stock(family)
    data = batches(original)
    sources = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in data]
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=sources)
    if family == "marian":
        with_labels = []
        for batch in sources:
            length = batch["input_ids"].shape[1]
            written = original.generate(**batch, num_beams=1, do_sample=False, max_new_tokens=2 * length + 10)[:, 1:]
            labels = written.masked_fill(written == original.config.pad_token_id, -100)
            with_labels.append({**batch, "labels": labels})
    else:
        with_labels = data
    other = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=with_labels)
    assert_close(states(model), states(other), 1e-9)


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=24)


def test_kinds_of_data_are_equal(tokenizer):
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(WORDS[5 + int(n)] for n in torch.randint(len(WORDS) - 5, (3 + row % 9,), generator=generator))
        for row in range(20)
    ]
    encoded = [tokenizer(text) for text in texts]
    loader = DataLoader(encoded, batch_size=7, collate_fn=lambda rows: tokenizer.pad(rows, return_tensors="pt"))
    labelled = [{**row, "label": 1} for row in encoded]
    kinds = {
        "texts": texts,
        "generator": (text for text in texts),
        "data set of texts": Dataset.from_dict({"sentence": texts, "label": [0] * 20}),
        "data set of ids": Dataset.from_list([dict(row) for row in labelled]),
        "loader": loader,
        "batches": list(loader),
    }
    results = {}
    for kind, data in kinds.items():
        model = swap_norm(stock("bert"), "batchnorm", where="all")
        calibrate(model, data, tokenizer=tokenizer)
        results[kind] = states(model)
    for result in results.values():
        assert_close(result, results["texts"], 1e-7)

    pairs = list(zip(texts[:10], texts[10:]))
    two_columns = Dataset.from_dict({"a": texts[:10], "b": texts[10:]})
    first, second = swap_norm(stock("bert"), "batchnorm"), swap_norm(stock("bert"), "batchnorm")
    calibrate(first, pairs, tokenizer=tokenizer)
    calibrate(second, two_columns, tokenizer=tokenizer)
    assert_close(states(first), states(second), 0)


def test_what_does_not_fit_into_memory_is_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    original = stock("bert")
    data = batches(original)
    results, largest = [], []
    for budget in (2**30, 10_000, 0):
        stores = []
        init = ActivationStore.__init__

        def note(self, given, init=init, stores=stores):
            init(self, given)
            stores.append(self)

        put = ActivationStore._put
        used = []

        def watch(self, leaf, put=put, used=used):
            result = put(self, leaf)
            used.append((self.used, sum(1 for path in tmp_path.rglob("*") if path.is_file())))
            return result

        monkeypatch.setattr(ActivationStore, "__init__", note)
        monkeypatch.setattr(ActivationStore, "_put", watch)
        model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
        calibrate(model, data, memory_budget=budget)
        monkeypatch.undo()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        results.append(states(model))
        largest.append(tuple(max(column) for column in zip(*used)))
        assert max(memory for memory, _ in used) <= budget
        assert not any(tmp_path.iterdir())
    assert largest[0][1] == 0
    assert largest[1][1] > 0
    assert largest[2][1] > largest[1][1]
    assert_close(results[1], results[0], 0)
    assert_close(results[2], results[0], 0)


def test_cost_is_linear_in_depth():
    """Calls of blocks are counted: time is too noisy for a test."""

    def calls(layers):
        model = swap_norm(stock("bert", num_hidden_layers=layers), "batchnorm", where="all")
        count = 0

        def note(module, args):
            nonlocal count
            count += 1

        for block in {site.block for site in find_norms(model) if site.block}:
            model.get_submodule(block).register_forward_pre_hook(note)
        calibrate(model, batches(model))
        return count

    assert calls(24) <= 2.2 * calls(12)


def test_attention_sinks_are_counted_and_a_bad_fit_is_told(caplog):
    model = swap_norm(stock("gpt2"), "batchnorm", where="all")
    with torch.no_grad():
        model.transformer.wpe.weight[0] *= 300
        model.transformer.wte.weight *= 0.1
    data = batches(model)
    with caplog.at_level(logging.WARNING, logger="hf_normswap"):
        report = calibrate(model, data, linears=False)
    assert report[0].sinks == sum(len(batch["input_ids"]) for batch in data)
    assert "attention sinks" in caplog.text
    assert str(report).count("\n") == len(report)


def broken(model):
    with torch.no_grad():
        model.get_submodule(find_norms(model)[-1].block).apply(
            lambda module: module.weight.fill_(torch.nan) if isinstance(module, nn.Linear) else None
        )
    return model


NO_TOKENS = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}


@pytest.mark.parametrize("estimate", [calibrate, reestimate_statistics])
@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        (lambda model: model, [], "data is empty"),
        (lambda model: model, [NO_TOKENS], "no real tokens"),
        (lambda model: model.train(), None, "training mode.*eval"),
        (restore_norm, None, "no swapped norms.*swap_norm"),
        (broken, None, "layer.1.*not finite"),
        (lambda model: model, ["some text"], "tokenizer is needed"),
        (lambda model: model, "some text", "single text"),
        (lambda model: model, [{"labels": torch.zeros(2)}], "no tensor input_ids"),
        (lambda model: model, [torch.zeros(2, 3)], "yields a Tensor"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(estimate, change, data, message):
    model = change(swap_norm(stock("bert"), "batchnorm", where="all"))
    given = batches(stock("bert")) if data is None else data
    before, modules = states(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=message) as caught:
        estimate(model, given)
    assert "\n" not in str(caught.value)
    after = states(model)
    assert all(torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before)
    assert dict(model.named_modules()) == modules


def test_a_swap_whose_calibration_fails_is_undone():
    model = broken(stock("bert"))
    before, names, config = states(model), {n: type(m) for n, m in model.named_modules()}, model.config
    with pytest.raises(ValueError, match="not finite"):
        swap_norm(model, "batchnorm", where="all", calibrate_on=batches(model))
    assert {n: type(m) for n, m in model.named_modules()} == names
    assert model.config is config
    assert not hasattr(config, "norm_swap")
    assert states(model).keys() == before.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_statistics_are_those_of_evaluation():
    """Each norm's running values are the moments of its inputs, with the norms before it as they are at inference."""
    for family in FAMILIES:
        model = swap_norm(stock(family), "powernorm", where="all")
        data = batches(model)
        reestimate_statistics(model, data)
        norms = {site.name: site.module for site in find_norms(model)}
        for norm in norms.values():
            assert isinstance(norm, BatchStatisticNorm)
            norm.group_scaling = False
        reestimate_statistics(model, data)
        for name, (x, _) in inputs_and_outputs(model, data, norms).items():
            np.testing.assert_allclose(norms[name].running_power, (x**2).mean(0), rtol=1e-9, atol=1e-9)
