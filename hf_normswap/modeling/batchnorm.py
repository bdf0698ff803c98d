"""Batch normalisation over the real tokens of a batch."""

import torch

from .backends import promote
from .base import BatchStatisticNorm
from .discrepancy import compare_moments
from .registry import register_norm


@register_norm("batchnorm", "bn", "masked_batchnorm")
class BatchNorm(BatchStatisticNorm):
    """Masked batch normalisation (Ioffe and Szegedy, 2015): `y = γ (x − μ_B) / √(σ_B² + ε) + β`.

    μ_B and σ_B² (biased) are over the real tokens of the batch; the gradient goes through both. In evaluation the
    running pair takes their place, and the layer is one affine map per channel.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        momentum (`float`, *optional*, defaults to 0.1): weight of a batch in the running values.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift β.
        center_tokens (`bool`, *optional*, defaults to `False`):
            whether each token loses its mean over the channels first, as in LayerNorm. Such a norm cannot be folded,
            and [`save_stock`](hf_normswap.save_stock) can write it as a LayerNorm of any model.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap import BatchNorm
    >>> norm = BatchNorm(1, eps=0.0)
    >>> x = torch.tensor([[[0.0], [4.0], [1000.0]]])
    >>> norm(x, torch.tensor([[True, True, False]]))[0, :2].flatten().tolist()
    [-1.0, 1.0]

    ```
    """

    running = {"running_mean": 0.0, "running_var": 1.0}
    centered = True

    def __init__(self, num_features: int, *, center_tokens: bool = False, **kwargs):
        super().__init__(num_features, **kwargs)
        self.center_tokens = center_tokens

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(_center(x), mask).to(x.dtype) if self.center_tokens else super().forward(x, mask)

    def normalize(self, x, mask):
        x = _center(x) if self.center_tokens else x  # once more costs a rounding: those who fit call this alone
        return (x - self.running_mean) * torch.rsqrt(self.running_var + self.eps)

    def forward_train(self, x, mask):
        return self.normalize_batch(x, mask)

    def affine_map(self):
        return None if self.center_tokens else self.map_of_statistics()

    def map_of_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(a, b)` of shape `(C,)`: in evaluation the norm is `a ⊙ x + b`, with `center_tokens` of centred tokens."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def extra_repr(self) -> str:
        return super().extra_repr() + (", center_tokens=True" if self.center_tokens else "")

    def compare(self, moments, running):
        return compare_moments(moments, running["running_mean"], running["running_var"])


def _center(x: torch.Tensor) -> torch.Tensor:
    """Tokens without their mean over the channels, in float32 at least."""
    values = promote(x)
    return values - values.mean(-1, keepdim=True)
