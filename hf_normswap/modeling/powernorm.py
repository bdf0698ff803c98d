"""Power normalisation: running quadratic mean in the forward, running gradient statistic in the backward."""

import torch
from torch.autograd.function import once_differentiable

from .moments import Moments, count_tokens, masked_moments, merge_over_ranks, sum_tokens
from .norm import PowerStatisticNorm
from .ranks import sum_over_ranks
from .registry import register_norm


@register_norm("powernorm", "pn")
class PowerNorm(PowerStatisticNorm):
    """Power normalisation (Shen et al., ICML 2020, arXiv 2003.07845, Algorithm 2).

    Training divides by the running ψ from before the batch, `x̂ = x / √(ψ² + ε)`, `y = γ x̂ + β`. In place of
    the gradient through the batch's statistic stands a running one, `dx = (g − ν x̂) / √(ψ² + ε)`, `g = γ dL/dy`. Then

    - `ψ² ← α ψ² + (1 − α) mean(x²)`
    - `ν ← ν (1 − s Γ) + s Λ`, with `Γ = mean(x̂²)`, `Λ = mean(g x̂)` and `s = min(1 − α, 1 / Γ)`: Algorithm 2 itself
      while `(1 − α) Γ ≤ 1`, and bounded where a spike of a channel's power would make it explode.

    All means are over real tokens. The gradient is an approximation by design. During the first `warmup_steps` updates
    (an attribute, 0 until a trainer sets it) the layer is PN-V while ψ and ν settle.

    Args:
        num_features (`int`): number of channels.
        num_groups (`int`, *optional*, defaults to 1):
            groups of channels of the group scaling; a swap takes the number of attention heads.
        group_scaling (`bool`, *optional*, defaults to `True`):
            first divide each token by the root mean square of each of its groups (the paper's appendix, always on in
            the published code). It needs a statistic of each token at inference; without it training is less stable.
        grad_scale (`str`, *optional*, defaults to `"running"`):
            `"running"`: the gradient is divided by ψ, as in the paper; `"batch"`: by this batch's ψ_B, as in the code
            behind the published BLEU.
        alpha_fwd, alpha_bwd (`float`, *optional*, defaults to 0.9): α of ψ² and of ν.
        eps (`float`, *optional*, defaults to 1e-5): added to ψ².
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.

    Raises:
        ValueError: when `num_features` is not divisible by `num_groups`.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap import PowerNorm
    >>> norm = PowerNorm(768, num_groups=12)
    >>> x, mask = torch.randn(8, 16, 768), torch.ones(8, 16, dtype=torch.bool)
    >>> norm(x, mask).shape
    torch.Size([8, 16, 768])

    ```
    """

    running = {"running_power": 1.0, "nu": 0.0}
    calibrated_options = {"group_scaling": False}

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 1,
        group_scaling: bool = True,
        grad_scale: str = "running",
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        **kwargs,
    ):
        if group_scaling and num_features % num_groups:
            raise ValueError(
                f"{num_features} channels cannot be divided into {num_groups} groups: "
                "choose num_groups among the divisors, or group_scaling=False."
            )
        if grad_scale not in ("running", "batch"):
            raise ValueError(f'grad_scale must be "running" or "batch", not {grad_scale!r}.')
        super().__init__(num_features, momentum=1 - alpha_fwd, **kwargs)
        self.num_groups, self.group_scaling, self.grad_scale = num_groups, group_scaling, grad_scale
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.warmup_steps = 0
        dtype, device = self.running_power.dtype, self.running_power.device
        self._register_pending("pending_gradient", dtype, device)
        for name, value in (("loss_scale", 1.0), ("largest_gamma", 0.0)):
            self.register_buffer(name, torch.full((), value, dtype=dtype, device=device), persistent=False)

    @classmethod
    def option_defaults(cls):
        return {name: default for name, default in super().option_defaults().items() if name != "momentum"}

    @classmethod
    def default_options(cls, config):
        return {"num_groups": config.num_attention_heads, "group_scaling": True}

    def affine_map(self):
        return None if self.group_scaling else super().affine_map()

    def discard_pending(self):
        super().discard_pending()
        self.pending_gradient.zero_()

    def normalize(self, x, mask):
        if self.group_scaling:
            groups = x.unflatten(-1, (self.num_groups, -1))
            x = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        if not self.training:
            self.statistics = None
            return x * torch.rsqrt(self.running_power + self.eps)
        running, is_first_run = self.frozen_running()
        moments = masked_moments(x.detach(), mask)
        if self.process_group is not None:
            moments = merge_over_ranks(moments, self.process_group)
        warm = running["num_batches_tracked"] < self.warmup_steps
        batch_inverse = torch.rsqrt(moments.power + self.eps)
        inverse = torch.where(warm, batch_inverse, torch.rsqrt(running["running_power"] + self.eps))
        x_hat = _PowerScale.apply(
            x,
            mask,
            inverse,
            batch_inverse,
            running["nu"] * self.loss_scale,
            warm,
            self._weight(self.alpha_bwd, running["num_batches_tracked"]),
            self,
        )
        self.observe(moments, running, is_first_run)
        return x_hat

    def _weight(self, alpha: float, step: torch.Tensor) -> torch.Tensor:
        """1 − α; during warm-up that of a cumulative mean as long as it is larger."""
        cumulative = (1 / (step.to(self.nu.dtype) + 1)).clamp(min=1 - alpha)
        return torch.where(step < self.warmup_steps, cumulative, 1 - alpha)

    def update_weight(self):
        return self._weight(self.alpha_fwd, self.num_batches_tracked)

    def update_gradient_statistic(self, sums: torch.Tensor) -> None:
        """One update of ν with the pooled `(n, Σ x̂², Σ g x̂)` of a deferred layer."""
        weight = self._weight(self.alpha_bwd, self.num_batches_tracked)
        _update_nu(self.nu, self.largest_gamma, sums, weight, self.loss_scale)

    def extra_repr(self):
        groups = f", num_groups={self.num_groups}" if self.group_scaling else ", group_scaling=False"
        return super().extra_repr() + groups


