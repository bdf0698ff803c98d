"""Distillation: nearer to the original model, and nothing has moved but what was to be trained."""

import copy

import numpy as np
import pytest
import torch

from hf_normswap import distill, find_norms, freeze_norm_statistics, swap_norm
from tests.helpers.calibration import batches, states, stock
from tests.helpers.models import FAMILIES


@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_distilled_model_is_nearer_to_the_original(family, linears):
    original = stock(family)
    data = batches(original, rows=24, size=24)
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=data)
    before = states(model)
    losses = distill(model, original, data, linears=linears, steps=60, learning_rate=2e-3)
    assert len(losses) == 60
    assert losses[-1] < losses[0]
    norms = {f"{site.name}.{part}" for site in find_norms(model) for part in ("weight", "bias")}
    after = states(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])} - norms
    inside = {name for name in before if any(name.startswith(f"{site.block}.") for site in find_norms(model))}
    assert moved <= inside
    assert bool(moved) is linears
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert ours.requires_grad is theirs.requires_grad
        assert ours.grad is None
    assert not any(site.module._forward_hooks for site in find_norms(model))


def test_the_first_loss_is_that_of_numpy():
    """Sum over norms of the relative squared distance at real tokens, and the divergence of the predictions."""
    original = stock("bert")
    (batch,) = batches(original, rows=6)
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=[batch])
    outputs = {}

    def keep(module, args, output, key):
        outputs[key] = output[batch["attention_mask"].bool()]

    names = [site.name for site in find_norms(model)]
    with torch.no_grad():
        for each in (model, original):
            for name in names:
                each.get_submodule(name).register_forward_hook(
                    lambda m, a, o, each=each, name=name: keep(m, a, o, (each is model, name))
                )
        ours, theirs = (torch.softmax(each(**batch).logits, -1).numpy() for each in (model, original))
    relative = [
        ((outputs[True, name] - outputs[False, name]) ** 2).sum() / (outputs[False, name] ** 2).sum() for name in names
    ]
    divergence = (theirs * np.log(theirs / ours)).sum(-1).mean()
    expected = torch.stack(relative).sum().item() + divergence
    (loss,) = distill(model, original, [batch], steps=1)
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("prepare", "data", "message"),
    [
        (lambda model, teacher: model.train(), None, "model is in training mode"),
        (lambda model, teacher: teacher.train(), None, "teacher is in training mode"),
        (lambda model, teacher: None, [], "data is empty"),
        (lambda model, teacher: swap_norm(teacher, "rbn"), None, "no LayerNorm .*from before the swap"),
        (lambda model, teacher: model.half(), None, "half precision.*float"),
    ],
)
def test_bad_input_is_refused(prepare, data, message):
    original = stock("bert")
    model = swap_norm(copy.deepcopy(original), "batchnorm")
    prepare(model, original)
    before = states(model)
    with pytest.raises(ValueError, match=message):
        distill(model, original, batches(original) if data is None else data)
    assert all(torch.equal(value, before[name]) for name, value in states(model).items())


def test_an_interrupted_distillation_leaves_the_model_as_it_was(monkeypatch):
    original = stock("bert")
    model = swap_norm(copy.deepcopy(original), "batchnorm", calibrate_on=batches(original))
    before, steps = states(model), []

    def interrupt(optimizer, *args, step=torch.optim.AdamW.step):
        step(optimizer)
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(model, original, batches(original))
    assert all(torch.equal(value, before[name]) for name, value in states(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_norms_that_do_not_run_stay_as_they_are():
    """Cross-attention that is given no encoder."""
    original = stock("gpt2", add_cross_attention=True)
    data = batches(original)
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=data)
    before = states(model)
    distill(model, original, data, steps=2)
    after = states(model)
    assert all(torch.equal(after[name], before[name]) for name in before if "cross" in name)
    assert not torch.equal(after["transformer.h.1.ln_2.weight"], before["transformer.h.1.ln_2.weight"])
    freeze_norm_statistics(model.train())
    assert not any(site.module.training for site in find_norms(model))


def test_a_batch_without_masked_tokens_has_a_loss():
    original = stock("bert")
    data = batches(original)
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all", calibrate_on=data)
    for batch in data:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
    assert np.isfinite(distill(model, original, data, steps=3)).all()
