"""Masked moments and their merging against numpy on the selected tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_normswap.modeling.moments import Moments, count_tokens, masked_moments, merge_moments, sum_tokens


seeds = st.integers(0, 2**32 - 1)


def assert_moments_of(moments, rows):
    """`moments` are those of the tokens `rows`, as numpy finds them."""
    rows = rows.double().numpy()
    tolerance = 1e-12 * (1 + np.abs(rows).max(initial=0)) ** 2
    assert moments.count.item() == len(rows)
    mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1])
    np.testing.assert_allclose(moments.mean.numpy(), mean, atol=tolerance)
    np.testing.assert_allclose(moments.m2.numpy(), ((rows - mean) ** 2).sum(0), atol=tolerance * (1 + len(rows)))
    np.testing.assert_allclose(moments.var.numpy(), rows.var(0) if len(rows) else 0, atol=tolerance)
    np.testing.assert_allclose(moments.power.numpy(), (rows**2).mean(0) if len(rows) else 0, atol=tolerance)


@given(
    seed=seeds,
    shape=st.sampled_from([(5,), (1,), (2, 4), (3, 1), (2, 3, 2)]),
    channels=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    junk=st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e300]),
)
def test_moments_are_those_of_the_real_tokens(seed, shape, channels, share, junk):
    generator = torch.Generator().manual_seed(seed)
    values = 3 + torch.randn(*shape, channels, dtype=torch.float64, generator=generator)
    mask = torch.rand(shape, generator=generator) < share
    poisoned = torch.where(mask.unsqueeze(-1), values, junk)
    assert_moments_of(masked_moments(poisoned, mask), values[mask])
    assert_moments_of(masked_moments(values), values.flatten(0, -2))


def test_no_token_at_all():
    moments = masked_moments(torch.full((2, 3), float("nan")), torch.zeros(2, dtype=torch.bool))
    assert all(value.eq(0).all() for value in (*moments, moments.var, moments.power))


def test_sums_and_counts_have_the_dtype_of_the_values():
    values, mask = torch.ones(2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, False], [True, False, False]])
    assert sum_tokens(values, mask).tolist() == [3.0] * 4
    assert sum_tokens(values).tolist() == [6.0] * 4
    for count, expected in ((count_tokens(values, mask), 3.0), (count_tokens(values), 6.0)):
        assert count.dtype == torch.float64
        assert count.item() == expected


def test_two_passes_do_not_cancel():
    values = 1e4 + 1e-2 * torch.randn(4096, 3)
    exact = values.double().var(0, correction=0)
    naive = values.square().mean(0) - values.mean(0).square()
    assert ((naive - exact) / exact).abs().max() > 1  # what the test is about
    torch.testing.assert_close(masked_moments(values).var.double(), exact, rtol=1e-2, atol=0)


@given(
    seed=seeds,
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    channels=st.integers(1, 3),
    offset=st.sampled_from([0.0, -7.0, 1e3]),
)
def test_merging_parts_gives_the_moments_of_the_whole(seed, sizes, channels, offset):
    generator = torch.Generator().manual_seed(seed)
    values = offset + torch.randn(sum(sizes), channels, dtype=torch.float64, generator=generator)
    parts = [masked_moments(part) for part in values.split(sizes)]
    merged = merge_moments(Moments(torch.stack([part.packed for part in parts])))
    assert_moments_of(merged, values)

    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = merge_moments(Moments(torch.stack([one_by_one.packed, part.packed])))
    assert_moments_of(one_by_one, values)


def test_merging_does_not_cancel_in_float32():
    values = 1e4 + 1e-2 * torch.randn(4096, 3)
    parts = [masked_moments(part) for part in values.split([1, 1000, 95, 3000])]
    merged = merge_moments(Moments(torch.stack([part.packed for part in parts])))
    exact = values.double().var(0, correction=0)
    torch.testing.assert_close(merged.var.double(), exact, rtol=0.05, atol=0)


def test_merging_has_the_gradient_of_the_whole():
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def merged(values):
        parts = [masked_moments(part) for part in values.split([2, 0, 4])]
        moments = merge_moments(Moments(torch.stack([part.packed for part in parts])))
        return moments.mean, moments.m2

    assert torch.autograd.gradcheck(merged, values)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_moments_are_one_tensor(leading):
    parts = torch.rand(leading), torch.rand(*leading, 5), torch.rand(*leading, 5)
    moments = Moments.of(*parts)
    assert moments.packed.shape == (*leading, 11)
    for found, expected in zip((moments.count, moments.mean, moments.m2), parts, strict=True):
        assert torch.equal(found, expected)