@torch.no_grad()
def _update_nu(nu, largest_gamma, sums, weight, loss_scale) -> None:
    count, gamma, lambda_ = Moments.unpack(sums)
    gamma = gamma / count.clamp(min=1)
    lambda_ = lambda_ / (count.clamp(min=1) * loss_scale)  # ν carries the units of the unscaled loss
    step = torch.minimum(weight, 1 / gamma)
    new = nu * (1 - step * gamma) + step * lambda_
    # One overflow under a loss scale must not make ν NaN for good.
    valid = (count > 0) & gamma.isfinite().all() & lambda_.isfinite().all()
    nu.copy_(torch.where(valid, new, nu))
    largest_gamma.copy_(torch.where(valid, torch.maximum(largest_gamma, gamma.max()), largest_gamma))


class _PowerScale(torch.autograd.Function):
    """x̂ = x · inverse, with PowerNorm's backward; Γ and Λ go to the buffers of the layer during that backward."""

    @staticmethod
    def forward(x, mask, inverse, batch_inverse, nu, warm, weight, layer):
        return x * inverse

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, inverse, batch_inverse, nu, warm, weight, layer = inputs
        grad_inverse = batch_inverse if layer.grad_scale == "batch" else inverse
        ctx.save_for_backward(output, mask, inverse, grad_inverse, nu, warm, weight)
        ctx.deferred = layer.deferred
        # Not saved for backward: updated there on purpose.
        ctx.nu, ctx.largest_gamma, ctx.loss_scale = layer.nu, layer.largest_gamma, layer.loss_scale
        ctx.pending, ctx.group = layer.pending_gradient, layer.process_group

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x_hat, mask, inverse, grad_inverse, nu, warm, weight = ctx.saved_tensors
        count = count_tokens(x_hat, mask)
        products = sum_tokens(g * x_hat, mask)
        sums = torch.cat([count.unsqueeze(0), sum_tokens(x_hat.square(), mask), products])
        if ctx.deferred:
            ctx.pending.add_(sums)
        else:
            _update_nu(ctx.nu, ctx.largest_gamma, sums, weight, ctx.loss_scale)
        if ctx.group is not None:
            count, products = sum_over_ranks(torch.cat([count.unsqueeze(0), products]), ctx.group).split([1, len(nu)])
        nu = torch.where(warm, products / count.clamp(min=1), nu)  # PN-V's own gradient during warm-up
        dx = (g - nu * x_hat) * grad_inverse
        if mask is not None:
            dx = torch.where(mask.unsqueeze(-1), dx, g * inverse)
        return dx, None, None, None, None, None, None, None
