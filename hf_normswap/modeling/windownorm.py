"""Norms on the second moment, averaged over the last batches: MABN and UN."""

import torch

from .activation_checkpointing import replay_or_record, snapshot
from .autograd import NormalizeByWindow, mean_of_window
from .base import GradientStatisticNorm
from .moments import Moments
from .registry import check_number, register_norm


CORRECTED_FROM = 1000  # updates before training is corrected to the running value, in the code of both papers
LARGEST_CORRECTION = 5.0


class WindowNorm(GradientStatisticNorm):
    """Base of the norms that average the statistics of the forward and of the backward over a window of batches.

    Until `warmup_steps` updates, and until the window is full, the batch is alone. A window has one row for each
    update: the micro-batches of an accumulated step are one batch in it. Each of them is normalised with its own
    second moment in the place of that row.

    Args:
        window (`int`): number m of batches.
        warmup_steps (`int`): updates with the statistics of the batch alone.
    """

    is_geometric: bool  # whether the window has the geometric mean in the forward, and a running one in the backward

    def __init__(self, num_features: int, *, window: int, warmup_steps: int, **kwargs):
        super().__init__(num_features, **kwargs)
        check_number("warmup_steps", warmup_steps)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window is a number of batches, at least 1, and cannot be {window!r}.")
        self.window, self.warmup_steps = window, warmup_steps
        for name in ("power_window", "gradient_window"):
            self.register_buffer(name, self.running_power.new_zeros(window, num_features))
        if self.is_geometric:
            self.register_buffer("gradient_mean", torch.zeros_like(self.running_power))

    def normalize(self, x, mask):
        return x * torch.rsqrt(self.running_power + self.eps)

    def forward_train(self, x, mask):
        self.refuse_transforms()
        running, is_first_run = self.running_snapshot()
        tracks, _ = replay_or_record(lambda: not self.paused)
        y, moments = NormalizeByWindow.apply(x, self.weight, self.bias, mask, running, tracks, self)
        self.record_batch(Moments(moments), running, is_first_run)
        return y

    def copy_running(self):
        names = (*self.running, "power_window", "gradient_window", "num_batches_tracked")
        names += ("gradient_mean",) if self.is_geometric else ()
        return {name: snapshot(getattr(self, name)) for name in names}

    def is_settled(self, step: torch.Tensor) -> torch.Tensor:
        """Whether the window has a part in a batch after so many updates."""
        return step + 1 >= max(self.window + 1, self.warmup_steps)

    def power_of(self, moments: Moments, power_window, step, running_power) -> torch.Tensor:
        """The second moment to divide by; the running one where there are no tokens."""
        mean = mean_of_window(power_window, step, moments.power, self.is_geometric)
        power = torch.where(self.is_settled(step), mean, moments.power)
        return torch.where(moments.count > 0, power, running_power)

    def correction(self, power, step, running_power) -> torch.Tensor:
        """r, the ratio of that second moment to the running one, both under a root; 1 in the first updates."""
        ratio = ((power + self.eps) / (running_power + self.eps)).sqrt()
        ratio = ratio.clamp(1 / LARGEST_CORRECTION, LARGEST_CORRECTION)
        return torch.where(step + 1 > max(CORRECTED_FROM, self.warmup_steps), ratio, 1)

    @torch.no_grad()
    def update_statistics(self, moments, weight=None):
        step, batch = self.num_batches_tracked, moments.power.to(self.running_power.dtype)
        power = self.power_of(moments, self.power_window, step, self.running_power) if weight is None else batch
        valid = (moments.count > 0) & batch.sum().isfinite()
        weight = self.momentum if weight is None else weight
        self.running_power.lerp_(torch.where(valid, power.to(batch.dtype), self.running_power), weight)
        _put(self.power_window, step, batch, valid)
        step.add_(valid)

    @torch.no_grad()
    def update_gradient_statistic(self, sums):
        sums = Moments(sums)  # of the same layout
        batch = sums.m2 / (sums.count.clamp(min=1) * self.loss_scale)
        self.put_gradient(batch, self.num_batches_tracked, sums.count > 0)

    def put_gradient(self, batch: torch.Tensor, step: torch.Tensor, has_tokens: torch.Tensor) -> None:
        """Take in the statistic of the gradient of one batch, of a loss that is not scaled."""
        valid = has_tokens & batch.sum().isfinite()
        if self.is_geometric:
            mean = torch.where(self.is_settled(step), mean_of_window(self.gradient_window, step, batch), batch)
            self.gradient_mean.lerp_(torch.where(valid, mean, self.gradient_mean), self.momentum)
        _put(self.gradient_window, step, batch, valid)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


