"""The training-inference discrepancy, against a computation by hand in float64."""

import copy
import json

import pytest
import torch

from hf_normswap import TidHistory, find_norms, measure_tid, reestimate_statistics, swap_norm
from hf_normswap.modeling.padding_mask import current_mask
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model
from tests.helpers.persistence import train
from tests.helpers.trainer import make_trainer


NORMS = ["batchnorm", "rbn", "pnv", "powernorm"]


def trained(family, norm):
    return train(swap_norm(tiny_model(family).double(), norm, where="all"))


def by_hand(model, batches):
    """`{name: (mean TID, variance TID)}`, of what reaches the norms while all of them use the batch's statistics."""
    inputs = {}

    def note(norm, args, name):
        x, mask = args[0], current_mask(args[0])
        inputs.setdefault(name, []).append(x[mask] if mask is not None else x.flatten(0, -2))

    model = copy.deepcopy(model).eval()
    for site in find_norms(model):
        site.module.train()
        site.module.register_forward_pre_hook(lambda norm, args, name=site.name: note(norm, args, name))
    running = {site.name: {n: b.clone() for n, b in site.module.named_buffers()} for site in find_norms(model)}
    with torch.no_grad():
        for batch in batches:
            for site in find_norms(model):
                site.module.accumulating = True
            model(**batch)
    values = {}
    for site in find_norms(model):
        eps, of_batches = site.module.eps, []
        for x in inputs[site.name]:
            if "running_mean" in running[site.name]:
                mean, sigma = running[site.name]["running_mean"], (running[site.name]["running_var"] + eps).sqrt()
                batch_sigma = (x.var(0, correction=0) + eps).sqrt()
                of_batches.append(
                    ((x.mean(0) - mean).norm() / sigma.norm(), (batch_sigma - sigma).norm() / sigma.norm())
                )
            else:
                if getattr(site.module, "group_scaling", False):
                    groups = x.unflatten(-1, (site.module.num_groups, -1))
                    x = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
                psi = (running[site.name]["running_power"] + eps).sqrt()
                batch_psi = (x.square().mean(0) + eps).sqrt()
                of_batches.append((torch.tensor(0.0), (batch_psi - psi).norm() / psi.norm()))
        values[site.name] = torch.tensor(of_batches, dtype=torch.float64).mean(0)
    return values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_it_is_what_a_computation_by_hand_gives(family, norm):
    model = trained(family, norm)
    batches = [tiny_batch(model, (6, 3, 9), seed=seed) for seed in (20, 21, 22)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}
    report = measure_tid(model, batches)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert {name: module.training for name, module in model.named_modules()} == modes
    expected = by_hand(model, batches)
    assert [tid.name for tid in report] == list(expected)
    for tid in report:
        mean, variance = expected[tid.name].tolist()
        assert tid.variance == pytest.approx(variance, rel=1e-10)
        assert (tid.mean or 0.0) == pytest.approx(mean, rel=1e-10)
        assert (tid.mean is None) == (norm in ("pnv", "powernorm"))
        assert tid.batches == 3


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_0_where_batch_and_running_statistics_agree(norm):
    model = trained("bert", norm)
    batch = tiny_batch(model, (6, 3, 9))
    if norm in ("batchnorm", "rbn"):
        # In evaluation the batch then passes through the same maps as in training.
        reestimate_statistics(model, [batch])
    else:
        for site in find_norms(model):
            site.module.warmup_steps = 10**6
        reestimate_statistics(model, [batch])
    for tid in measure_tid(model, [batch, batch]):
        assert (tid.mean or 0.0) < 1e-12
        assert tid.variance < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model = trained(family, "batchnorm")
    plain, padded = (
        measure_tid(model, [tiny_batch(model, (6, 3, 9), **options)]) for options in ({}, {"columns": 14, "filler": 7})
    )
    for ours, theirs in zip(plain, padded, strict=True):
        assert ours.mean == pytest.approx(theirs.mean, rel=1e-10)
        assert ours.variance == pytest.approx(theirs.variance, rel=1e-10)


def test_a_norm_that_exploded_is_in_the_report():
    model = trained("bert", "batchnorm")
    torch.nn.init.constant_(model.bert.encoder.layer[0].output.dense.weight, torch.nan)
    report = measure_tid(model, [tiny_batch(model)])
    assert [tid.name for tid in report] == [site.name for site in find_norms(model)]
    assert [tid.variance == tid.variance for tid in report] == [True, True, False, False, False]


def test_a_norm_that_no_batch_reaches_is_not():
    model = tiny_model("bert", "BertLMHeadModel", add_cross_attention=True).double()
    swap_norm(model, "rbn", where="all")
    batch = tiny_batch(model)
    model(**batch, encoder_hidden_states=torch.randn(2, 5, 16, dtype=torch.float64))
    names = [tid.name for tid in measure_tid(model, [batch])]
    assert names
    assert not any("crossattention" in name for name in names)


def test_what_is_frozen_or_in_training_stays_so():
    model = trained("bert", "rbn").train()
    norm = find_norms(model)[0].module
    norm.frozen = True
    norm.train()
    norm.pending.fill_(3.0)
    report = measure_tid(model, [tiny_batch(model)])
    assert report[0].variance > 0
    assert model.training
    assert not norm.training
    assert norm.pending.eq(3.0).all()
    assert "TID of mean" in str(report)


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lambda: tiny_model("bert"), [{}], "No norm of this BertForSequenceClassification has running"),
        (lambda: trained("bert", "rbn"), [], "data is empty"),
        (lambda: torch.nn.Sequential(trained("bert", "rbn")), [], "model of transformers, not of a Sequential"),
    ],
)
def test_what_is_refused(make, data, message):
    with pytest.raises(ValueError, match=message):
        measure_tid(make(), data)


def test_the_history_of_a_training(tmp_path):
    trainer = make_trainer(tmp_path / "whole", logging_steps=1)
    trainer.train()
    history = TidHistory.read(tmp_path / "whole")
    assert history.steps == [1, 2, 3, 4]
    assert history.layers == [site.name for site in find_norms(trainer.model)]
    logs = [entry for entry in trainer.state.log_history if "tid_var_max" in entry]
    for entry, mean, variance in zip(logs, history.mean, history.variance, strict=True):
        assert max(mean) == entry["tid_mean_max"]
        assert max(variance) == entry["tid_var_max"]
        assert sum(variance) / len(variance) == pytest.approx(entry["tid_var_avg"], rel=1e-6)
    # A resumed training goes on with the history of its checkpoint.
    resumed = make_trainer(tmp_path / "resumed", logging_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert vars(TidHistory.read(tmp_path / "resumed")) == vars(history)


def test_a_damaged_history_is_refused(tmp_path):
    for content in ("", "{}", json.dumps([1])):
        (tmp_path / "tid.json").write_text(content)
        with pytest.raises(ValueError, match="no history of the TID"):
            TidHistory.read(tmp_path)


def test_a_layernorm_model_has_no_history(tmp_path):
    trainer = make_trainer(tmp_path, norm="layernorm")
    trainer.train()
    assert not (tmp_path / "tid.json").exists()
