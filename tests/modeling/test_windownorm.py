"""MABN and UN against their published algorithms, written as plain loops over the steps."""

import numpy as np
import pytest
import torch

from hf_normswap import (
    accumulate_norm_statistics,
    calibrate,
    find_norms,
    fold_norms,
    pause_norm_statistics,
    swap_norm,
    update_norm_statistics,
)
from hf_normswap.modeling import windownorm
from hf_normswap.modeling.norms import MABN, UnifiedNorm
from tests.helpers.calibration import batches, stock
from tests.helpers.models import tiny_model
from tests.helpers.norms import MASK, assert_same, make_tokens, train_step
from tests.helpers.persistence import outputs, same, train


EPS, MOMENTUM, WINDOW, WARMUP = 1e-3, 0.2, 3, 5
both = pytest.mark.parametrize("cls", [MABN, UnifiedNorm])


def make_norm(cls):
    torch.manual_seed(1)
    norm = cls(4, eps=EPS, momentum=MOMENTUM, window=WINDOW, warmup_steps=WARMUP, dtype=torch.float64)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(norm.bias)
    return norm


class Published:
    """The code of the authors on rows of real tokens, `(n, C)`: its counter begins at 1."""

    def __init__(self, norm, corrected_from):
        self.is_un, self.corrected_from = isinstance(norm, UnifiedNorm), corrected_from
        self.weight, self.bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        self.running, self.average, self.iteration = np.ones(4), np.zeros(4), 0
        self.powers, self.gradients = [], []

    def step(self, x, upstream):
        """`(y, dx, gradient of the gain)`."""
        self.iteration += 1
        self.powers = [*self.powers, (x**2).mean(0)][-WINDOW:]
        alone = self.iteration <= WINDOW or self.iteration < WARMUP
        mean = np.exp(np.log(self.powers).mean(0)) if self.is_un else np.mean(self.powers, 0)
        power = self.powers[-1] if alone else mean
        z = x / np.sqrt(power + EPS)
        r = np.ones(4)
        if self.iteration > max(self.corrected_from, WARMUP):
            r = np.clip(np.sqrt(power + EPS) / np.sqrt(self.running + EPS), 1 / 5, 5)
        self.running = (1 - MOMENTUM) * self.running + MOMENTUM * power

        g = upstream * self.weight * r
        self.gradients = [*self.gradients, (g * z).mean(0)][-WINDOW:]
        statistic = self.gradients[-1] if alone else np.mean(self.gradients, 0)
        if self.is_un:
            statistic = self.average = (1 - MOMENTUM) * self.average + MOMENTUM * statistic
        factor = 1 if self.is_un else r
        y = self.weight * factor * z + self.bias
        return y, (g - z * statistic) / np.sqrt(power + EPS), (upstream * factor * z).sum(0)


