"""Gain and shift alone."""

from .base import Norm
from .registry import register_norm


@register_norm("affine", "aff")
class Affine(Norm):
    """Nothing is normalised: `y = γ x + β`, the Aff of ResMLP (Touvron et al., 2021, equation 1).

    A norm of fixed statistics is one in evaluation, and it is what [`fold_norms`](hf_normswap.fold_norms) leaves where
    a norm cannot go altogether.

    Args:
        num_features (`int`): number of channels.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    scope = ()

    def normalize(self, x, mask):
        return x

    def affine_map(self):
        return self.weight, self.weight.new_zeros(self.num_features) if self.bias is None else self.bias
