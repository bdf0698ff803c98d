"""Conversions in one call against what a plain loop finds on the part of the data that was held out."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import hf_normswap.convert as conversion
from hf_normswap import calibrate, convert_norms, distill, find_norms, make_batches, restore_norm, swap_norm
from hf_normswap.cli import main
from hf_normswap.core.data import split_data
from tests.helpers.architectures import tiny_architecture
from tests.helpers.calibration import batches, inputs_and_outputs, states, stock
from tests.helpers.checkpoint import TEXTS, save_stock
from tests.helpers.persistence import is_one_sentence, outputs, same


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def divergence(ours, theirs):
    """Mean of Σ p log(p / q) over rows, `p` of the original."""
    p, q = softmax(theirs), softmax(ours)
    return (p * np.log(p / q)).sum(-1).mean()


@torch.no_grad()
def real_logits(model, data, name="logits"):
    """Logits of rows, or of the tokens that the attention mask or the labels call real."""
    found = []
    for batch in data:
        logits = model(**batch)[name]
        if logits.dim() == 2:
            found.append(logits)
            continue
        real = batch["labels"] != -100 if model.config.is_encoder_decoder else batch["attention_mask"].bool()
        found += [row[keep] for row, keep in zip(logits, real)]
    return torch.cat(found).numpy()


@pytest.mark.parametrize("family", ["bert", "roberta", "marian", "gpt2"])
def test_figures_are_those_of_a_plain_computation_on_held_out_data(family):
    original = stock(family)
    model, data = copy.deepcopy(original), batches(original, rows=60, size=12)
    report = convert_norms(model, data, seed=3)

    kept, held_out = split_data(data, [0.2], seed=3)
    assert len(kept) == 4
    assert len(held_out) == 1
    expected = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=kept)
    assert same(model.state_dict(), expected.state_dict())
    assert model.config.norm_swap == expected.config.norm_swap

    ours, theirs = (real_logits(each, held_out) for each in (model, original))
    assert report.kl.value == pytest.approx(divergence(ours, theirs), rel=1e-9)
    assert report.agreement.value == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).mean())
    assert report.relative_error.value == pytest.approx(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert report.cosine is None
    assert report.examples == sum(len(batch["input_ids"]) for batch in held_out)

    names = [site.name for site in find_norms(model)]
    now, before = (
        inputs_and_outputs(each, held_out, names) for each in (copy.deepcopy(model), copy.deepcopy(original))
    )
    assert {norm.name for norm in report.norms} == set(names)
    for norm in report.norms:
        y, wanted = now[norm.name][1], before[norm.name][1]
        assert norm.tokens == len(y)
        assert norm.r2 == pytest.approx(1 - ((y - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())
        assert norm.error == pytest.approx(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
        assert norm.fitted_r2 == pytest.approx(model.config.norm_swap["calibration"][norm.name], abs=1e-6)


@torch.no_grad()
def test_a_model_without_head_is_compared_in_its_embeddings():
    original = stock("bert", "BertModel")
    model, data = copy.deepcopy(original), batches(original, rows=60, size=12)
    report = convert_norms(model, data)
    held_out = split_data(data, [0.2])[1]
    rows = []
    for each in (model, original):
        states_of = [(each(**batch).last_hidden_state, batch["attention_mask"].bool()) for batch in held_out]
        rows.append(np.stack([h[m].mean(0).numpy() for hidden, mask in states_of for h, m in zip(hidden, mask)]))
    ours, theirs = rows
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert report.cosine.value == pytest.approx(cosines.mean())
    assert report.relative_error.value == pytest.approx(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    assert report.kl is report.agreement is None


def test_spans_and_regressions():
    original = stock("bert", "BertForQuestionAnswering")
    model, data = copy.deepcopy(original), batches(original, rows=60, size=12, labels=False)
    report = convert_norms(model, data)
    expected = 0
    held_out = split_data(data, [0.2])[1]
    for batch in held_out:
        with torch.no_grad():
            ours, theirs = model(**batch), original(**batch)
        for row, real in enumerate(batch["attention_mask"].bool()):
            for name in ("start_logits", "end_logits"):
                expected += divergence(ours[name][row, real].numpy(), theirs[name][row, real].numpy())
    assert report.kl.value == pytest.approx(expected / report.examples)

    report = convert_norms(stock("bert", num_labels=1), batches(original, rows=60, size=12, labels=False))
    assert report.kl is report.agreement is report.cosine is None
    assert 0 < report.relative_error.value < 1


def test_the_interval_is_that_of_the_mean():
    """Of many examples a bootstrap of a mean is the normal interval."""
    original = stock("bert")
    data = batches(original, rows=600, size=60)
    model = copy.deepcopy(original)
    report = convert_norms(model, data, holdout=0.5)
    rows = []
    for batch in split_data(data, [0.5])[1]:
        with torch.no_grad():
            ours, theirs = (softmax(each(**batch).logits.numpy()) for each in (model, original))
        rows.append((theirs * np.log(theirs / ours)).sum(-1))
    rows = np.concatenate(rows)
    half = 1.96 * rows.std() / math.sqrt(len(rows))
    assert report.kl.low == pytest.approx(rows.mean() - half, abs=0.15 * half)
    assert report.kl.high == pytest.approx(rows.mean() + half, abs=0.15 * half)


def test_parts_are_disjoint_whole_and_the_same_each_time():
    texts = [f"text {number % 40}" for number in range(120)]
    parts = split_data(texts, [0.1, 0.1], seed=1)
    assert parts == split_data(texts, [0.1, 0.1], seed=1)
    assert parts != split_data(texts, [0.1, 0.1], seed=2)
    assert sorted(sum(parts, [])) == sorted(texts)
    assert [len(set(part)) for part in parts] == [32, 4, 4]
    assert not set(parts[0]) & set(parts[1]) | set(parts[1]) & set(parts[2]) | set(parts[0]) & set(parts[2])
    data = split_data(Dataset.from_dict({"text": texts, "label": [0] * 120}), [0.1, 0.1], seed=1)
    assert [list(part["text"]) for part in data] == parts
    pairs = split_data([["a", str(number % 3)] for number in range(9)], [0.4])
    assert [len(part) for part in pairs] == [6, 3]
    few = split_data([{"input_ids": 1}, {"input_ids": 2}, {"input_ids": 3}], [0.1, 0.8])
    assert list(map(len, few)) == [1, 1, 1]


def test_a_budget_is_kept_on_data_that_nothing_else_has_seen(monkeypatch):
    original = stock("bert")
    data = batches(original, rows=240, size=24)
    fitted, chosen, unseen = split_data(data, [0.15, 0.15], seed=0)
    full = convert_norms(copy.deepcopy(original), data, holdout=0.3)
    runs, seen = [], []

    def counted(student, data, **options):
        runs.append(len(data))
        seen.extend(id(batch["input_ids"]) for batch in data)
        return calibrate(student, data, **options)

    monkeypatch.setattr(conversion, "calibrate", counted)
    model = copy.deepcopy(original)
    report = convert_norms(model, data, budget=0.0008, holdout=0.3)
    assert len(runs) <= 5
    assert not set(seen) & {id(batch["input_ids"]) for batch in chosen + unseen}
    assert set(seen) == {id(batch["input_ids"]) for batch in fitted}

    ours, theirs = (real_logits(each, unseen) for each in (model, original))
    assert report.kl.value == pytest.approx(divergence(ours, theirs))
    assert report.kl.value <= 0.0008
    assert 0 < len(report.kept) < len(full.norms)
    converted = {norm.name for norm in report.norms}
    assert set(report.kept) | converted == set(report.damage)
    assert {site.name for site in find_norms(model) if site.kind == "batchnorm"} == converted
    assert min(report.damage[name] for name in report.kept) >= max(report.damage[name] for name in converted)
    assert "(kept)" in str(report)

    # One norm more would be too much.
    order = sorted(report.damage, key=report.damage.get)
    names = order[: len(converted) + 1]
    more = swap_norm(
        copy.deepcopy(original),
        "batchnorm",
        where="all",
        filter_fn=lambda module, name: name in names,
        calibrate_on=fitted,
    )
    measured = conversion.measure_conversion(more, original, chosen)
    assert measured.distance.high > 0.0008


def test_the_damage_of_a_norm_is_that_of_converting_it_alone():
    original = stock("gpt2")
    data = batches(original, rows=40, size=4)
    fitted, chosen, _ = split_data(data, [0.15, 0.15])
    report = convert_norms(copy.deepcopy(original), data, budget=1e3, holdout=0.3)
    assert not report.kept
    for name, damage in report.damage.items():
        alone = swap_norm(
            copy.deepcopy(original), "batchnorm", where="all", filter_fn=lambda module, n, name=name: n == name
        )
        calibrate(alone, fitted[::2], linears=False)  # three batches of six
        assert damage == pytest.approx(divergence(*(real_logits(each, chosen) for each in (alone, original))))


def test_the_learning_rate_is_the_one_that_helps_most_on_the_data_of_the_choice(monkeypatch):
    """The rates are tried for a tenth of the steps, then one of them is taken for all."""
    original, calls = stock("bert"), []
    data = batches(original, rows=120, size=12)

    def note(student, teacher, batches, **options):
        calls.append((options["steps"], options["learning_rate"]))
        return distill(student, teacher, batches, **options)

    monkeypatch.setattr(conversion, "distill", note)
    report = convert_norms(copy.deepcopy(original), data, distill_steps=15, holdout=0.4)
    trials, (steps, rate) = calls[:-1], calls[-1]
    assert trials == [(2, 1e-4), (2, 3e-4), (2, 1e-3)]
    assert steps == 15

    fitted, chosen, _ = split_data(data, [0.2, 0.2])
    student = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=fitted)
    distances = {}
    for each in (1e-4, 3e-4, 1e-3):
        trained = copy.deepcopy(student)
        distill(trained, original, fitted, steps=2, learning_rate=each)
        distances[each] = divergence(*(real_logits(model, chosen) for model in (trained, original)))
    assert rate == min(distances, key=distances.get)
    distill(student, original, fitted, steps=15, learning_rate=rate)
    after = divergence(*(real_logits(model, chosen) for model in (student, original)))
    assert report.distillation[1] == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize(("learning_rate", "helps"), [(0.3, False), (1e-3, True)])
def test_a_distillation_is_kept_only_where_it_helps(learning_rate, helps):
    original = stock("roberta")
    data = batches(original, rows=60, size=12)
    model = copy.deepcopy(original)
    report = convert_norms(model, data, distill_steps=12, learning_rate=learning_rate, holdout=0.4)
    before, after = report.distillation
    assert report.distilled == (after < before) == helps
    fitted, chosen, _ = split_data(data, [0.2, 0.2])
    plain = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=fitted)
    assert same(model.state_dict(), plain.state_dict()) != helps
    ours, theirs = (real_logits(each, chosen) for each in (model, original))
    assert divergence(ours, theirs) == pytest.approx(min(before, after))
    assert divergence(real_logits(plain, chosen), theirs) == pytest.approx(before)


def test_scores_are_those_of_the_original_and_the_converted_model():
    model = stock("bert")
    original, data = copy.deepcopy(model), batches(model, rows=60, size=12)

    def score(each):
        return {"sum": sum(each(**batch).logits.sum().item() for batch in data[:2])}

    report = convert_norms(model, data, score=score)
    assert report.scores["sum"] == (score(original)["sum"], score(model)["sum"])
    assert "sum:" in str(report)


def test_a_score_may_change_the_mode():
    model = stock("bert")
    convert_norms(model, FINE, score=lambda each: {"parameters": len(list(each.train().parameters()))})
    assert not any(module.training for module in model.modules())


def test_norms_that_the_data_does_not_reach_stay_and_are_listed():
    """A cross-attention is left out where there is no encoder."""
    model = stock("bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    report = convert_norms(model, batches(model, rows=60, size=12, labels=False))
    kinds = {site.name: site.kind for site in find_norms(model)}
    assert report.kept == [name for name in kinds if "crossattention" in name]
    assert len(report.kept) == 2
    assert all((kinds[name] == "layernorm") == (name in report.kept) for name in kinds)
    assert str(report).count("(kept)") == 2


def test_a_budget_that_other_data_exceeds_is_told(caplog, monkeypatch):
    zero = conversion.Measurement(9, {"relative_error": conversion.Estimate(0.0, 0.0, 0.0)})
    monkeypatch.setattr(conversion._Trial, "measure", lambda self, student: zero)
    with caplog.at_level(logging.WARNING, logger="hf_normswap"):
        convert_norms(stock("bert"), FINE, budget=1e-9)
    assert "above the budget of 1e-09" in caplog.text


def test_rmsnorms_become_batchnorms_with_a_shift():
    model = tiny_architecture("llama")[0]
    original = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(5, 40, (4, 8), generator=generator), "attention_mask": torch.ones(4, 8).long()}
        for _ in range(12)
    ]
    report = convert_norms(model, data)
    assert {site.kind for site in find_norms(model)} == {"batchnorm"}
    assert all(site.module.bias is not None for site in find_norms(model))
    ours, theirs = (real_logits(each, split_data(data, [0.2])[1]) for each in (model, original))
    assert report.kl.value == pytest.approx(divergence(ours, theirs), rel=1e-3)
    expected = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=split_data(data, [0.2])[0])
    assert same(model.state_dict(), expected.state_dict())


def test_the_baseline_of_a_recipe_converts_like_any_model():
    """A model swapped to `layernorm` by name computes what the original one does."""
    original = stock("bert")
    baseline = swap_norm(copy.deepcopy(original), "layernorm", where="blocks")
    model, data = copy.deepcopy(original), batches(original, rows=60, size=12)
    report = convert_norms(baseline, data)
    assert convert_norms(model, data) == report
    assert same(model.state_dict(), baseline.state_dict())
    assert baseline.config.norm_swap == model.config.norm_swap
    partly = swap_norm(copy.deepcopy(original), "layernorm")
    convert_norms(partly, data, where="ffn")
    kinds = {site.sublayer: site.kind for site in find_norms(partly)}
    assert kinds == {"embedding": "layernorm", "attention": "layernorm", "ffn": "batchnorm"}
    restore_norm(partly)
    assert {site.kind for site in find_norms(partly)} == {"layernorm"}


def test_images():
    model = tiny_architecture("vit")[0]
    generator = torch.Generator().manual_seed(0)
    size, channels = model.config.image_size, model.config.num_channels
    data = [{"pixel_values": torch.randn(4, channels, size, size, generator=generator)} for _ in range(8)]
    report = convert_norms(model, data, budget=1e3)
    assert 0 < report.kl.value < 1
    assert report.examples == 4
    data[2]["pixel_values"][0, 0, 0, 0] = torch.nan
    refuse(tiny_architecture("vit")[0], data, "pixel_values")


def test_an_encoder_decoder_without_labels_is_compared_in_its_own_text():
    model = stock("marian")
    data = [{n: v for n, v in batch.items() if n != "labels"} for batch in batches(model, rows=12, size=2)]
    report = convert_norms(model, data)
    assert report.kl.value > 0


def record(model):
    """What a conversion could change: values, modules, class, configuration and modes."""
    flags = [module.training for module in model.modules()]
    modules, parameters = [id(m) for m in model.modules()], [id(p) for p in model.parameters()]
    return states(model), (type(model), model.config.to_dict(), id(model.config), flags, modules, parameters)


def refuse(model, data, said, error=ValueError, **options):
    """The conversion ends with one sentence, and leaves the model as it was to the last bit."""
    values, rest = record(model)
    with pytest.raises(error, match=said) as caught:
        convert_norms(model, data, **options)
    assert is_one_sentence(caught.value) or error is not ValueError
    after, others = record(model)
    assert same(values, after)
    assert rest == others
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


IDS = torch.randint(5, 30, (4, 6), generator=torch.Generator().manual_seed(0))
FINE = [{"input_ids": IDS.roll(shift, 1)} for shift in range(6)]
BAD = {
    "empty": ([], "empty"),
    "one text": (["a text"], "1 different"),
    "the same text": (["a text"] * 9, "1 different"),
    "one token": ([{"input_ids": torch.tensor([[7]])}], "1 different"),
    "one token in each part": ([{"input_ids": torch.tensor([[7]])}] * 2, "no variance"),
    "no real token": ([{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}] * 3, "no real tokens"),
    "labels": ([{"labels": torch.zeros(2)}] * 5, "no tensor input_ids"),
    "another tokenizer": ([*FINE, {"input_ids": IDS + 400}], "tokenizer of the model"),
    "texts without a tokenizer": (["a text", "another", "a third"], "tokenizer"),
    "nan": ([*FINE, {"inputs_embeds": torch.full((2, 3, 16), torch.nan).double()}], "inputs_embeds"),
    "no list": ("a text", "pass a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_changes_nothing(case):
    data, said = BAD[case]
    refuse(stock("bert"), data, said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 1e-12}, "within a budget of 1e-12"),
        ({"budget": 0}, "no distance to allow"),
        ({"budget": 1.0, "holdout": 0.3, "where": "query_key"}, "matches where"),
        ({"budget": math.nan}, "no distance to allow"),
        ({"holdout": 1.0}, "not a share"),
        ({"holdout": 0}, "not a share"),
        ({"distill_steps": -1}, "no number of steps"),
        ({"norm": "layernorm"}, "nothing to fit"),
        ({"norm": "batchnorms"}, "batchnorms"),
        ({"where": "head"}, "matches where"),
        ({"score": lambda model: 0.5}, "return a dictionary"),
    ],
)
def test_bad_options_change_nothing(options, said):
    refuse(stock("bert"), FINE, said, **options)


def test_one_example_is_no_sample():
    single = [{name: values[:1] for name, values in batch.items()} for batch in FINE]
    refuse(stock("bert"), single, "One held-out example", budget=1.0)


def test_a_model_that_cannot_be_converted_stays_as_it_is():
    refuse(stock("bert").train(), FINE, "training mode")
    partly = swap_norm(stock("bert"), "batchnorm", where="ffn")
    values, kinds = states(partly), [site.kind for site in find_norms(partly)]
    for where in ("all", "attention"):
        with pytest.raises(ValueError, match="already swapped to batchnorm") as caught:
            convert_norms(partly, FINE, where=where)
        assert is_one_sentence(caught.value)
    assert same(values, states(partly))
    assert kinds == [site.kind for site in find_norms(partly)]


@pytest.mark.parametrize("step", ["calibrate", "measure_conversion", "distill", "score"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_any_step_changes_nothing(step, error, monkeypatch):
    def fail(*args, **options):
        raise error("stop")

    score = fail if step == "score" else None
    if step != "score":
        monkeypatch.setattr(conversion, step, fail)
    refuse(stock("bert"), FINE, "stop", error=error, distill_steps=2, score=score)


def test_a_score_that_fails_on_the_converted_model_changes_nothing():
    def score(model):
        if type(model).__name__.startswith("NormSwap"):
            raise RuntimeError("stop")
        return {"one": 1}

    refuse(stock("bert"), FINE, "stop", error=RuntimeError, score=score)


def test_the_picture_has_a_bar_for_each_norm(tmp_path):
    pytest.importorskip("matplotlib")
    model = stock("bert")
    report = convert_norms(model, batches(model, rows=60, size=12), budget=1e3)
    (axes,) = report.plot(tmp_path / "damage.png").axes
    assert (tmp_path / "damage.png").stat().st_size > 0
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx(sorted(report.damage.values()))
    with pytest.raises(ValueError, match="budget") as caught:
        convert_norms(stock("bert"), FINE).plot()
    assert is_one_sentence(caught.value)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return str(path)


def test_the_verb_saves_what_python_makes(tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock")
    assert main(["convert", stock, str(tmp_path / "new"), "--texts", texts, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    python = AutoModelForSequenceClassification.from_pretrained(stock)
    tokenizer = AutoTokenizer.from_pretrained(stock)
    report = convert_norms(python, Dataset.from_dict({"text": TEXTS}).shuffle(seed=0), tokenizer=tokenizer)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert same(saved.state_dict(), python.state_dict())
    assert saved.config.norm_swap == python.config.norm_swap
    assert said["kl"]["value"] == pytest.approx(report.kl.value, rel=1e-4)
    assert [norm["name"] for norm in said["norms"]] == [norm.name for norm in report.norms]
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "new"), PreTrainedTokenizerFast)


def test_the_verb_folds_within_a_budget(tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock")
    command = [
        "convert",
        stock,
        str(tmp_path / "new"),
        "--texts",
        texts,
        "--budget",
        "0.5",
        "--distill",
        "2",
        "--fold",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    for words in ("damage alone", "same prediction", "KL divergence", "distillation", "by folding", "saved in"):
        assert words in said
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert not find_norms(saved)
    original = AutoModelForSequenceClassification.from_pretrained(stock)
    ours, theirs = outputs(saved)["logits"], outputs(original)["logits"]
    assert (ours - theirs).norm() < 0.5 * theirs.norm()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "1e-12"], "within a budget"),
        (["--budget", "0"], "no distance"),
        (["--holdout", "2"], "not a share"),
        (["--int8"], "--onnx"),
        (["--untie"], "--fold"),
        (["--norm", "layernorm"], "nothing to fit"),
    ],
)
def test_the_verb_writes_nothing_on_an_error(options, said, tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock")
    assert main(["convert", stock, str(tmp_path / "new"), "--texts", texts, *options]) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert said in last
    assert is_one_sentence(last.removeprefix("error: "))
    assert not captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stock", "texts.txt"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError, 2)])
def test_an_interrupted_save_leaves_no_folder(error, code, tmp_path, texts, capsys, monkeypatch):
    stock = save_stock(tmp_path / "stock")

    def half(args, model, tokenizer, folder, data):
        model.save_pretrained(folder)
        raise error("the disk is full")

    monkeypatch.setattr("hf_normswap.cli.convert.save", half)
    assert main(["convert", stock, str(tmp_path / "new"), "--texts", texts]) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stock", "texts.txt"]
    assert not capsys.readouterr().out


def test_texts_are_read_by_the_tokenizer(tmp_path):
    """Whole texts are held out, before they are put into batches by length."""
    stock = save_stock(tmp_path / "stock")
    model = AutoModelForSequenceClassification.from_pretrained(stock)
    original, tokenizer = copy.deepcopy(model), AutoTokenizer.from_pretrained(stock)
    report = convert_norms(model, TEXTS, tokenizer=tokenizer, batch_size=4)
    held_out = make_batches(original, split_data(TEXTS, [0.2])[1], tokenizer, 4)
    ours, theirs = (real_logits(each, held_out) for each in (model, original))
    assert report.kl.value == pytest.approx(divergence(ours.astype(float), theirs.astype(float)), rel=1e-3)
    assert report.examples == len(split_data(TEXTS, [0.2])[1])
