"""Attentive normalisation."""

import torch
from torch import nn
from torch.nn import functional

from .base import Norm
from .moments import masked_moments, spread
from .registry import register_norm


@register_norm("attentivenorm", "an")
class AttentiveNorm(Norm):
    """Attentive normalisation (Li, Sun and Wu, ECCV 2020, arXiv 1908.01259): `y = γ Σ_k λ_k (a_k x̂ + b_k) + β`.

    x̂ is that of LayerNorm; the paper standardises by batch and group normalisation. The K affine maps (a_k, b_k) are
    mixed with weights of the sentence: `λ = softmax(W s)`. s of each channel is `μ_S / √(σ_S² + ε)` over the real
    tokens of the sentence. γ and β stay those of the LayerNorm in a swap. At the start W is 0, and the mean of the
    maps is x̂: the layer begins as LayerNorm.

    Args:
        num_features (`int`): number of channels.
        num_maps (`int`, *optional*, defaults to 10): K.
        eps (`float`, *optional*, defaults to 1e-5): added to the variances.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
    """

    scope = ("token", "sentence")

    def __init__(self, num_features: int, *, num_maps: int = 10, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        if not isinstance(num_maps, int) or num_maps < 1:
            raise ValueError(f"num_maps is a number of affine maps, at least 1, and cannot be {num_maps!r}.")
        self.num_maps = num_maps
        # Maps that are equal would stay so. The same numbers each time, as for every other parameter of a new norm.
        draw = torch.randn(2, num_maps, num_features, generator=torch.Generator().manual_seed(0), device="cpu") / 10
        draw = draw - draw.mean(1, keepdim=True)
        like = {"device": device or torch.get_default_device(), "dtype": self.weight.dtype}
        self.gains, self.shifts = nn.Parameter((1 + draw[0]).to(**like)), nn.Parameter(draw[1].to(**like))
        self.attention = nn.Parameter(torch.zeros(num_maps, num_features, device=device, dtype=dtype))

    def normalize(self, x, mask):
        moments = masked_moments(x, mask, by_sentence=True)
        summary = moments.mean * torch.rsqrt(moments.var + self.eps)
        # No product of matrices, whose backward may run under autocast.
        weights = (summary.unsqueeze(1) * self.attention).sum(-1).softmax(-1)
        tokens = functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        if mask is None:
            return self._mix(weights, tokens)
        # What a loss makes of a pad does not go through the statistics of its sentence.
        return torch.where(mask.unsqueeze(-1), self._mix(weights, tokens), self._mix(weights.detach(), tokens))

    def _mix(self, weights, tokens):
        weights = weights.unsqueeze(-1)
        gain, shift = (spread((weights * maps).sum(1), tokens) for maps in (self.gains, self.shifts))
        return gain * tokens + shift

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_maps={self.num_maps}"