@both
def test_follows_the_published_code(cls, monkeypatch):
    monkeypatch.setattr(windownorm, "CORRECTED_FROM", 6)
    norm = make_norm(cls)
    expected = Published(norm, 6)
    for step in range(12):
        # The size of the batches grows: the ratio to the running value is not 1.
        x = (make_tokens(2, 4, seed=step) * 1.3**step).requires_grad_()
        upstream = make_tokens(2, 4, seed=50 + step) * MASK.unsqueeze(-1)
        y = norm(x, MASK)
        dx, dweight = torch.autograd.grad(y, [x, norm.weight], upstream)
        of_y, of_x, of_weight = expected.step(x[MASK].detach().numpy(), upstream[MASK].numpy())
        np.testing.assert_allclose(y[MASK].detach().numpy(), of_y, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(dx[MASK].numpy(), of_x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(dweight.numpy(), of_weight, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(norm.running_power.numpy(), expected.running, rtol=1e-11)
    assert norm.num_batches_tracked == 12
    x = make_tokens(2, 4)
    y = norm.weight.detach().numpy() * x.numpy() / np.sqrt(expected.running + EPS) + norm.bias.detach().numpy()
    np.testing.assert_allclose(norm.eval()(x).detach().numpy(), y, rtol=1e-11)
    gain, shift = norm.affine_map()
    np.testing.assert_allclose((gain * x + shift).detach().numpy(), y, rtol=1e-11)


@both
def test_pads_have_the_gradient_of_the_affine_map_under_a_correction(cls, monkeypatch):
    monkeypatch.setattr(windownorm, "CORRECTED_FROM", 0)
    norm = make_norm(cls)
    for step in range(8):
        x = make_tokens(2, 4, seed=step) * 1.5**step
        results = train_step(norm, x, torch.ones(2, 4, 4, dtype=torch.float64), MASK)
    slope = (results["y"][1, 3] - results["y"][1, 2]) / (x[1, 3] - x[1, 2])
    torch.testing.assert_close(results["dx"][~MASK], slope.expand(2, 4), rtol=1e-9, atol=0)


@both
def test_an_accumulated_step_is_a_step(cls):
    at_once, accumulating = make_norm(cls), make_norm(cls)
    accumulate_norm_statistics(accumulating)
    for step in range(8):
        x, upstream = make_tokens(2, 4, seed=step), make_tokens(2, 4, seed=50 + step)
        expected = train_step(at_once, x, upstream, MASK)
        results = train_step(accumulating, x, upstream, MASK)
        update_norm_statistics(accumulating)
        results |= {name: value.clone() for name, value in accumulating.named_buffers()}
        assert_same(expected, results, rtol=1e-10, atol=1e-12)


@both
def test_windows_are_of_a_loss_that_is_not_scaled(cls):
    plain, scaled = make_norm(cls), make_norm(cls)
    scaled.loss_scale.fill_(512.0)
    for step in range(8):
        x, upstream = make_tokens(2, 4, seed=step), make_tokens(2, 4, seed=50 + step)
        expected, results = train_step(plain, x, upstream), train_step(scaled, x, 512 * upstream)
        for name in ("dx", "dweight"):
            torch.testing.assert_close(results[name] / 512, expected[name], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(scaled.gradient_window, plain.gradient_window, rtol=1e-10, atol=1e-13)


@both
def test_paused_and_overflowing_batches_leave_windows_alone(cls):
    norm = make_norm(cls)
    train_step(norm, make_tokens(2, 4), make_tokens(2, 4, seed=1))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    with pause_norm_statistics(norm):
        train_step(norm, make_tokens(2, 4, seed=2), make_tokens(2, 4, seed=3))
    assert_same(before, dict(norm.named_buffers()))
    x = make_tokens(2, 4, seed=2)
    x[0, 0, 0] = torch.inf
    norm(x)
    assert_same(before, dict(norm.named_buffers()))


@both
def test_no_second_derivative(cls):
    norm, x = make_norm(cls), make_tokens(2, 4).requires_grad_()
    (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@both
def test_options_and_defaults(cls):
    assert (cls(4).window, cls(4).warmup_steps, cls(4).momentum) == (
        (16, 100, 0.02) if cls is MABN else (4, 4000, 0.1)
    )
    with pytest.raises(ValueError, match="window is a number of batches"):
        cls(4, window=0)


@both
def test_windows_are_saved(cls, tmp_path):
    model = train(swap_norm(tiny_model("bert"), cls.norm_name))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    first, second = train(model), train(loaded)
    assert same(first.state_dict(), second.state_dict())
    assert all(site.module.power_window[:4].all() for site in find_norms(second) if site.kind == cls.norm_name)


@both
def test_it_calibrates_and_folds(cls):
    model, data = stock("gpt2"), batches(stock("gpt2"))
    before = outputs(model, data[0])["logits"]
    report = calibrate(swap_norm(model, cls.norm_name), data)
    assert all(fit.r2 > 0.5 for fit in report)
    expected = outputs(model, data[0])["logits"]
    assert (expected - before).norm() / before.norm() < 0.5
    assert len(fold_norms(model).folded) == 4
    torch.testing.assert_close(outputs(model, data[0])["logits"], expected, rtol=1e-6, atol=1e-8)
