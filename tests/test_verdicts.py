"""The verdicts of the page on the choice of a norm, from toy records."""

import json
import sys

import pytest
from scipy.stats import ttest_rel

from tests.helpers.persistence import ROOT


sys.path.insert(0, str(ROOT / "results"))

import tables_discrepancies  # noqa: E402
import tables_evidence  # noqa: E402


LAYERNORM, OTHERS = (0.80, 0.82, 0.84), (0.79, 0.825, 0.85)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_evidence, "FOLDER", tmp_path)

    def write(task, metric, norm, scores, placement="post"):
        """One record for each seed, with scores of what is done to the trained model, which are higher by 0.01."""
        prefix = "converted" if norm == "layernorm" else "reestimated"
        for seed, score in enumerate(scores):
            path = tmp_path / f"evidence/{task}/table/{placement}-{norm}-{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            metrics = {metric: score, f"{prefix}_{metric}": score + 0.01}
            record = {"task": task, "model": "bert", "norm": norm, "seed": seed, "metrics": metrics}
            path.write_text(json.dumps(record | {"arguments": {"placement": placement}}), encoding="utf-8")

    return write


def test_gains_are_those_of_a_paired_t_test(write):
    for norm in tables_evidence.NORMS:
        write("trec", "test_accuracy", norm, OTHERS)
        write("ptb", "test_perplexity", norm, [100 * score for score in OTHERS])
    write("trec", "test_accuracy", "layernorm", LAYERNORM)
    write("ptb", "test_perplexity", "layernorm", [100 * score for score in LAYERNORM])
    trec, ptb = tables_evidence.find_settings()
    truth = ttest_rel(OTHERS, LAYERNORM)
    low, high = truth.confidence_interval(0.95)
    mean = sum(OTHERS) / 3 - sum(LAYERNORM) / 3
    found = tables_evidence.compare("trec", trec[2]["RBN"])
    assert found == pytest.approx([100 * mean, 100 * low, 100 * high])
    found = tables_evidence.compare("ptb", ptb[2]["RBN"])
    assert found == pytest.approx([-100 * mean, -100 * high, -100 * low])  # a lower perplexity is better
    found = tables_evidence.compare("trec", trec[2]["RBN, re-estimated"])
    assert found == pytest.approx([100 * mean + 1, 100 * low + 1, 100 * high + 1])
    assert tables_evidence.compare("trec", trec[2]["LayerNorm, converted"])[0] == pytest.approx(1)


def test_settings_that_are_not_complete_are_left_out(write):
    for norm in ("layernorm", *tables_evidence.NORMS):
        write("trec", "test_accuracy", norm, OTHERS)
        write("trec", "test_accuracy", norm, OTHERS[: 2 if norm == "rbn" else 3], placement="pre")
        if norm != "powernorm":
            write("sst2", "test_accuracy", norm, OTHERS)
    assert [label for label, _, _ in tables_evidence.find_settings()] == ["TREC, accuracy, post"]


@pytest.mark.parametrize(
    ("gain", "verdict", "is_as_good"),
    [
        ((1.0, 0.5, 1.5), "win", True),
        ((1.0, -0.5, 2.5), "tie", True),
        ((-0.1, -0.3, 0.1), "tie", True),
        ((-0.3, -0.7, 0.1), "tie", False),
        ((-0.1, -0.15, -0.05), "loss", False),
    ],
)
def test_verdicts(gain, verdict, is_as_good):
    assert tables_evidence.judge(*gain) == verdict
    assert tables_evidence.is_as_good(*gain) == is_as_good


def test_the_discrepancy_stands_beside_the_gain_over_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_evidence, "FOLDER", tmp_path)
    folder = tmp_path / "evidence/trec/table"
    folder.mkdir(parents=True)
    for seed in range(3):
        for norm, gain in (("layernorm", 0.0), ("batchnorm", -0.01 * (seed + 1)), ("rbn", 0.01)):
            tids = [{"tid_var_max": 9.0}, {"tid_var_max": 0.1 * (seed + 1)}, {}] if norm == "batchnorm" else []
            tids = [{"tid_var_max": 0.01}] if norm == "rbn" else tids
            record = {"norm": norm, "seed": seed, "arguments": {"placement": "pre"}, "history": tids}
            record["metrics"] = {"test_accuracy": 0.8 + 0.05 * seed + gain}
            (folder / f"pre-{norm}-{seed}.json").write_text(json.dumps(record), encoding="utf-8")
    points = tables_discrepancies.find_points()
    assert points["trec", "batchnorm"] == [pytest.approx((0.1 * n, -n)) for n in (1, 2, 3)]
    assert points["trec", "rbn"] == [pytest.approx((0.01, 1))] * 3
    rows = tables_discrepancies.table_of_correlations().splitlines()
    assert [cell.strip() for cell in rows[2].strip("|").split("|")] == ["TREC", "6", "−1.00", "–", "–"]
