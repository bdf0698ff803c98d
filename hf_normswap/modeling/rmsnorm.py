"""RMSNorm."""

import torch
from torch.autograd import forward_ad

from .autograd import RMSNormalize
from .backends import is_traced
from .base import Norm
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

    def forward_eval(self, x, mask):
        # A compiler fuses these few operations, and an exporter shows them.
        is_plain = type(self).normalize is RMSNorm.normalize and forward_ad._current_level < 0
        if torch.compiler.is_compiling() or is_traced() or not is_plain:
            return super().forward_eval(x, mask)
        return RMSNormalize.apply(x, self.weight, self.bias, mask, self.eps)
