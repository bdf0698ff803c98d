"""Batch renormalisation."""

import torch

from .activation_checkpointing import replay_or_record, snapshot
from .batchnorm import BatchNorm
from .registry import check_number, register_norm


@register_norm("batchrenorm", "brn")
class BatchRenorm(BatchNorm):
    """Batch renormalisation (Ioffe, NeurIPS 2017, arXiv 1702.03275): `y = γ (r (x − μ_B) / σ_B + d) + β`.

    `r = σ_B / σ` and `d = (μ_B − μ) / σ` correct the statistics of the batch to the running ones from before it. r is
    clipped to `[1 / r_max, r_max]` and d to `[−d_max, d_max]`; within these bounds training computes what evaluation
    does. No gradient goes through r and d. σ² stands for the variance and ε. In the first `bn_steps` updates the norm
    is BatchNorm. From there the bounds grow linearly: that of r until the update `r_steps`, that of d until `d_steps`.

    Args:
        num_features (`int`): number of channels.
        r_max (`float`, *optional*, defaults to 3.0): bound of r at the end, at least 1.
        d_max (`float`, *optional*, defaults to 5.0): bound of d at the end.
        bn_steps (`int`, *optional*, defaults to 5000): updates as BatchNorm.
        r_steps (`int`, *optional*, defaults to 40000): updates until r has its bound of the end.
        d_steps (`int`, *optional*, defaults to 25000): updates until d has its bound of the end.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        momentum (`float`, *optional*, defaults to 0.1): weight of a batch in the running values.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
        center_tokens (`bool`, *optional*, defaults to `False`): as in [`BatchNorm`].
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        bn_steps: int = 5000,
        r_steps: int = 40000,
        d_steps: int = 25000,
        **kwargs,
    ):
        super().__init__(num_features, **kwargs)
        options = {"r_max": r_max, "d_max": d_max, "bn_steps": bn_steps, "r_steps": r_steps, "d_steps": d_steps}
        for name, value in options.items():
            check_number(name, value)
        if r_max < 1:
            raise ValueError(f"r_max is the largest factor of a correction, at least 1, and cannot be {r_max}.")
        vars(self).update(options)

    def forward_train(self, x, mask):
        step, _ = replay_or_record(lambda: snapshot(self.num_batches_tracked))
        x_hat, moments, running = self.standardize_batch(x, mask)
        with torch.no_grad():
            inverse = torch.rsqrt(running["running_var"] + self.eps)
            r_bound = 1 + self._progress(step, self.r_steps) * (self.r_max - 1)
            d_bound = self._progress(step, self.d_steps) * self.d_max
            r = ((moments.var + self.eps).sqrt() * inverse).clamp(1 / r_bound, r_bound)
            d = ((moments.mean - running["running_mean"]) * inverse).clamp(-d_bound, d_bound)
        return self.scale_and_shift(r * x_hat + d).to(x.dtype)

    def _progress(self, step: torch.Tensor, last: int) -> torch.Tensor:
        """How far a bound has come, from 0 to 1."""
        return ((step - self.bn_steps) / max(last - self.bn_steps, 1)).clamp(0, 1).to(self.running_var.dtype)
