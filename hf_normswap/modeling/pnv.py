"""PN-V: normalisation by the quadratic mean of the batch."""

import torch

from .norm import PowerStatisticNorm
from .registry import register_norm


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

    def transform(self, x, mask):
        return self.standardize(x, mask) if self.training else super().transform(x, mask)
