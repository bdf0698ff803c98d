"""Masked moments of tokens and their exact merging: the one place where this package computes a batch statistic.

A *token* is one row of C channels; everything here reduces over all dimensions but the last, over real tokens only.
"""

from typing import NamedTuple

import torch

from .ranks import gather_over_ranks


class Moments(NamedTuple):
    """First two moments of a set of tokens.

    Attributes:
        count (`torch.Tensor` of shape `(...)`): number of real tokens.
        mean (`torch.Tensor` of shape `(..., C)`): mean of each channel, 0 where `count` is 0.
        m2 (`torch.Tensor` of shape `(..., C)`): sum of squared deviations from `mean`.
    """

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor

    @property
    def var(self) -> torch.Tensor:
        """Biased variance (1/n) of each channel, 0 where there are no tokens."""
        return self.m2 / self.count.clamp(min=1).unsqueeze(-1)

    @property
    def power(self) -> torch.Tensor:
        """Quadratic mean squared, the ψ² of PowerNorm: `mean(x²)` of each channel."""
        return self.var + self.mean.square()

    def pack(self) -> torch.Tensor:
        """The moments as one tensor of shape `(..., 2C + 1)`, for one buffer or one collective."""
        return torch.cat([self.count.unsqueeze(-1), self.mean, self.m2], dim=-1)

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "Moments":
        """Inverse of [`Moments.pack`]."""
        width = packed.shape[-1] // 2
        return cls(packed[..., 0], packed[..., 1 : width + 1], packed[..., width + 1 :])


def sum_tokens(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of `values` of shape `(..., C)` over the real tokens of `mask` (`(...)`, True = real), of shape `(C,)`."""
    if mask is not None:
        # Selecting, not multiplying: 0 · NaN is NaN.
        values = torch.where(mask.unsqueeze(-1), values, 0)
    return values.flatten(0, -2).sum(0)


def count_tokens(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Number of real tokens of `values` (`(..., C)`), a scalar of float32, or float64 as `values`."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # bfloat16 cannot count to 257
    if mask is None:
        return torch.full((), values.numel() // values.shape[-1], dtype=dtype, device=values.device)
    return mask.sum().to(dtype)


def masked_moments(values: torch.Tensor, mask: torch.Tensor | None = None) -> Moments:
    """Two-pass moments of the real tokens; never `E[x²] − E[x]²`, which cancels.

    Args:
        values (`torch.Tensor` of shape `(..., C)`):
            Tokens, in the dtype that the statistics shall have.
        mask (`torch.Tensor` of shape `(...)`, *optional*):
            True at real tokens. Nothing at the other positions, NaN and infinity included, has any influence.

    Returns:
        [`Moments`]: of the real tokens; all zero where there are none.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap.modeling.moments import masked_moments
    >>> tokens = torch.tensor([[1.0], [3.0], [float("nan")]])
    >>> moments = masked_moments(tokens, torch.tensor([True, True, False]))
    >>> moments.count.item(), moments.mean.item(), moments.var.item(), moments.power.item()
    (2.0, 2.0, 1.0, 5.0)

    ```
    """
    count = count_tokens(values, mask)
    mean = sum_tokens(values, mask) / count.clamp(min=1)
    return Moments(count, mean, sum_tokens((values - mean).square(), mask))


def merge_moments(parts: Moments) -> Moments:
    """Moments of the union of several sets of tokens, exactly (Chan, Golub and LeVeque, 1983).

    Args:
        parts ([`Moments`] with a leading dimension): one entry per set, `(K,)`, `(K, C)`, `(K, C)`; sets may be empty.

    Returns:
        [`Moments`]: of all tokens together, without the leading dimension.
    """
    count = parts.count.sum(0)
    weight = (parts.count / count.clamp(min=1)).unsqueeze(-1)
    mean = (weight * parts.mean).sum(0)
    between = (parts.count.unsqueeze(-1) * (parts.mean - mean).square()).sum(0)
    return Moments(count, mean, parts.m2.sum(0) + between)


def merge_over_ranks(moments: Moments, group=None) -> Moments:
    """Moments of the tokens of all ranks of a process `group`, by default of all, in one collective."""
    return merge_moments(Moments.unpack(gather_over_ranks(moments.pack(), group)))
