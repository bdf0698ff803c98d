"""LayerNorm, the baseline."""

import torch
from torch.nn import functional

from .base import Norm
from .registry import register_norm


@register_norm("layernorm", "ln")
class LayerNorm(Norm):
    """Layer normalisation of each token (Ba, Kiros and Hinton, 2016), bit for bit that of PyTorch.

    A model "swapped" to it computes what it computed before (its eps is kept), in the classes of the other norms: a
    baseline that shares every other difference.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    keeps_eps = True

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.select_finite(x, self.token_mask(x, mask))
        return functional.layer_norm(x, (self.num_features,), self.weight, self.bias, self.eps)
