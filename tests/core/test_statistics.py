"""The statistics of a whole model: its penalty, and one update for an optimizer step."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_normswap import (
    BatchNorm,
    PowerNorm,
    PowerNormV,
    RegularizedBatchNorm,
    accumulate_norm_statistics,
    checkpoint_norms,
    norm_penalty,
    pause_norm_statistics,
    update_norm_statistics,
)
from hf_normswap.core.statistics import statistic_norms, sum_discrepancies


@pytest.fixture
def model():
    shared = BatchNorm(3)
    return nn.ModuleList([shared, nn.LayerNorm(3), PowerNormV(5), PowerNorm(4).double(), shared]).train()


def run(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for norm in model:
        channels = norm.weight.shape[0]
        x = 1 + torch.randn(2, 4, channels, generator=generator, dtype=norm.weight.dtype)
        norm(x.requires_grad_()).square().sum().backward()


def statistics_of(model):
    return {name: value.clone() for name, value in model.named_buffers() if "pending" not in name}


def test_norms_are_listed_once_and_in_order(model):
    assert statistic_norms(model) == [model[0], model[2], model[3]]
    assert statistic_norms(nn.Linear(2, 2)) == []


def test_statistics_stay_until_they_are_synchronised(model):
    accumulate_norm_statistics(model)
    before = statistics_of(model)
    run(model)
    assert all(torch.equal(value, before[name]) for name, value in statistics_of(model).items())
    update_norm_statistics(model)
    assert all(
        not torch.equal(value, before[name])
        for name, value in statistics_of(model).items()
        if name.endswith(("mean", "var", "power", "nu", "tracked"))
    )
    assert [norm.num_batches_tracked.item() for norm in statistic_norms(model)] == [1, 1, 1]


def test_synchronising_twice_is_synchronising_once(model):
    accumulate_norm_statistics(model)
    run(model)
    update_norm_statistics(model)
    after = statistics_of(model)
    update_norm_statistics(model)
    assert all(torch.equal(value, after[name]) for name, value in statistics_of(model).items())


def test_layers_keep_their_precision(model):
    accumulate_norm_statistics(model)
    run(model)
    update_norm_statistics(model)
    assert model[0].running_var.dtype == torch.float32
    assert model[3].running_power.dtype == torch.float64
    assert model[3].nu.dtype == torch.float64


def test_deferring_can_end(model):
    accumulate_norm_statistics(model)
    run(model, seed=1)
    accumulate_norm_statistics(model, False)
    plain = nn.ModuleList([BatchNorm(3)])
    run(nn.ModuleList([model[0]]), seed=2)
    run(plain, seed=2)
    torch.testing.assert_close(model[0].running_mean, plain[0].running_mean)
    assert model[0].num_batches_tracked.item() == 1


def test_a_model_without_batch_statistics_has_nothing_to_synchronise():
    model = nn.LayerNorm(3)
    accumulate_norm_statistics(model)
    update_norm_statistics(model)


def test_norms_that_did_not_run_add_no_penalty():
    model = nn.ModuleList([RegularizedBatchNorm(3), RegularizedBatchNorm(3)])
    with pytest.raises(RuntimeError, match="no penalty to take"):
        norm_penalty(model)
    x = torch.randn(2, 4, 3)
    model[1](x)
    expected = model[1].penalty().item()
    model[1].initialize()
    model[1](x)
    assert norm_penalty(model).item() == pytest.approx(expected)


def test_a_penalty_is_not_lost_in_evaluation():
    model = nn.ModuleList([RegularizedBatchNorm(3), RegularizedBatchNorm(3)])
    x = torch.randn(2, 4, 3)
    for norm in model:
        norm(x)
    expected = sum(term.value.item() for norm in model for term in norm.penalties)
    model.eval()
    assert norm_penalty(model).item() == pytest.approx(expected)
    assert norm_penalty(model).item() == 0  # nothing is regularised in evaluation


def test_records_do_not_pile_up():
    model = nn.ModuleList([BatchNorm(3), PowerNormV(3), PowerNorm(3)])
    for _ in range(40):
        for norm in model:
            norm(torch.randn(2, 4, 3))
    assert [len(norm.records) for norm in model] == [16] * 3


# A second forward that statistics do not see


NORMS = [BatchNorm, RegularizedBatchNorm, PowerNormV, PowerNorm]
every_norm = pytest.mark.parametrize("cls", NORMS)


def buffers_of(norm):
    return {name: value.clone() for name, value in norm.named_buffers()}


def backpropagate(norm, x):
    """Output and gradients of a step in whose loss every token has another weight."""
    x = x.clone().requires_grad_()
    y = norm(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    penalty = norm_penalty(norm) if isinstance(norm, RegularizedBatchNorm) else 0
    parameters = [x, norm.weight, norm.bias]
    return y.detach(), *torch.autograd.grad((y * weights).sum() + penalty, parameters)


@every_norm
@pytest.mark.parametrize("accumulating", [False, True], ids=["at_once", "accumulating"])
@pytest.mark.parametrize("warmup_steps", [0, 9])
def test_what_is_paused_computes_as_in_training_and_leaves_no_trace(cls, accumulating, warmup_steps):
    first, second = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    norm = cls(4).double()
    norm.warmup_steps = warmup_steps
    accumulate_norm_statistics(norm, accumulating)
    backpropagate(norm, first)
    twin = copy.deepcopy(norm)
    before, statistics = buffers_of(norm), norm.statistics
    with pause_norm_statistics(norm):
        results = backpropagate(norm, second)
    for ours, theirs in zip(results, backpropagate(twin, second), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name, value in buffers_of(norm).items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(norm.statistics, statistics)
    # Afterwards all is as before.
    backpropagate(norm, second)
    update_norm_statistics(norm)
    assert not torch.equal(norm.num_batches_tracked, before["num_batches_tracked"])


@every_norm
def test_a_backward_after_the_pause_leaves_no_trace_either(cls):
    """Nor does a checkpointed block that runs again in it."""
    x = torch.randn(3, 5, 4, requires_grad=True)
    for run in (lambda norm, x: norm(x), functools.partial(checkpoint_norms(checkpoint), use_reentrant=False)):
        norm = cls(4)
        norm(x)
        before = buffers_of(norm)
        with pause_norm_statistics(norm):
            y = run(norm, x)
        y.square().sum().backward()
        for name, value in buffers_of(norm).items():
            assert torch.equal(value, before[name]), name


@every_norm
def test_a_pause_leaves_the_discrepancy_alone(cls):
    norm = cls(4)
    norm(torch.randn(3, 5, 4))
    expected = sum_discrepancies([norm])
    with pause_norm_statistics(norm), torch.no_grad():
        norm(1 + 3 * torch.randn(3, 5, 4))
    found = sum_discrepancies([norm])
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1] == [1]


def test_the_penalty_of_a_paused_forward_counts():
    norm, plain = RegularizedBatchNorm(4), RegularizedBatchNorm(4)
    first, second = torch.randn(2, 3, 5, 4)
    with pause_norm_statistics(norm):
        norm(first)
    norm(second)
    for x in (first, second):
        plain(x)
        plain.running_mean.zero_()
        plain.running_var.fill_(1)
    assert norm_penalty(norm).item() == pytest.approx(norm_penalty(plain).item(), rel=1e-6)


def test_a_paused_forward_may_go_without_its_penalty(monkeypatch):
    texts = []
    monkeypatch.setattr("hf_normswap.modeling.rbn.logger.warning_once", texts.append, raising=False)
    norm, x = RegularizedBatchNorm(4), torch.randn(3, 5, 4, requires_grad=True)
    with pause_norm_statistics(norm):  # the direction of virtual adversarial training
        (direction,) = torch.autograd.grad(norm(x).square().sum(), x)
    norm(x + direction)
    expected = norm.penalties[-1].value.item()
    assert norm_penalty(norm).item() == expected
    assert not texts


def test_a_pause_ends_with_an_error_and_inside_of_another():
    model = nn.ModuleList([BatchNorm(3), PowerNorm(3)])
    with pause_norm_statistics(model):
        with pytest.raises(ZeroDivisionError), pause_norm_statistics(model[0]):
            raise ZeroDivisionError
        assert all(norm.paused for norm in model)
    assert not any(norm.paused for norm in model)


def test_the_penalty_is_float32_and_has_a_gradient():
    norm = RegularizedBatchNorm(3).bfloat16()
    x = torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    norm(x)
    penalty = norm_penalty(norm)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.abs().max() > 0
