"""The statistics of a whole model: its penalty, and one update for an optimizer step."""

import pytest
import torch
from torch import nn

from hf_normswap import (
    BatchNorm,
    PowerNorm,
    PowerNormV,
    RegularizedBatchNorm,
    defer_norm_statistics,
    norm_penalty,
    sync_norm_statistics,
)
from hf_normswap.statistics import statistic_norms


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
    defer_norm_statistics(model)
    before = statistics_of(model)
    run(model)
    assert all(torch.equal(value, before[name]) for name, value in statistics_of(model).items())
    sync_norm_statistics(model)
    assert all(
        not torch.equal(value, before[name])
        for name, value in statistics_of(model).items()
        if name.endswith(("mean", "var", "power", "nu", "tracked"))
    )
    assert [norm.num_batches_tracked.item() for norm in statistic_norms(model)] == [1, 1, 1]


def test_synchronising_twice_is_synchronising_once(model):
    defer_norm_statistics(model)
    run(model)
    sync_norm_statistics(model)
    after = statistics_of(model)
    sync_norm_statistics(model)
    assert all(torch.equal(value, after[name]) for name, value in statistics_of(model).items())


def test_layers_keep_their_precision(model):
    defer_norm_statistics(model)
    run(model)
    sync_norm_statistics(model)
    assert model[0].running_var.dtype == torch.float32
    assert model[3].running_power.dtype == torch.float64
    assert model[3].nu.dtype == torch.float64


def test_deferring_can_end(model):
    defer_norm_statistics(model)
    run(model, seed=1)
    defer_norm_statistics(model, False)
    plain = nn.ModuleList([BatchNorm(3)])
    run(nn.ModuleList([model[0]]), seed=2)
    run(plain, seed=2)
    torch.testing.assert_close(model[0].running_mean, plain[0].running_mean)
    assert model[0].num_batches_tracked.item() == 1


def test_a_model_without_batch_statistics_has_nothing_to_synchronise():
    model = nn.LayerNorm(3)
    defer_norm_statistics(model)
    sync_norm_statistics(model)


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


def test_the_penalty_is_float32_and_has_a_gradient():
    norm = RegularizedBatchNorm(3).bfloat16()
    x = torch.randn(2, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    norm(x)
    penalty = norm_penalty(norm)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.abs().max() > 0
