"""Gradient accumulation, activation checkpointing and ranks change nothing that they need not change."""

import pytest

from tests.helpers.trainer import HEADS, assert_same, rows, train


FAMILIES = list(HEADS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "powernorm"])
def test_four_times_two_is_one_times_eight(family, norm, tmp_path):
    examples = rows(family, 16)
    whole = train(family, norm, examples, tmp_path, batch=8, accumulation=1)
    parts = train(family, norm, examples, tmp_path, batch=2, accumulation=4)
    assert_same(whole, parts)
    assert parts.logs[-1]["loss"] == pytest.approx(whole.logs[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "pnv"])
def test_four_copies_of_a_micro_batch_are_one(family, norm, tmp_path):
    once = rows(family, 2, seed=0), rows(family, 2, seed=1)
    whole = train(family, norm, [*once[0], *once[1]], tmp_path, batch=2, accumulation=1)
    copies = train(family, norm, [*once[0] * 4, *once[1] * 4], tmp_path, batch=2, accumulation=4)
    assert_same(whole, copies)
    if norm == "rbn":
        assert whole.logs[-1]["rbn_penalty"] > 0
        assert copies.logs[-1]["rbn_penalty"] == pytest.approx(whole.logs[-1]["rbn_penalty"], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm", "rbn"])
def test_checkpointing_under_the_trainer_changes_nothing(norm, reentrant, tmp_path):
    examples = rows("bert", 16)
    off = train("bert", norm, examples, tmp_path, batch=4, accumulation=2, norm_warmup_ratio=0.5)
    settings = {"use_reentrant": reentrant}
    if norm == "rbn" and reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            train("bert", norm, examples, tmp_path, batch=4, accumulation=2, checkpointing=settings)
        return
    on = train("bert", norm, examples, tmp_path, 4, 2, checkpointing=settings, norm_warmup_ratio=0.5)
    assert_same(off, on, tolerance=1e-7)
