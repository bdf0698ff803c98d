"""Norms without gain and shift: the statistics of a token alone."""

from torch.nn import functional

from .base import Norm
from .registry import register_norm


class WithoutGain(Norm):
    """Base of the norms without a gain for each channel, and without a shift unless there shall be one.

    A swap leaves gain and shift of the LayerNorm behind, and [`restore_norm`](hf_normswap.restore_norm) puts in one
    whose gain is [`Norm.channel_gain`].
    """

    has_gain = False

    def __init__(self, num_features: int, *, bias: bool = False, **kwargs):
        super().__init__(num_features, bias=bias, **kwargs)


@register_norm("layernorm_simple", "ln_simple")
class LayerNormSimple(WithoutGain):
    """LayerNorm-simple (Xu et al., NeurIPS 2019, arXiv 1911.07013): `y = (x − μ) / √(σ² + ε)` of each token.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift; the paper has none.
    """

    def normalize(self, x, mask):
        return functional.layer_norm(x, x.shape[-1:], eps=self.eps)


@register_norm("rmsnorm_simple", "rms_simple", "weightless_rmsnorm")
class RMSNormSimple(WithoutGain):
    """RMSNorm without a gain: `y = x / √(mean_c x² + ε)` of each token.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the mean square.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift.
    """

    def normalize(self, x, mask):
        return functional.rms_norm(x, x.shape[-1:], eps=self.eps)
