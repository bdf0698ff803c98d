"""Fixup: one multiplier and one bias."""

import torch
from torch import nn

from .registry import register_norm
from .simple import WithoutGain


@register_norm("fixup")
class Fixup(WithoutGain):
    """What Fixup has in the place of a norm (Zhang et al., ICLR 2019, arXiv 1901.09321): `y = m x + b`.

    The multiplier m and the bias b are one number each, 1 and 0 at the start. The rest of Fixup is the initialisation
    of the linear layers, which a swap leaves alone: [`initialize_fixup`](hf_normswap.initialize_fixup) gives it to a
    new model. A pretrained model loses its function.

    Args:
        num_features (`int`): number of channels.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift for each channel besides.
    """

    scope = ()

    def __init__(self, num_features: int, *, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        # Of one dimension, as FSDP takes no scalar.
        self.multiplier = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def normalize(self, x, mask):
        return self.multiplier * x + self.offset

    def affine_map(self):
        shift = self.offset if self.bias is None else self.bias + self.offset
        return self.weight * self.multiplier, shift.expand(self.num_features)

    def channel_gain(self):
        return self.weight * self.multiplier

    def extra_repr(self) -> str:
        return f"{self.num_features}"
