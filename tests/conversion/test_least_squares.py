"""Fits over batches of tokens against numpy's least squares on all real tokens at once."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_normswap.conversion.least_squares import RIDGE, fit_affine, fit_correction, pooled_moments


CHANNELS = 3
MASKS = [None, torch.tensor([[True, True, False], [True, False, False]]), torch.zeros(2, 3, dtype=torch.bool)]


@pytest.fixture
def tokens():
    """Batches `(x, target, mask)` with all, some and no real tokens, and the rows of those; channel 0 is constant."""
    batches = []
    for mask in MASKS:
        x = 4 + torch.randn(2, 3, CHANNELS, dtype=torch.float64)
        x[..., 0] = 2.0
        target = 0.3 * x + torch.randn(2, 3, CHANNELS, dtype=torch.float64)
        if mask is not None:
            x[~mask], target[~mask] = torch.nan, torch.inf
        batches.append((x, target, mask))
    x, target = (
        torch.cat([values[place].flatten(0, -2) if mask is None else values[place][mask] for *values, mask in batches])
        for place in (0, 1)
    )
    return batches, x.numpy(), target.numpy()


def test_moments_of_all_batches(tokens):
    batches, x, _ = tokens
    moments = pooled_moments(((values, mask) for values, _, mask in batches), CHANNELS, "cpu")
    assert moments.count == len(x) == 9
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.var, x.var(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("intercept", [True, False])
def test_a_gain_and_a_shift_for_each_channel(tokens, intercept):
    batches, x, target = tokens
    fit = fit_affine(batches, CHANNELS, "cpu", intercept)
    for channel in range(CHANNELS):
        column = x[:, channel]
        if intercept and channel == 0:  # no gain fits a constant better than another
            gain, shift = 0.0, target[:, 0].mean()
        elif intercept:
            design = np.stack([column, np.ones(len(x))], axis=1)
            gain, shift = np.linalg.lstsq(design, target[:, channel], rcond=None)[0]
        else:
            gain, shift = np.linalg.lstsq(column[:, None], target[:, channel], rcond=None)[0][0], 0.0
        left = target[:, channel] - gain * column - shift
        assert fit.gain[channel].item() == pytest.approx(gain, rel=1e-9)
        assert fit.shift[channel].item() == pytest.approx(shift, rel=1e-9, abs=1e-12)
        assert fit.residual[channel].item() == pytest.approx((left**2).mean(), rel=1e-9)
    np.testing.assert_allclose(fit.target.mean, target.mean(0), rtol=1e-12)


def make_linear(kind):
    made = {"Linear": nn.Linear(4, 2), "without bias": nn.Linear(4, 2, bias=False), "Conv1D": Conv1D(2, 4)}
    return made[kind].double()


@pytest.mark.parametrize("number", [30, 3])  # more tokens than inputs, and fewer
@pytest.mark.parametrize("kind", ["Linear", "without bias", "Conv1D"])
def test_a_correction_is_a_ridge_regression(kind, number):
    """As least squares with a row more for each input that draws its weights to 0.

    Tokens are centered where there is a bias; else the weight has to take the mean of the residual away.
    """
    x = 1 + torch.randn(number, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    residual = x @ torch.randn(4, 2, dtype=torch.float64) + torch.randn(number, 2, dtype=torch.float64) + 3
    weight, bias = fit_correction(make_linear(kind), [(x[:2], residual[:2]), (x[2:], residual[2:])])

    x, residual = x.numpy(), residual.numpy()
    means = [values.mean(0) * (kind != "without bias") for values in (x, residual)]
    pull = RIDGE * 4 * ((x - means[0]) ** 2).mean()
    design = np.concatenate([x - means[0], np.sqrt(pull) * np.eye(4)])
    wanted = np.concatenate([residual - means[1], np.zeros((4, 2))])
    expected = np.linalg.lstsq(design, wanted, rcond=None)[0]
    np.testing.assert_allclose(weight, expected, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(bias, means[1] - means[0] @ expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["Linear", "without bias", "Conv1D"])
def test_no_tokens_change_nothing(kind):
    weight, bias = fit_correction(make_linear(kind), [])
    assert weight.shape == (4, 2)
    assert bias.shape == (2,)
    assert not weight.any()
    assert not bias.any()
