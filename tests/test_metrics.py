"""The metrics against values worked out by hand, against closed forms, and as `evaluate` calls them."""

import math
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_normswap import metrics
from hf_normswap.metrics import GlueMetric, SacrebleuMetric, SeqevalMetric


CLASSIFICATION = ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


# 3 true positives, 1 false positive, 1 false negative, 1 true negative
PREDICTIONS, REFERENCES = [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("cola", {"matthews_correlation": (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2)}),
        ("sst2", {"accuracy": 4 / 6}),
        ("mrpc", {"accuracy": 4 / 6, "f1": 2 * 3 / (2 * 3 + 1 + 1)}),
        ("qqp", {"accuracy": 4 / 6, "f1": 2 * 3 / (2 * 3 + 1 + 1)}),
        ("mnli", {"accuracy": 4 / 6}),
        ("mnli_matched", {"accuracy": 4 / 6}),
        ("mnli_mismatched", {"accuracy": 4 / 6}),
        ("qnli", {"accuracy": 4 / 6}),
        ("rte", {"accuracy": 4 / 6}),
        ("wnli", {"accuracy": 4 / 6}),
    ],
)
def test_glue_classification(task, expected):
    assert GlueMetric(task).compute(predictions=PREDICTIONS, references=REFERENCES) == pytest.approx(expected)


def test_glue_similarity():
    # Deviations from the means are (-1, 0, 1) and (-2, 1, 1); ranks are (1, 2, 3) and (1, 2.5, 2.5).
    scores = GlueMetric("stsb").compute(predictions=[1, 2, 3], references=[0, 3, 3])
    assert scores == pytest.approx({"pearson": 3 / math.sqrt(2 * 6), "spearmanr": 1.5 / math.sqrt(2 * 1.5)})


@given(
    pairs=st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=2, max_size=20),
    scale=st.integers(1, 9),
    shift=st.integers(-9, 9),
)
@settings(max_examples=25, deadline=None)
def test_similarity_ignores_scale_and_shift_and_is_never_nan(pairs, scale, shift):
    predictions, references = zip(*pairs)
    scores = GlueMetric("stsb").compute(predictions=predictions, references=references)
    moved = GlueMetric("stsb").compute(predictions=[scale * p + shift for p in predictions], references=references)
    assert moved == pytest.approx(scores)
    assert all(-1 - 1e-9 <= score <= 1 + 1e-9 for score in scores.values())


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("task", ["cola", "stsb"])
def test_a_correlation_with_a_constant_is_zero(task):
    varied, constant = [0, 1, 1], [1, 1, 1]
    for predictions, references in [(constant, varied), (varied, constant), (constant, constant)]:
        scores = GlueMetric(task).compute(predictions=predictions, references=references)
        assert set(scores.values()) == {0.0}


