"""Functions of each number in the place of a norm: DyT and Derf."""

import torch
from torch import nn

from .base import Norm
from .registry import register_norm


@register_norm("dyt")
class DyT(Norm):
    """Dynamic Tanh (Zhu et al., CVPR 2025, arXiv 2503.10622): `y = γ tanh(α x) + β`, α one number for all channels.

    It takes no statistics: each number is mapped alone. In a calibrated swap α is the one that follows the LayerNorm
    best.

    Args:
        num_features (`int`): number of channels.
        alpha (`float`, *optional*, defaults to 0.5): α at the start.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    scope = ()

    def __init__(self, num_features: int, *, alpha: float = 0.5, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        # Of one dimension, as FSDP takes no scalar.
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), device=device, dtype=dtype))

    def normalize(self, x, mask):
        return torch.tanh(self.alpha * x)

    def fit_candidates(self):
        # From activations of a thousand to those of a sixteenth, in steps of the root of 2.
        return [{"alpha": torch.full_like(self.alpha, 2 ** (step / 2))} for step in range(-20, 9)]

    def extra_repr(self) -> str:
        return f"{self.num_features}"


@register_norm("derf")
class Derf(DyT):
    """Derf (Chen et al., 2025, arXiv 2512.10938): `y = γ erf(α x + s) + β`, α and s one number each.

    It takes no statistics: each number is mapped alone. In a calibrated swap α is the one that follows the LayerNorm
    best, with s = 0.

    Args:
        num_features (`int`): number of channels.
        alpha (`float`, *optional*, defaults to 0.5): α at the start.
        shift (`float`, *optional*, defaults to 0.0): s at the start.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
    """

    def __init__(self, num_features: int, *, shift: float = 0.0, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        self.shift = nn.Parameter(torch.full((1,), float(shift), device=device, dtype=dtype))

    def normalize(self, x, mask):
        return torch.erf(self.alpha * x + self.shift)

    def fit_candidates(self):
        return [{**candidate, "shift": torch.zeros_like(self.shift)} for candidate in super().fit_candidates()]
