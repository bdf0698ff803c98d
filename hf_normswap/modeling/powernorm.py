"""Power normalisation: running quadratic mean in the forward, running gradient statistic in the backward."""

import math

import torch

from .activation_checkpointing import replay_or_record, snapshot
from .autograd import PowerNormalize
from .backends import get_backend, scale_groups
from .base import GradientStatisticNorm, PowerStatisticNorm
from .moments import Moments
from .registry import check_number, register_norm


WARMUP_RATIO = 0.1  # share of the steps of a training, where a trainer is not told another


@register_norm("powernorm", "pn")
class PowerNorm(GradientStatisticNorm):
    """Power normalisation (Shen et al., ICML 2020, arXiv 2003.07845, Algorithm 2).

    Training divides by the running ψ from before the batch, `x̂ = x / √(ψ² + ε)`, `y = γ x̂ + β`. In place of
    the gradient through the batch's statistic stands a running one, `dx = (g − ν x̂) / √(ψ² + ε)`, `g = γ dL/dy`. Then

    - `ψ² ← α ψ² + (1 − α) mean(x²)`
    - `ν ← ν (1 − s Γ) + s Λ`, with `Γ = mean(x̂²)`, `Λ = mean(g x̂)` and `s = min(1 − α, 1 / Γ)`: Algorithm 2 itself
      while `(1 − α) Γ ≤ 1`, and bounded where a spike of a channel's power would make it explode.

    All means are over real tokens. The gradient is an approximation by design, and has no second derivative.

    While ψ and ν settle, the layer is PN-V: until `num_batches_tracked`, the number of its updates, has come to
    `warmup_steps` (an attribute, 0 until a trainer sets it).

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
        alpha_fwd, alpha_bwd (`float`, *optional*, defaults to 0.9):
            α of ψ² and of ν. As an attribute, `momentum` is 1 − α of ψ²: with 0, ψ stays as it is.
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

    scope = ("token", "batch")
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
        check_number("alpha_fwd", alpha_fwd, high=1)
        check_number("alpha_bwd", alpha_bwd, high=1)
        if group_scaling and (not isinstance(num_groups, int) or num_groups < 1 or num_features % num_groups):
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
        self.register_buffer("largest_gamma", torch.zeros_like(self.loss_scale), persistent=False)

    @classmethod
    def option_defaults(cls):
        return {name: default for name, default in super().option_defaults().items() if name != "momentum"}

    @classmethod
    def default_options(cls, config, num_features):
        # As many groups as heads; in a norm of another width, or in a model without heads, as many of them as fit.
        heads = getattr(config, "num_attention_heads", None)
        return {"num_groups": math.gcd(heads, num_features) if isinstance(heads, int) else 1, "group_scaling": True}

    def affine_map(self):
        return None if self.group_scaling else super().affine_map()

    @property
    def momentum(self) -> float:
        """Weight of a batch in ψ², 1 − `alpha_fwd`."""
        return 1 - self.alpha_fwd

    @momentum.setter
    def momentum(self, weight: float) -> None:
        self.alpha_fwd = 1 - weight

    @property
    def groups(self) -> int:
        """Groups of the group scaling, 0 without one."""
        return self.num_groups if self.group_scaling else 0

    def normalize(self, x, mask):
        x, _ = scale_groups(x, self.groups, self.eps)
        return x * torch.rsqrt(self.running_power + self.eps)

    def forward_train(self, x, mask):
        self.refuse_transforms()
        running, is_first_run = self.running_snapshot()
        tracks, _ = replay_or_record(lambda: not self.paused)
        step, _ = replay_or_record(lambda: snapshot(self.num_batches_tracked)) if self.warmup_steps else (None, None)
        y, moments = PowerNormalize.apply(
            x,
            self.weight,
            self.bias,
            mask,
            running["running_power"],
            running["nu"] * self.loss_scale,
            None if step is None else step < self.warmup_steps,
            self._weight(1 - self.alpha_bwd, step),
            self.groups,
            self.eps,
            tracks,
            self,
        )
        self.record_batch(Moments(moments), running, is_first_run)
        return y

    def _weight(self, weight: float, step: torch.Tensor | None) -> float | torch.Tensor:
        """`weight` of a batch; during warm-up that of a cumulative mean as long as it is larger. 0 stays 0."""
        if not self.warmup_steps or not weight:
            return weight
        cumulative = (1 / (step.to(self.nu.dtype) + 1)).clamp(min=weight)
        return torch.where(step < self.warmup_steps, cumulative, weight)

    def update_weight(self):
        return self._weight(self.momentum, self.num_batches_tracked)

    def update_gradient_statistic(self, sums):
        weight = self._weight(1 - self.alpha_bwd, self.num_batches_tracked)
        with torch.no_grad():
            get_backend(self.nu, sums).update_nu(self.nu, self.largest_gamma, sums, weight, self.loss_scale)

    def extra_repr(self):
        groups = f", num_groups={self.num_groups}" if self.group_scaling else ", group_scaling=False"
        return super().extra_repr() + groups


@register_norm("pnv", "pn-v", "powernorm-v")
class PowerNormV(PowerStatisticNorm):
    """PN-V (Shen et al., ICML 2020, arXiv 2003.07845, section 4.1): `y = γ x / √(ψ_B² + ε) + β`, ψ_B² = mean(x²).

    PowerNorm with the statistic of the batch itself and its exact gradient.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to ψ².
        momentum (`float`, *optional*, defaults to 0.1): weight of a batch in the running value.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
    """

    centered = False

    def normalize(self, x, mask):
        return x * torch.rsqrt(self.running_power + self.eps)

    def forward_train(self, x, mask):
        return self.normalize_batch(x, mask)