def test_f1_without_a_positive_is_zero(recwarn):
    assert GlueMetric("mrpc").compute(predictions=[0, 0], references=[0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert not [warning for warning in recwarn if "ill-defined" in str(warning.message)]


def test_diverged_similarities_give_nan():
    scores = GlueMetric("stsb").compute(predictions=[1.0, math.nan, 2.0], references=[1.0, 2.0, 3.0])
    assert all(math.isnan(score) for score in scores.values())


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
@pytest.mark.parametrize("task", CLASSIFICATION)
def test_batches_add_up(task, kind):
    metric = GlueMetric(task)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        metric.add_batch(predictions=kind(PREDICTIONS[part]), references=kind(REFERENCES[part]))
    assert metric.compute() == GlueMetric(task).compute(predictions=PREDICTIONS, references=REFERENCES)


def test_one_metric_serves_one_evaluation_after_another():
    metric = GlueMetric("rte")
    assert [metric.compute(predictions=p, references=[1, 1]) for p in ([1, 1], [0, 1], [0, 0])] == [
        {"accuracy": 1.0},
        {"accuracy": 0.5},
        {"accuracy": 0.0},
    ]


def test_combined_metrics_keep_every_score():
    combined = evaluate.combine([GlueMetric("mrpc"), GlueMetric("rte"), GlueMetric("cola")])
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        combined.add(prediction=prediction, reference=reference)
    assert combined.compute() == pytest.approx(
        {
            "glue_mrpc_accuracy": 4 / 6,
            "f1": 3 / 4,
            "glue_rte_accuracy": 4 / 6,
            "matthews_correlation": 2 / 8,
        }
    )


def test_the_same_task_twice_keeps_every_score():
    scores = evaluate.combine([GlueMetric("rte"), GlueMetric("rte")]).compute(predictions=[1, 0], references=[1, 1])
    assert list(scores.values()) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("task", "predictions", "references", "message"),
    [
        ("rte", [], [], "nothing to score for 'rte'"),
        ("stsb", [1.0], [1.0], "pass two examples"),
        ("rte", [0.2, 0.9], [0, 1], "take the argmax"),
        ("rte", [0, 1], [-1, -1], "score the validation split"),
    ],
)
def test_glue_refuses_what_it_cannot_score(task, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        GlueMetric(task).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("arguments", [(), ("glue",)])
def test_an_unknown_task_lists_the_nine(arguments):
    with pytest.raises(ValueError, match="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli"):
        GlueMetric(*arguments)


# One sentence each: right, wrong type, wrong boundary, invented.
TAGS_PREDICTED = [["B-PER", "I-PER", "O"], ["B-LOC"], ["B-ORG", "O"], ["O", "B-PER"]]
TAGS_TRUE = [["B-PER", "I-PER", "O"], ["B-ORG"], ["B-ORG", "I-ORG"], ["O", "O"]]


def test_seqeval_counts_entities_with_their_type_and_boundaries():
    scores = SeqevalMetric().compute(predictions=TAGS_PREDICTED, references=TAGS_TRUE)
    assert scores == {
        "PER": {"precision": 1 / 2, "recall": 1.0, "f1": pytest.approx(2 / 3), "number": 1},
        "LOC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "number": 0},
        "ORG": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "number": 2},
        "overall_precision": 1 / 4,
        "overall_recall": 1 / 3,
        "overall_f1": pytest.approx(2 / 7),
        "overall_accuracy": 5 / 8,
    }


def test_seqeval_in_batches():
    metric = SeqevalMetric()
    metric.add_batch(predictions=TAGS_PREDICTED[:1], references=TAGS_TRUE[:1])
    metric.add_batch(predictions=TAGS_PREDICTED[1:], references=TAGS_TRUE[1:])
    assert metric.compute() == SeqevalMetric().compute(predictions=TAGS_PREDICTED, references=TAGS_TRUE)


def test_seqeval_without_entities_is_zero_and_silent(recwarn):
    scores = SeqevalMetric().compute(predictions=[["O", "O"]], references=[["O", "O"]])
    assert scores == {"overall_precision": 0, "overall_recall": 0, "overall_f1": 0, "overall_accuracy": 1}
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_strict_mode_drops_entities_that_break_the_scheme():
    tags = {"predictions": [["O", "I-PER"]], "references": [["O", "B-PER"]]}
    assert SeqevalMetric().compute(**tags)["overall_f1"] == 1.0
    assert SeqevalMetric().compute(**tags, mode="strict", scheme="IOB2")["overall_f1"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [["O", "O"]], "references": [["O"]]}, "Sentence 0 has 2 predicted and 1 true tags"),
        ({"predictions": [], "references": []}, "nothing to score"),
        ({"predictions": [["O"]], "references": [["O"]], "mode": "loose"}, "Unknown mode 'loose'"),
        (
            {"predictions": [["O"]], "references": [["O"]], "mode": "strict", "scheme": "BIO"},
            "choose one of IOB1, IOB2",
        ),
        ({"predictions": [["O"]], "references": [["O"]], "scheme": "IOB2"}, "pass mode='strict' too"),
    ],
)
def test_seqeval_refuses_what_it_cannot_score(arguments, message):
    with pytest.raises(ValueError, match=message):
        SeqevalMetric().compute(**arguments)


def test_bleu_by_hand():
    # Of 7, 6, 5 and 4 n-grams 6, 5, 4 and 3 are in the reference, and the translation is the longer of the two.
    bleu = SacrebleuMetric().compute(predictions=["a b c d e f x"], references=["a b c d e f"])
    assert bleu["precisions"] == pytest.approx([100 * 6 / 7, 100 * 5 / 6, 100 * 4 / 5, 100 * 3 / 4])
    assert bleu["score"] == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** (1 / 4))
    assert (bleu["bp"], bleu["sys_len"], bleu["ref_len"]) == (1.0, 7, 6)


def test_brevity_penalty_by_hand():
    bleu = SacrebleuMetric().compute(predictions=["a b c d"], references=["a b c d e"])
    assert bleu["bp"] == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu["score"] == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_bleu_takes_several_references_and_unequal_numbers_of_them():
    predictions = ["a b c d", "k l m n"]
    bleu = SacrebleuMetric().compute(predictions=predictions, references=[["x", "a b c d"], ["k l m n"]])
    assert bleu["score"] == pytest.approx(100)
    assert bleu["signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_in_batches_and_its_options():
    metric = SacrebleuMetric()
    metric.add_batch(predictions=["A b c d"], references=["a b c d"])
    metric.add_batch(predictions=["e f g h"], references=["e f g h"])
    bleu = metric.compute(lowercase=True, tokenize="none")
    assert bleu["score"] == pytest.approx(100)
    assert "case:lc|eff:no|tok:none" in bleu["signature"]


@pytest.mark.parametrize(
    ("references", "options", "message"),
    [
        ([["a"], []], {}, "Sentence 1 has no reference"),
        (["a", "b"], {"tokenize": "moses"}, "Unknown tokeniser 'moses': choose one of"),
    ],
)
def test_bleu_refuses_what_it_cannot_score(references, options, message):
    with pytest.raises(ValueError, match=message):
        SacrebleuMetric().compute(predictions=["a", "b"], references=references, **options)


def test_the_package_imports_no_metric():
    code = "import sys, hf_normswap; print({'evaluate', 'seqeval', 'hf_normswap.metrics'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_missing_package_is_named_with_the_cure(monkeypatch):
    monkeypatch.delitem(sys.modules, "hf_normswap.metrics.sacrebleu")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match="SacrebleuMetric needs .*: install it with `pip install"):
        metrics.SacrebleuMetric  # noqa: B018


def test_every_public_name_is_there():
    assert [getattr(metrics, name).__name__ for name in metrics.__all__] == metrics.__all__
    with pytest.raises(AttributeError, match="BleuMetric"):
        metrics.BleuMetric  # noqa: B018
