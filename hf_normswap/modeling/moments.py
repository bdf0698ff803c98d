"""Masked moments of tokens and their exact merging: the one place where this package computes a batch statistic.

A *token* is one row of C channels; everything here reduces over all dimensions but the last, over real tokens only.
"""

import math
from typing import NamedTuple

import torch


class Moments(NamedTuple):
    """First two moments of a set of tokens, in one tensor: for one buffer, one collective, one output of a graph.

    Attributes:
        packed (`torch.Tensor` of shape `(..., 2C + 1)`): `count`, `mean` and `m2` side by side.
    """

    packed: torch.Tensor

    @classmethod
    def of(cls, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor) -> "Moments":
        """From a number of tokens `(...)`, means `(..., C)`, and sums of squared deviations from them `(..., C)`."""
        return cls(torch.cat([count.unsqueeze(-1), mean, m2], dim=-1))

    @property
    def count(self) -> torch.Tensor:
        """Number of real tokens, of shape `(...)`."""
        return self.packed[..., 0]

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each channel, of shape `(..., C)`, 0 where there are no tokens."""
        return self.packed[..., 1 : self.packed.shape[-1] // 2 + 1]

    @property
    def m2(self) -> torch.Tensor:
        """Sum of squared deviations from the mean, of shape `(..., C)`."""
        return self.packed[..., self.packed.shape[-1] // 2 + 1 :]

    @property
    def var(self) -> torch.Tensor:
        """Biased variance (1/n) of each channel, 0 where there are no tokens."""
        return self.m2 / self.count.clamp(min=1).unsqueeze(-1)

    @property
    def power(self) -> torch.Tensor:
        """Quadratic mean squared, the ψ² of PowerNorm: `mean(x²)` of each channel."""
        return self.var + self.mean.square()


def sum_tokens(values: torch.Tensor, mask: torch.Tensor | None = None, by_sentence: bool = False) -> torch.Tensor:
    """Sum of `values` of shape `(..., C)` over the real tokens of `mask` (`(...)`, True = real), of shape `(C,)`.

    It is of shape `(B, C)` where it is `by_sentence`, one for each element of the first dimension.
    """
    if mask is not None:
        # Selecting, not multiplying: 0 · NaN is NaN.
        values = torch.where(mask.unsqueeze(-1), values, 0)
    return values.flatten(1, -2).sum(1) if by_sentence else values.reshape(-1, values.shape[-1]).sum(0)


def count_tokens(values: torch.Tensor, mask: torch.Tensor | None = None, by_sentence: bool = False) -> torch.Tensor:
    """Number of real tokens of `values` (`(..., C)`), a scalar or `(B,)` of float32, or float64 as `values`."""
    dtype = torch.promote_types(values.dtype, torch.float32)  # bfloat16 cannot count to 257
    if mask is None:
        shape = values.shape[:1] if by_sentence else ()
        count = math.prod(values.shape[len(shape) : -1])
        return torch.full(shape, count, dtype=dtype, device=values.device)
    return (mask.flatten(1).sum(1) if by_sentence else mask.sum()).to(dtype)


def masked_moments(values: torch.Tensor, mask: torch.Tensor | None = None, by_sentence: bool = False) -> Moments:
    """Two-pass moments of the real tokens, with a corrected mean; never `E[x²] − E[x]²`, which cancels.

    Args:
        values (`torch.Tensor` of shape `(..., C)`):
            Tokens, in the dtype that the statistics shall have.
        mask (`torch.Tensor` of shape `(...)`, *optional*):
            True at real tokens. Nothing at the other positions, NaN and infinity included, has any influence.
        by_sentence (`bool`, *optional*, defaults to `False`):
            whether to take those of each sentence, an element of the first dimension of `(B, ..., C)`.

    Returns:
        [`Moments`]: of the real tokens, `(2C + 1,)`, or `(B, 2C + 1)` by sentence; all zero where there are none.

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
    count = count_tokens(values, mask, by_sentence)
    number = count.clamp(min=1).unsqueeze(-1)
    mean = sum_tokens(values, mask, by_sentence) / number
    centered = values - (spread(mean, values) if by_sentence else mean)
    # A mean far from zero is rounded, as 100 is by 4e-6 in float32. What is left of it belongs to the mean.
    rest = sum_tokens(centered, mask, by_sentence) / number
    m2 = sum_tokens(centered.square(), mask, by_sentence) - number * rest.square()
    return Moments.of(count, mean + rest, m2.clamp(min=0))


def spread(of_sentences: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values `(B, C)` of sentences in a shape that goes with their tokens `(B, ..., C)`."""
    return of_sentences.reshape(len(of_sentences), *[1] * (values.dim() - 2), -1)


def standardize(
    x: torch.Tensor, center: torch.Tensor | None, inverse: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """`(x − center) · inverse`; what a loss makes of a pad does not go through the statistics."""
    x_hat = (x if center is None else x - center) * inverse
    if mask is None:
        return x_hat
    at_pads = (x if center is None else x - center.detach()) * inverse.detach()
    return torch.where(mask.unsqueeze(-1), x_hat, at_pads)


def merge_moments(parts: Moments) -> Moments:
    """Moments of the union of several sets of tokens, exactly (Chan, Golub and LeVeque, 1983).

    Args:
        parts ([`Moments`] with a leading dimension): one entry per set, `(K, 2C + 1)`; sets may be empty.

    Returns:
        [`Moments`]: of all tokens together, without the leading dimension.
    """
    counts, means = parts.count, parts.mean
    count = counts.sum(0)
    weight = (counts / count.clamp(min=1)).unsqueeze(-1)
    mean = (weight * means).sum(0)
    between = (counts.unsqueeze(-1) * (means - mean).square()).sum(0)
    return Moments.of(count, mean, parts.m2.sum(0) + between)


def merge_over_ranks(moments: Moments, group=None) -> Moments:
    """Moments of the tokens of all ranks of a process `group`, by default of all, in one collective."""
    return merge_moments(Moments(gather_over_ranks(moments.packed, group)))


def has_ranks() -> bool:
    """Whether there is another process to talk to."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gather_over_ranks(values: torch.Tensor, group=None) -> torch.Tensor:
    """`values` of all ranks of a process group, by default of all, of shape `(ranks, *values.shape)`."""
    if not has_ranks():
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def sum_over_ranks(values: torch.Tensor, group=None) -> torch.Tensor:
    """The sum of `values` over all ranks of a process group, by default of all, in place."""
    if has_ranks():
        torch.distributed.all_reduce(values, group=group)
    return values
