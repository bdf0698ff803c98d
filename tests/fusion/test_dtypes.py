"""What is folded in one dtype runs in the others: the scales of the stream stay inside of float16."""

import copy
import dataclasses
import functools
import logging
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_normswap import find_norms, fold_norms, reestimate_statistics, swap_norm
from tests.helpers.architectures import architectures
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence


MODELS = ["bert", "roberta", "marian", "bart", "distilbert"]
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.15}


@functools.cache
def spread_once(name):
    depth = {"encoder_layers": 5, "decoder_layers": 5} if name in ("marian", "bart") else {"num_hidden_layers": 5}
    if name in FAMILIES:
        model = tiny_model(name, **depth)
        batch = tiny_batch(model, labels=False)
    else:
        architecture = next(each for each in architectures() if each.name == name)
        fields = {**architecture.fields, **({"n_layers": 5} if name == "distilbert" else depth)}
        architecture = dataclasses.replace(architecture, fields=fields)
        model, batch = architecture.model(), architecture.inputs()
    swap_norm(model.eval(), "batchnorm", where="all")
    for site in find_norms(model):
        site.module.weight.data[::2] *= 0.005
    batches = [batch, {key: value.flip(0) for key, value in batch.items()}]
    reestimate_statistics(model, batches)
    return model, batch


def spread(name):
    """A swapped model in which some channels shrink at every norm and the next sublayer fills them again."""
    return copy.deepcopy(spread_once(name))


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits.double()


def error(wanted, got):
    assert got.isfinite().all()
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fold_then_cast_and_cast_then_fold(name, dtype):
    model, batch = spread(name)
    exact = logits(model, batch)
    unfolded = error(exact, logits(copy.deepcopy(model).to(dtype), batch))
    cast_first = copy.deepcopy(model).to(dtype)
    fold_norms(cast_first, untie=True)
    report = fold_norms(model, untie=True)
    assert error(exact, logits(model, batch)) < 1e-4
    limit = max(4 * unfolded, TOLERANCES[dtype])
    assert error(exact, logits(model.to(dtype), batch)) < limit
    assert error(exact, logits(cast_first, batch)) < limit
    assert report.float16_error < 0.1


def test_a_fold_for_float32_alone_overflows_in_float16():
    """What the default is for: as many norms go as float32 allows, and a cast to float16 loses the outputs."""
    model, batch = spread("bert")
    kept = len(fold_norms(copy.deepcopy(model)).kept)
    report = fold_norms(model, dtype=torch.float32)
    assert not report.kept
    assert kept
    assert report.float16_error is None
    assert not logits(model.half(), batch).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_of_the_model_does_not_count(dtype):
    reports = []
    for order in (torch.float32, dtype):
        model, _ = spread("bert")
        reports.append(fold_norms(model.to(order)))
    assert reports[0].kept.keys() == reports[1].kept.keys()
    assert set(reports[1].kept.values()) == {"the stream would leave the range of float16 without it"}


def test_a_model_that_overflows_by_itself_is_named(caplog):
    model, _ = spread("bert")
    model.bert.encoder.layer[0].output.dense.weight.data *= 1e6
    model.bert.encoder.layer[0].output.LayerNorm.running_var.fill_(1e11)
    with caplog.at_level(logging.WARNING):
        report = fold_norms(model)
    assert not math.isfinite(report.float16_error)
    assert report.error < 1e-5
    (said,) = [record.message for record in caplog.records if "float16" in record.message]
    assert is_one_sentence(said)


def test_no_model_runs_in_integers():
    model, _ = spread("bert")
    with pytest.raises(ValueError, match="pass a dtype such as") as refusal:
        fold_norms(model, dtype=torch.int8)
    assert is_one_sentence(refusal.value)


def test_a_folder_loads_in_float16(tmp_path):
    model, batch = spread("bert")
    exact = logits(model, batch)
    fold_norms(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float16)
    assert error(exact, logits(loaded, batch)) < 0.02
