"""ScaleNorm."""

import torch
from torch import nn

from .registry import register_norm
from .simple import WithoutGain


@register_norm("scalenorm")
class ScaleNorm(WithoutGain):
    """ScaleNorm (Nguyen and Salazar, IWSLT 2019, arXiv 1910.05895): `y = g x / √(‖x‖² + ε)` of each token.

    One gain g for all channels, √C at the start. [`restore_norm`](hf_normswap.restore_norm) gives each channel of the
    LayerNorm the gain g / √C.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the squared length.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift; the paper has none.
    """

    def __init__(self, num_features: int, *, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        # Of one dimension, as FSDP takes no scalar.
        self.gain = nn.Parameter(torch.full((1,), num_features**0.5, device=device, dtype=dtype))

    def normalize(self, x, mask):
        return self.gain * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)

    def channel_gain(self):
        return self.weight * self.gain / self.num_features**0.5
