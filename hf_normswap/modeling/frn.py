"""Filter response normalisation, with its thresholded linear unit."""

import torch
from torch import nn

from .base import Norm
from .moments import masked_moments, spread, standardize
from .registry import register_norm


@register_norm("frn", "filterresponsenorm")
class FRN(Norm):
    """Filter response normalisation (Singh and Krishnan, CVPR 2020, arXiv 1911.09737), `max(γ x / √(ν² + ε) + β, τ)`.

    ν² of each channel is the mean of x² over the real tokens of the sentence. The threshold τ of a channel is trained,
    from 0; so the layer begins as a norm with a ReLU behind it. In a calibrated swap there is no threshold.

    Args:
        num_features (`int`): number of channels.
        tlu (`bool`, *optional*, defaults to `True`): whether there is a threshold.
        eps (`float`, *optional*, defaults to 1e-5): added to ν².
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    scope = ("sentence",)
    calibrated_options = {"tlu": False}

    def __init__(self, num_features: int, *, tlu: bool = True, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        self.tlu = tlu
        self.threshold = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if tlu else None

    def normalize(self, x, mask):
        power = masked_moments(x, mask, by_sentence=True).power
        return standardize(x, None, spread(torch.rsqrt(power + self.eps), x), mask)

    def scale_and_shift(self, x_hat):
        y = super().scale_and_shift(x_hat)
        return torch.maximum(y, self.threshold) if self.tlu else y

    def fit_candidates(self):
        # So low that it clips nothing.
        return [{"threshold": torch.full_like(self.threshold, -1e4)}] if self.tlu else []

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.tlu else ", tlu=False")
