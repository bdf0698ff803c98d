"""Instance normalisation over the real tokens of a sentence."""

import torch

from .base import Norm
from .moments import masked_moments, spread, standardize
from .registry import register_norm


@register_norm("instancenorm", "in")
class InstanceNorm(Norm):
    """Instance normalisation (Ulyanov et al., 2016, arXiv 1607.08022): `y = γ (x − μ_S) / √(σ_S² + ε) + β`.

    μ_S and σ_S² (biased) of each channel are over the real tokens of the sentence, in training and in evaluation.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    scope = ("sentence",)

    def normalize(self, x, mask):
        moments = masked_moments(x, mask, by_sentence=True)
        inverse = torch.rsqrt(moments.var + self.eps)
        return standardize(x, spread(moments.mean, x), spread(inverse, x), mask)
