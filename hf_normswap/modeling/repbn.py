"""Re-parameterised batch normalisation."""

import torch
from torch import nn

from .backends import promote
from .batchnorm import BatchNorm
from .registry import register_norm


@register_norm("repbn", "prepbn")
class RepBN(BatchNorm):
    """RepBN (SLAB, Guo et al., ICML 2024, arXiv 2405.11582): `y = γ (x − μ_B) / √(σ_B² + ε) + β + η x`.

    η is one number for all channels. In evaluation the layer is one affine map per channel, as BatchNorm is. PRepBN of
    the paper is a training with this norm and
    [`ProgressiveSwapCallback`](hf_normswap.ProgressiveSwapCallback), in which it takes the place of LayerNorm.
    Calibration sets η to 0: the gain can do the same.

    Args:
        num_features (`int`): number of channels.
        eta (`float`, *optional*, defaults to 0.0):
            η at the start. The authors' code begins with 1 in its models of images, and with 0 in LLaMA.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        momentum (`float`, *optional*, defaults to 0.1): weight of a batch in the running values.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
        center_tokens (`bool`, *optional*, defaults to `False`): as in [`BatchNorm`].
    """

    def __init__(self, num_features: int, *, eta: float = 0.0, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        # Of one dimension, as FSDP takes no scalar.
        self.eta = nn.Parameter(torch.full((1,), float(eta), device=device, dtype=dtype))

    def forward_train(self, x, mask):
        values = self.select_finite(promote(x), mask)
        return (super().forward_train(values, mask) + self.eta * values).to(x.dtype)

    def forward_eval(self, x, mask):
        values = self.select_finite(promote(x), mask)
        return (super().forward_eval(values, mask) + self.eta * values).to(x.dtype)

    def map_of_statistics(self):
        scale, shift = super().map_of_statistics()
        return scale + self.eta, shift

    def fit_candidates(self):
        return [{"eta": torch.zeros_like(self.eta)}]
