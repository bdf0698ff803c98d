"""Group normalisation over the channels of one token."""

import math

import torch

from .base import Norm
from .registry import register_norm


@register_norm("groupnorm", "gn")
class GroupNorm(Norm):
    """Group normalisation (Wu and He, ECCV 2018, arXiv 1803.08494) of each token over groups of its channels.

    `y = γ (x − μ_G) / √(σ_G² + ε) + β`, the statistics those of the group of channels G of one token. The paper takes
    them over all positions of an image too, which in a sentence would see later tokens.

    Args:
        num_features (`int`): number of channels.
        num_groups (`int`, *optional*):
            number of groups; by default 32 as in the paper, or fewer, so that a group has at least eight channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the variance.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.

    Raises:
        ValueError: when `num_features` is not divisible by `num_groups`.
    """

    def __init__(self, num_features: int, *, num_groups: int | None = None, **kwargs):
        super().__init__(num_features, **kwargs)
        if num_groups is None:
            num_groups = math.gcd(32, num_features, max(1, num_features // 8))
        if not isinstance(num_groups, int) or num_groups < 1 or num_features % num_groups:
            raise ValueError(
                f"{num_features} channels cannot be divided into {num_groups} groups: "
                "choose num_groups among the divisors."
            )
        self.num_groups = num_groups

    def normalize(self, x, mask):
        by_group = x.unflatten(-1, (self.num_groups, -1))
        variance, mean = torch.var_mean(by_group, dim=-1, correction=0, keepdim=True)
        return ((by_group - mean) * torch.rsqrt(variance + self.eps)).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}"
