"""RMSNorm."""

import torch
from torch.autograd import forward_ad

from .norm import Norm
from .passes import gradients_of_affine, promote
from .paths import is_watched, passes_for
from .registry import register_norm


@register_norm("rmsnorm", "rms")
class RMSNorm(Norm):
    """Root mean square norm of each token (Zhang and Sennrich, NeurIPS 2019): `y = γ x / √(mean_c x² + ε) + β`.

    The paper has no shift (`bias=False`); a swap keeps that of the LayerNorm it replaces unless told otherwise.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the mean square.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    def normalize(self, x, mask):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def transform(self, x, mask):
        # A compiler fuses these few operations, and an exporter shows them.
        is_plain = type(self).normalize is RMSNorm.normalize and forward_ad._current_level < 0
        if torch.compiler.is_compiling() or is_watched() or not is_plain:
            return super().transform(x, mask)
        return _RescaleTokens.apply(x, self.weight, self.bias, mask, self.eps)


class _RescaleTokens(torch.autograd.Function):
    """`y = γ z + β`, z = x / rms: the group scaling of PowerNorm with all channels in one group, and no statistics."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, eps):
        ctx.save_for_backward(x, weight, mask)
        ctx.eps = eps
        scale, shift = promote(weight), promote(torch.zeros_like(weight) if bias is None else bias)
        return passes_for(x, weight, norm=RMSNorm.norm_name).forward(x, mask, None, scale, shift, 1, eps, False)[0]

    @staticmethod
    def backward(ctx, g):
        x, weight, mask = ctx.saved_tensors
        g, scale = g.to(x.dtype), promote(weight)
        passes, none = passes_for(x, g, weight, norm=RMSNorm.norm_name), torch.zeros_like(scale)
        dx, sums = passes.backward(g, x, mask, None, scale, none, None, scale, 1, ctx.eps, True)
        of_weight, of_bias = (value.to(weight.dtype) for value in gradients_of_affine(sums, 1))
        return dx, of_weight, of_bias if ctx.needs_input_grad[2] else None, None, None
