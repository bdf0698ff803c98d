"""Distances and TID against numpy, and the properties that they are there for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_normswap import BatchNorm, PowerNorm, PowerNormV
from hf_normswap.core.statistics import sum_discrepancies
from hf_normswap.modeling.discrepancy import (
    DISTANCES,
    Statistics,
    relative_distance,
    training_inference_discrepancy,
)


EPS = 1e-3
seeds = st.integers(0, 2**32 - 1)


def make_statistics(seed, *shape):
    generator = torch.Generator().manual_seed(seed)

    def values(positive):
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
        return 0.1 + drawn.square() if positive else drawn

    return Statistics(values(False), values(True), values(False), values(True))


@given(seed=seeds, channels=st.integers(1, 6))
def test_distances_follow_the_formulas(seed, channels):
    statistics = make_statistics(seed, channels)
    batch_mean, batch_var, mean, var = (value.numpy() for value in statistics)
    sigma_batch, sigma = np.sqrt(batch_var + EPS), np.sqrt(var + EPS)
    squared_means = sum((a - b) ** 2 for a, b in zip(batch_mean, mean, strict=True))
    expected = {
        "sigma_l2": (squared_means, sum((a - b) ** 2 for a, b in zip(sigma_batch, sigma, strict=True))),
        "var_l1": (squared_means, sum(abs(a - b) for a, b in zip(batch_var, var, strict=True))),
        "relative": (
            np.mean([(a - b) ** 2 / (v + EPS) for a, b, v in zip(batch_mean, mean, var, strict=True)]),
            np.mean([(a / b - 1) ** 2 for a, b in zip(sigma_batch, sigma, strict=True)]),
        ),
    }
    assert set(DISTANCES) == set(expected)
    for name, distance in DISTANCES.items():
        np.testing.assert_allclose([value.item() for value in distance(statistics, EPS)], expected[name], rtol=1e-10)


@given(seed=seeds, channels=st.integers(1, 6))
def test_tid_follows_the_formula(seed, channels):
    statistics = make_statistics(seed, channels)
    batch_mean, batch_var, mean, var = (value.numpy() for value in statistics)
    sigma_batch, sigma = np.sqrt(batch_var + EPS), np.sqrt(var + EPS)
    scale = np.sqrt((sigma**2).sum())
    expected = np.sqrt(((batch_mean - mean) ** 2).sum()) / scale, np.sqrt(((sigma_batch - sigma) ** 2).sum()) / scale
    found = training_inference_discrepancy(statistics, EPS)
    np.testing.assert_allclose([value.item() for value in found], expected, rtol=1e-10)

    powers = Statistics(None, statistics.batch_var, None, statistics.running_var)
    of_power = training_inference_discrepancy(powers, EPS)
    np.testing.assert_allclose([value.item() for value in of_power], (0, expected[1]), rtol=1e-10)


@pytest.mark.parametrize("function", [*DISTANCES.values(), training_inference_discrepancy])
def test_leading_dimensions_are_layers(function):
    statistics = make_statistics(0, 2, 3, 5)
    stacked = function(statistics, EPS)
    for row in range(2):
        for column in range(3):
            single = function(Statistics(*(value[row, column] for value in statistics)), EPS)
            for value, expected in zip(stacked, single, strict=True):
                torch.testing.assert_close(value[row, column], expected)


@pytest.mark.parametrize("function", [*DISTANCES.values(), training_inference_discrepancy])
def test_no_discrepancy_where_batch_and_running_values_are_equal(function):
    _, _, mean, var = make_statistics(0, 5)
    assert all(value.item() == 0 for value in function(Statistics(mean, var, mean, var), EPS))


@given(seed=seeds, scale=st.sampled_from([1e-3, 0.1, 7.0, 1e4]), copies=st.integers(1, 4))
def test_relative_distance_is_free_of_scale_and_width(seed, scale, copies):
    statistics = make_statistics(seed, 4)
    scaled = Statistics(*(value * factor for value, factor in zip(statistics, (scale, scale**2) * 2, strict=True)))
    wide = Statistics(*(value.repeat(copies) for value in scaled))
    torch.testing.assert_close(relative_distance(wide, 0.0), relative_distance(statistics, 0.0), rtol=1e-9, atol=0)


def test_relative_distance_is_the_squared_tid_of_each_channel():
    channels = [make_statistics(seed, 1) for seed in range(5)]
    tid = torch.stack([torch.stack(training_inference_discrepancy(channel, EPS)) for channel in channels])
    together = Statistics(*map(torch.cat, zip(*channels, strict=True)))
    torch.testing.assert_close(torch.stack(relative_distance(together, EPS)), tid.square().mean(0))


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_of_the_distances(name):
    batch_mean, batch_var, mean, var = make_statistics(0, 4)

    def distance(batch_mean, batch_var):
        return DISTANCES[name](Statistics(batch_mean, batch_var, mean, var), EPS)

    assert torch.autograd.gradcheck(distance, (batch_mean.requires_grad_(), batch_var.requires_grad_()))


@pytest.mark.parametrize("name", DISTANCES)
def test_a_constant_channel_has_a_finite_gradient(name):
    batch_mean, batch_var = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    distances = DISTANCES[name](Statistics(batch_mean, batch_var, torch.ones(3), torch.zeros(3)), 1e-5)
    gradients = torch.autograd.grad(sum(distances), [batch_mean, batch_var])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", [BatchNorm, PowerNorm, PowerNormV])
def test_tid_of_a_layer_compares_with_the_running_values_from_before_the_batch(kind):
    norm = kind(3, eps=EPS).double()
    if kind is PowerNorm:
        norm.group_scaling = False
    for name in norm.running:
        getattr(norm, name).uniform_(0.5, 1.5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = 1 + torch.randn(2, 5, 3, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    norm(x, mask)
    rows = x[mask]
    if kind is BatchNorm:
        expected = Statistics(rows.mean(0), rows.var(0, correction=0), before["running_mean"], before["running_var"])
    else:
        expected = Statistics(None, rows.square().mean(0), None, before["running_power"])
    torch.testing.assert_close(norm.statistics, expected)


def test_no_real_token_gives_no_discrepancy():
    norms = [BatchNorm(3), PowerNormV(3), PowerNorm(3)]
    for norm in norms:
        for name in norm.running:
            getattr(norm, name).uniform_(0.5, 1.5)
        norm(torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool))
    sums, forwards = sum_discrepancies(norms)
    assert sums.eq(0).all()
    assert forwards == [1, 1, 1]


def test_discrepancy_of_a_model_is_that_of_its_layers():
    norms = [BatchNorm(3), PowerNormV(4), BatchNorm(4, eps=1e-2), PowerNorm(3), BatchNorm(3)]
    model = nn.ModuleList(norms)
    for norm in model:
        norm(1 + 2 * torch.randn(2, 4, norm.num_features))
    expected = [torch.stack(training_inference_discrepancy(norm.statistics, norm.eps)) for norm in norms]
    sums, forwards = sum_discrepancies(norms)
    torch.testing.assert_close(sums, torch.stack(expected, dim=1))
    assert forwards == [1] * 5


def test_discrepancy_of_layers_that_did_not_run():
    norms = [BatchNorm(3), PowerNormV(3), BatchNorm(3)]
    assert sum_discrepancies([])[1] == []
    assert sum_discrepancies(norms)[1] == [0, 0, 0]
    norms[1](torch.randn(2, 4, 3))
    sums, forwards = sum_discrepancies(norms)
    assert forwards == [0, 1, 0]
    assert sums[:, [0, 2]].eq(0).all()
    assert sums[1, 1] > 0


def test_discrepancy_of_several_forwards_is_their_sum():
    norms = [BatchNorm(3), PowerNormV(4), BatchNorm(3)]
    expected = torch.zeros(2, 3)
    for norm_index, number in enumerate((3, 0, 2)):
        norm = norms[norm_index]
        for _ in range(number):
            norm(1 + 2 * torch.randn(2, 4, norm.num_features))
            expected[:, norm_index] += torch.stack(training_inference_discrepancy(norm.statistics, norm.eps))
    sums, forwards = sum_discrepancies(norms)
    torch.testing.assert_close(sums, expected)
    assert forwards == [3, 0, 2]
