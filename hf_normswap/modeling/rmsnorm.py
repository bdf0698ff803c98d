"""RMSNorm."""

import torch

from .norm import Norm
from .registry import register_norm


@register_norm("rmsnorm", "rms")
class RMSNorm(Norm):
    """Root mean square norm of each token (Zhang and Sennrich, NeurIPS 2019): `y = γ x / √(mean_c x² + ε) + β`.

    The paper has no shift (`bias=False`); a swap keeps that of the LayerNorm it replaces unless told otherwise.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the mean square.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    def normalize(self, x, mask):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