@register_norm("mabn")
class MABN(WindowNorm):
    """Moving average batch normalisation (Yan et al., ICLR 2020, arXiv 2001.06838): `y = γ r x / √(χ² + ε) + β`.

    χ² is the mean of the last m batches' mean(x²), this one included. In the backward stands the mean of the last m
    batches' `mean(g x̂)`, `dx = (g − x̂ · mean) / √(χ² + ε)`, with `x̂ = x / √(χ² + ε)` and `g = γ r dL/dy`. r is the
    ratio of √(χ² + ε) to the running one, between 0.2 and 5, and has no gradient. The gradient is an approximation by
    design, and has no second derivative. The paper also centres the weights of the layer in front: that is no part of
    a norm, and left out.

    Args:
        num_features (`int`): number of channels.
        window (`int`, *optional*, defaults to 16): number m of batches.
        warmup_steps (`int`, *optional*, defaults to 100): updates with the statistics of the batch alone (PN-V).
        eps (`float`, *optional*, defaults to 1e-5): added to χ².
        momentum (`float`, *optional*, defaults to 0.02): weight of χ² in the running value.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
    """

    is_geometric = False

    def __init__(
        self, num_features: int, *, window: int = 16, warmup_steps: int = 100, momentum: float = 0.02, **kwargs
    ):
        super().__init__(num_features, window=window, warmup_steps=warmup_steps, momentum=momentum, **kwargs)


@register_norm("unifiednorm", "un")
class UnifiedNorm(WindowNorm):
    """Unified normalisation (Yang et al., ACM MM 2022): `y = γ x / √(χ² + ε) + β`.

    χ² is the geometric mean of the last m batches' mean(x²), this one included. In the backward stands an average over
    updates, `dx = (g − x̂ · average) / √(χ² + ε)`, with `x̂ = x / √(χ² + ε)` and `g = γ r dL/dy`: the average, with
    weight `momentum`, of the mean of the last m batches' `mean(g x̂)`. r is the ratio of √(χ² + ε) to the running one,
    between 0.2 and 5. The gradient is an approximation by design, and has no second derivative; that of γ is exact.
    The filter of outliers, which the authors advise against in text, is left out.

    Args:
        num_features (`int`): number of channels.
        window (`int`, *optional*, defaults to 4): number m of batches.
        warmup_steps (`int`, *optional*, defaults to 4000): updates in whose forward the batch is alone.
        eps (`float`, *optional*, defaults to 1e-5): added to χ².
        momentum (`float`, *optional*, defaults to 0.1): weight of a batch in the running values.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
    """

    is_geometric = True

    def __init__(self, num_features: int, *, window: int = 4, warmup_steps: int = 4000, **kwargs):
        super().__init__(num_features, window=window, warmup_steps=warmup_steps, **kwargs)


def _put(window: torch.Tensor, step: torch.Tensor, batch: torch.Tensor, valid: torch.Tensor) -> None:
    """Write the row of a step, in place and without waiting for the device."""
    slot = (step % len(window)).view(1)
    row = torch.where(valid, batch.to(window.dtype), window.index_select(0, slot)[0])
    window.index_copy_(0, slot, row.unsqueeze(0))
