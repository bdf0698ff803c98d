"""PowerNorm against the published code's numbers, Algorithm 2 in numpy, and finite differences."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_normswap import (
    BatchNorm,
    PowerNorm,
    PowerNormV,
    RegularizedBatchNorm,
    accumulate_norm_statistics,
    update_norm_statistics,
)
from tests.helpers import reference
from tests.helpers.persistence import is_one_sentence
from tests.helpers.vectors import load_vectors


CHANNELS = 4
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def make_norm(**options):
    torch.manual_seed(3)
    norm = PowerNorm(CHANNELS, **{"group_scaling": False, **options}).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    return norm


def make_tokens(*shape, generator=None):
    return (1 + 2 * torch.randn(*shape, CHANNELS, dtype=torch.float64, generator=generator)).requires_grad_()


def backpropagate(norm, x, upstream, mask=None):
    """`(y, dx)` of one training step."""
    y = norm(x, mask)
    (dx,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), dx


@pytest.mark.parametrize("file", ["powernorm_groups1", "powernorm_groups4"])
def test_agrees_with_the_published_code(file):
    vectors = load_vectors(file)
    *_, channels, groups, steps = vectors["meta"].tolist()
    alpha, eps = vectors["alpha"].item(), vectors["eps"].item()
    norm = PowerNorm(
        channels, num_groups=groups, grad_scale="batch", alpha_fwd=alpha, alpha_bwd=alpha, eps=eps
    ).double()
    norm.load_state_dict({"weight": vectors["weight"], "bias": vectors["bias"]}, strict=False)
    for step in range(steps):
        x = vectors[f"x{step}"].requires_grad_()
        y = norm(x)
        dx, dw, db = torch.autograd.grad(y, [x, norm.weight, norm.bias], vectors[f"g{step}"])
        results = {"y": y, "dx": dx, "dw": dw, "db": db, "running": norm.running_power, "nu": norm.nu}
        for name, value in results.items():
            torch.testing.assert_close(value.detach(), vectors[f"{name}{step}"], rtol=1e-10, atol=1e-10)
    y = norm.eval()(vectors["x_eval"])
    torch.testing.assert_close(y.detach(), vectors["y_eval"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_500_steps_of_algorithm_2(mask):
    norm = make_norm()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    algorithm = reference.PowerNormalization(CHANNELS, limited=False)  # Γ stays below 10: there is nothing to limit
    real = torch.ones(2, 4, dtype=torch.bool) if mask is None else mask
    for _ in range(500):
        x = (make_tokens(2, 4).detach() / 2).requires_grad_()
        upstream = torch.randn(2, 4, CHANNELS, dtype=torch.float64) * real.unsqueeze(-1)
        y, dx = backpropagate(norm, x, upstream, mask)
        x_hat, expected = algorithm.step(x[real].detach().numpy(), weight * upstream[real].numpy())
        np.testing.assert_allclose(y[real].numpy(), weight * x_hat + bias, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dx[real].numpy(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(norm.running_power.numpy(), algorithm.power, rtol=1e-12)
        np.testing.assert_allclose(norm.nu.numpy(), algorithm.nu, rtol=1e-12, atol=1e-12)
    assert norm.largest_gamma.item() < 10
    assert norm.num_batches_tracked.item() == 500

    expected = weight * x.detach().numpy() / np.sqrt(algorithm.power + 1e-5) + bias
    np.testing.assert_allclose(norm.eval()(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_both_alphas_have_their_own_place():
    norm = make_norm(alpha_fwd=0.7, alpha_bwd=0.6)
    x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
    backpropagate(norm, x, upstream)
    rows, g = x.detach().flatten(0, 1).numpy(), (upstream * norm.weight.detach()).flatten(0, 1).numpy()
    x_hat = rows / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(norm.running_power.numpy(), 0.7 + 0.3 * (rows**2).mean(0), rtol=1e-12)
    size = np.minimum(0.4, 1 / (x_hat**2).mean(0))
    np.testing.assert_allclose(norm.nu.numpy(), size * (g * x_hat).mean(0), rtol=1e-12)


def test_isolated_spikes_do_not_make_nu_explode():
    norm = PowerNorm(1, group_scaling=False).double()
    limited, plain = reference.PowerNormalization(1), reference.PowerNormalization(1, limited=False)
    generator = np.random.default_rng(0)
    largest, largest_plain = 0.0, 0.0
    for step in range(1000):
        x = generator.standard_normal((64, 1)) * (1e4 if step % 50 == 49 else 1)
        g = 0.1 * generator.standard_normal((64, 1))
        backpropagate(norm, torch.tensor(x).requires_grad_(), torch.tensor(g))
        limited.step(x, g)
        with np.errstate(all="ignore"):
            plain.step(x, g)
        largest, largest_plain = max(largest, norm.nu.abs().item()), max(largest_plain, abs(plain.nu[0]))
        np.testing.assert_allclose(norm.nu.numpy(), limited.nu, rtol=1e-9, atol=1e-12)
    assert largest < 1
    assert not largest_plain < 1e20  # what the limit is for
    assert norm.largest_gamma.item() > 1e6


def gradcheck(norm, mask, **options):
    def outputs(x):
        y = norm(x, mask)
        return y if mask is None else y[mask]

    return torch.autograd.gradcheck(outputs, make_tokens(2, 4), **options)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
@pytest.mark.parametrize("options", [{}, {"group_scaling": True, "num_groups": 2}], ids=["plain", "groups"])
def test_gradcheck_with_frozen_statistics(options, mask):
    norm = make_norm(alpha_fwd=1.0, alpha_bwd=1.0, **options)
    norm.running_power.uniform_(0.5, 3)
    assert gradcheck(norm, mask)
    before = norm.running_power.clone()
    norm.nu.uniform_(0.1, 0.5)
    assert not gradcheck(norm, mask, raise_exception=False)
    norm.nu.zero_()
    assert gradcheck(norm, mask)
    norm.grad_scale = "batch"
    assert not gradcheck(norm, mask, raise_exception=False)
    assert torch.equal(norm.running_power, before)
    assert norm.nu.eq(0).all()


@pytest.mark.parametrize("grad_scale", ["running", "batch"])
def test_grad_scale(grad_scale):
    norm = make_norm(grad_scale=grad_scale)
    norm.running_power.uniform_(0.5, 3)
    norm.nu.uniform_(0.1, 0.5)
    before, nu = norm.running_power.clone(), norm.nu.clone()
    x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
    _, dx = backpropagate(norm, x, upstream, MASK)
    x_hat = x.detach() / (before + 1e-5).sqrt()
    power = before if grad_scale == "running" else x.detach()[MASK].square().mean(0)
    expected = (upstream * norm.weight.detach() - nu * x_hat) / (power + 1e-5).sqrt()
    torch.testing.assert_close(dx[MASK], expected[MASK], rtol=1e-12, atol=1e-14)


def test_group_scaling_makes_every_group_of_a_token_one_in_mean_square():
    norm = PowerNorm(6, num_groups=3, eps=0.0).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    groups = x.view(5, 3, 2)
    expected = groups / groups.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x).detach(), expected.view(5, 6), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm.running_power, 0.9 + 0.1 * expected.view(5, 6).square().mean(0))


@pytest.mark.parametrize("grad_scale", ["running", "batch"])
def test_warm_up_is_pnv_and_ends_in_settled_statistics(grad_scale):
    norm, pnv = make_norm(grad_scale=grad_scale), PowerNormV(CHANNELS).double()
    norm.warmup_steps = 15
    pnv.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    power, nu = np.zeros(CHANNELS), np.zeros(CHANNELS)
    for step in range(15):
        x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        upstream[~MASK] = 0
        y, dx = backpropagate(norm, x, upstream, MASK)
        y_pnv, dx_pnv = backpropagate(pnv, x, upstream, MASK)
        assert torch.equal(y, y_pnv)
        torch.testing.assert_close(dx, dx_pnv, rtol=1e-13, atol=1e-15)

        # The mean of the batches so far, later the moving average.
        share = max(1 / (step + 1), 0.1)
        rows, g = x[MASK].detach().numpy(), (upstream * norm.weight.detach())[MASK].numpy()
        x_hat, batch_power = reference.pnv(rows, 1e-5)
        power = power + share * (batch_power - power)
        gamma = (x_hat**2).mean(0)
        size = np.minimum(share, 1 / gamma)
        nu = nu * (1 - size * gamma) + size * (g * x_hat).mean(0)
        np.testing.assert_allclose(norm.running_power.numpy(), power, rtol=1e-12)
        np.testing.assert_allclose(norm.nu.numpy(), nu, rtol=1e-12, atol=1e-14)

    x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
    y, dx = backpropagate(norm, x, upstream)
    x_hat = x.detach() / torch.from_numpy(np.sqrt(power + 1e-5))
    torch.testing.assert_close(y, (x_hat * norm.weight + norm.bias).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("accumulating", [False, True], ids=["at_once", "accumulating"])
def test_a_gradient_that_is_not_finite_leaves_nu_as_it_was(bad, accumulating):
    norm = make_norm()
    x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
    backpropagate(norm, x, upstream)
    before = norm.nu.clone()
    accumulate_norm_statistics(norm, accumulating)
    broken = upstream.clone()
    broken[0, 1, 2] = bad
    backpropagate(norm, x, broken)
    update_norm_statistics(norm)
    assert torch.equal(norm.nu, before)
    backpropagate(norm, x, upstream)
    update_norm_statistics(norm)
    assert norm.nu.isfinite().all()
    assert not torch.equal(norm.nu, before)


def test_activations_that_are_not_finite_leave_the_statistics_as_they_were():
    norm, x = make_norm(), make_tokens(2, 4)
    backpropagate(norm, x, torch.ones_like(x))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with torch.no_grad():
        x[0, 0, 0] = float("inf")
    backpropagate(norm, x, torch.ones_like(x))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nu_carries_the_units_of_the_unscaled_loss():
    plain, scaled = make_norm(), make_norm()
    scaled.loss_scale.fill_(1024)
    for _ in range(4):
        x, upstream = make_tokens(2, 4), torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        _, dx = backpropagate(plain, x, upstream)
        _, dx_scaled = backpropagate(scaled, x, 1024 * upstream)
        torch.testing.assert_close(dx_scaled, 1024 * dx, rtol=1e-12, atol=0)
        torch.testing.assert_close(scaled.nu, plain.nu, rtol=1e-12, atol=0)


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_deferred_statistics_update_once_for_all_micro_batches(warmup_steps):
    """After the warm-up four micro-batches of two are one batch of eight: outputs, gradients and statistics."""
    whole, parts = make_norm(), make_norm()
    for norm in (whole, parts):
        norm.warmup_steps = warmup_steps
        accumulate_norm_statistics(norm)
    for step in range(6):
        x = make_tokens(8, 3)
        upstream, mask = torch.randn(8, 3, CHANNELS, dtype=torch.float64), torch.rand(8, 3) < 0.7
        mask[2:4] = False  # a micro-batch of pads alone
        if step == warmup_steps:  # up to here Γ and Λ were those of PN-V's x̂, each micro-batch its own
            parts.nu.copy_(whole.nu)
        y, dx = backpropagate(whole, x, upstream, mask)
        pairs = [
            backpropagate(parts, x_part.detach().requires_grad_(), *rest)
            for x_part, *rest in zip(x.split(2), upstream.split(2), mask.split(2), strict=True)
        ]
        for norm in (whole, parts):
            update_norm_statistics(norm)
        if step >= warmup_steps:
            torch.testing.assert_close(torch.cat([part for part, _ in pairs]), y, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(torch.cat([part for _, part in pairs]), dx, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(parts.running_power, whole.running_power, rtol=1e-12, atol=0)
        if step >= warmup_steps:
            torch.testing.assert_close(parts.nu, whole.nu, rtol=1e-12, atol=1e-14)
        assert parts.num_batches_tracked.item() == step + 1


@pytest.mark.parametrize("power", [1, 3], ids=["of_a_constant_gradient", "of_a_gradient"])
def test_a_second_derivative_is_refused(power):
    """Also where the gradient that reaches the norm is a constant: 0 would be wrong, and come without a word."""
    norm, x = make_norm(), make_tokens(2, 4)
    (dx,) = torch.autograd.grad(norm(x).pow(power).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*use pnv or batchnorm") as error:
        torch.autograd.grad(dx.square().sum(), x)
    assert is_one_sentence(error.value)


def test_a_hessian_is_refused():
    norm, x = make_norm(), make_tokens(1, 2).detach()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda x: norm(x).pow(3).sum(), x)


def test_a_graph_of_the_gradient_alone_is_no_second_derivative():
    norm, other = make_norm(), make_norm()
    for x in make_tokens(2, 4), make_tokens(2, 4):
        upstream = torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        y = norm(x)
        (dx,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        expected_y, expected = backpropagate(other, x, upstream)
        assert torch.equal(y, expected_y)
        assert torch.equal(dx, expected)
        assert torch.equal(norm.nu, other.nu)


@pytest.mark.parametrize("cls", [BatchNorm, RegularizedBatchNorm, PowerNormV, PowerNorm])
def test_transforms_of_torch_func_are_refused_in_training(cls):
    norm, x = cls(CHANNELS), torch.randn(2, 3, CHANNELS)
    transforms = [
        lambda: torch.func.grad(lambda x: norm(x).sum())(x),
        lambda: torch.func.vmap(norm)(x),
        lambda: torch.func.jacrev(norm)(x),
        lambda: torch.func.jvp(norm, (x,), (x,)),
    ]
    before = {name: value.clone() for name, value in norm.named_buffers()}
    for transform in transforms:
        with pytest.raises(RuntimeError, match=f"torch.func cannot transform a {cls.__name__} in training") as error:
            transform()
        assert is_one_sentence(error.value)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    assert norm.records == ()
    norm.eval()
    for transform in transforms:
        transform()


def test_momentum_is_the_weight_of_the_batch():
    by_alpha, by_momentum = make_norm(alpha_fwd=0.5), make_norm()
    by_momentum.momentum = 0.5
    assert by_momentum.alpha_fwd == 0.5
    assert make_norm(alpha_fwd=0.3).alpha_fwd == 0.3
    assert make_norm(alpha_fwd=0.3).momentum == 0.7
    for _ in range(3):
        x = make_tokens(2, 4)
        by_alpha(x)
        by_momentum(x)
        assert torch.equal(by_alpha.running_power, by_momentum.running_power)


@pytest.mark.parametrize("accumulating", [False, True], ids=["at_once", "accumulating"])
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_without_momentum_psi_stays(accumulating, warmup_steps):
    norm = make_norm()
    backpropagate(norm, make_tokens(2, 4), torch.ones(2, 4, CHANNELS, dtype=torch.float64))
    norm.momentum, norm.warmup_steps = 0.0, warmup_steps
    accumulate_norm_statistics(norm, accumulating)
    power, nu = norm.running_power.clone(), norm.nu.clone()
    for _ in range(2):
        backpropagate(norm, make_tokens(2, 4), torch.ones(2, 4, CHANNELS, dtype=torch.float64))
        update_norm_statistics(norm)
    assert torch.equal(norm.running_power, power)
    assert not torch.equal(norm.nu, nu)  # it has a weight of its own


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="10 channels cannot be divided into 3 groups: choose"):
        PowerNorm(10, num_groups=3)
    assert PowerNorm(10, num_groups=3, group_scaling=False)(torch.randn(2, 10)).shape == (2, 10)
    with pytest.raises(ValueError, match='"running" or "batch", not \'mean\''):
        PowerNorm(10, grad_scale="mean")
