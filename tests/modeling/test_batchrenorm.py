"""Batch renormalisation against its equations, step by step, with the bounds of each step."""

import numpy as np
import pytest
import torch

from hf_normswap import accumulate_norm_statistics, fold_norms, swap_norm, update_norm_statistics
from hf_normswap.modeling.norms import BatchNorm, BatchRenorm
from tests.helpers.models import tiny_model
from tests.helpers.norms import assert_gradients_are_those_of_differences, make_tokens
from tests.helpers.persistence import outputs, train


EPS = 1e-3


def bounds_of_step(step):
    """Of a norm with 2 steps of batch normalisation, and bounds of 1.5 and 0.4 from the updates 6 and 4 on."""
    return 1 + min(max((step - 2) / 4, 0), 1) * 0.5, min(max((step - 2) / 2, 0), 1) * 0.4


def make_norm():
    options = {"r_max": 1.5, "d_max": 0.4, "bn_steps": 2, "r_steps": 6, "d_steps": 4}
    norm = BatchRenorm(3, eps=EPS, momentum=0.3, dtype=torch.float64, **options)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(norm.bias)
    return norm


def test_follows_the_equations():
    norm, mask = make_norm(), torch.tensor([[True, True, True, True], [True, True, False, False]])
    mean, variance, clipped = np.zeros(3), np.ones(3), set()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for step in range(9):
        x = (step / 2 + 3 * torch.randn(2, 4, 3, dtype=torch.float64)).requires_grad_()
        upstream = torch.randn(2, 4, 3, dtype=torch.float64) * mask.unsqueeze(-1)
        y = norm(x, mask)
        (dx,) = torch.autograd.grad(y, x, upstream)

        rows, g = x[mask].detach().numpy(), upstream[mask].numpy() * weight
        center, sigma, sigma_run = rows.mean(0), np.sqrt(rows.var(0) + EPS), np.sqrt(variance + EPS)
        r_bound, d_bound = bounds_of_step(step)
        r = np.clip(sigma / sigma_run, 1 / r_bound, r_bound)
        d = np.clip((center - mean) / sigma_run, -d_bound, d_bound)
        clipped |= {(bool(is_r), step > 5) for is_r in r != sigma / sigma_run}
        x_hat = (rows - center) / sigma
        np.testing.assert_allclose(y[mask].detach().numpy(), weight * (r * x_hat + d) + bias, rtol=1e-11, atol=1e-12)
        of_x = r * (g - g.mean(0) - x_hat * (g * x_hat).mean(0)) / sigma
        np.testing.assert_allclose(dx[mask].numpy(), of_x, rtol=1e-9, atol=1e-12)
        mean, variance = 0.7 * mean + 0.3 * center, 0.7 * variance + 0.3 * rows.var(0)
        np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-11)
        np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-11)
    assert len(clipped) > 1
    x = make_tokens(2, 4)[..., :3]
    gain, shift = norm.eval().affine_map()
    expected = weight * (x.numpy() - mean) / np.sqrt(variance + EPS) + bias
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-11)
    torch.testing.assert_close(gain * x + shift, norm(x))


def test_within_the_bounds_training_is_evaluation():
    norm = BatchRenorm(4, r_max=1e6, d_max=1e6, bn_steps=0, r_steps=1, d_steps=1, dtype=torch.float64)
    for seed in range(3):
        norm(make_tokens(2, 4, seed=seed))
    x = make_tokens(2, 4, seed=9)
    expected = norm.eval()(x)
    torch.testing.assert_close(norm.train()(x), expected, rtol=1e-9, atol=1e-12)


def test_it_begins_as_batchnorm():
    ours, theirs = BatchRenorm(4, dtype=torch.float64), BatchNorm(4, dtype=torch.float64)
    for seed in range(3):
        x = make_tokens(2, 4, seed=seed)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-13)
    assert_gradients_are_those_of_differences(BatchRenorm(4, eps=0.1, dtype=torch.float64), None)


def test_micro_batches_count_as_one_step():
    norm = make_norm()
    accumulate_norm_statistics(norm)
    for _ in range(3):
        norm(make_tokens(2, 4)[..., :3])
    assert norm.num_batches_tracked == 0
    update_norm_statistics(norm)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("options", [{"r_max": 0.5}, {"d_max": -1}, {"r_steps": float("inf")}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BatchRenorm(4, **options)


def test_it_folds():
    model = train(swap_norm(tiny_model("gpt2"), "batchrenorm"))
    expected = outputs(model)["logits"]
    assert len(fold_norms(model).folded) == 4
    torch.testing.assert_close(outputs(model)["logits"], expected, rtol=1e-4, atol=1e-5)
