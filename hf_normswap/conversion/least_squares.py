"""Least-squares fits over real tokens that come batch by batch, on one rank or on several."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_normswap.modeling.moments import (
    Moments,
    gather_over_ranks,
    has_ranks,
    masked_moments,
    merge_moments,
    sum_over_ranks,
)


# How strongly a correction holds to the present weights where there are as many tokens as inputs, in units of the mean
# variance of the inputs; the more tokens, the less.
RIDGE = 0.4


class AffineFit(NamedTuple):
    """`target ≈ gain · x + shift` for each channel.

    Attributes:
        gain (`torch.Tensor` of shape `(C,)`): 0 where x is constant.
        shift (`torch.Tensor` of shape `(C,)`): 0 where there is no intercept.
        residual (`torch.Tensor` of shape `(C,)`): mean square of what is left.
        target ([`Moments`]): of the target.
    """

    gain: torch.Tensor
    shift: torch.Tensor
    residual: torch.Tensor
    target: Moments


def pooled_moments(batches: Iterable, width: int, device) -> Moments:
    """Moments in float64 of all batches `(values, mask)`, of all ranks; collectives run on `device`."""
    pooled = torch.zeros(2 * width + 1, dtype=torch.float64)
    for values, mask in batches:
        pooled = add_tokens(pooled, values, mask)
    return merge_moments(Moments(gather_over_ranks(pooled.to(device)).cpu()))


def add_tokens(pooled: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Packed moments in float64 with the tokens of one batch added to them."""
    batch = masked_moments(values.to("cpu", torch.float64), None if mask is None else mask.cpu())
    return merge_moments(Moments(torch.stack([pooled, batch.packed]))).packed


def tokens_of_all_ranks(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """`values` of every rank, of any number each, one behind the other along `dim`."""
    if not has_ranks():
        return values
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values.cpu())
    return torch.cat(parts, dim).to(values.device)


def fit_affine(tokens: Iterable, width: int, device, intercept: bool = True) -> AffineFit:
    """Fit over `(x, target, mask)` of all batches and ranks: `(..., C)`, `(..., C)` and `(...)`."""
    # One pass and one kind of statistic: Var(x + t) = Var(x) + Var(t) + 2 Cov(x, t).
    triples = ((torch.cat([x, t, x + t], dim=-1), mask) for x, t, mask in tokens)
    moments = pooled_moments(triples, 3 * width, device)
    mean_x, mean_t, _ = moments.mean.split(width)
    var_x, var_t, var_both = (moments.var if intercept else moments.power).split(width)
    covariance = (var_both - var_x - var_t) / 2
    gain = torch.where(var_x > 0, covariance / var_x, 0)
    shift = mean_t - gain * mean_x if intercept else torch.zeros_like(gain)
    residual = (var_t - gain * covariance).clamp(min=0)
    return AffineFit(gain, shift, residual, Moments.of(moments.count, mean_t, moments.m2.split(width)[1]))


def fit_correction(linear: nn.Linear | Conv1D, tokens: Iterable) -> tuple[torch.Tensor, torch.Tensor]:
    """The change of weight and bias of `linear` that takes a residual away from its outputs.

    Ridge regression over `(x, residual)` of all batches and ranks, `(N, in)` and `(N, out)`.

    Returns:
        The changes of the weight, `(in, out)`, and of the bias, `(out,)`; 0 where there are no tokens, or no bias.
    """
    size, out = linear.weight.shape[:: 1 if isinstance(linear, Conv1D) else -1]
    sums = torch.zeros(size + 1, size + 1 + out, dtype=torch.float64, device=linear.weight.device)
    for x, residual in tokens:
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        x, residual = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (x, residual))
        sums += x.T @ torch.cat([x, residual], dim=1)
    sums = sum_over_ranks(sums)
    count = sums[0, 0].clamp(min=1e-30)
    mean = sums[0, 1:] / count
    if linear.bias is None:  # so the weight takes the mean away, too: 7.9 % of a Llama's loss in place of 10.0 %
        mean = torch.zeros_like(mean)
    second = sums[1:, 1:] / count - torch.outer(sums[1:, 0] / count, mean)
    gram, products = second[:, :size], second[:, size:]
    ridge = RIDGE * size / count * gram.diagonal().mean().clamp(min=1e-30)
    change = torch.linalg.solve(gram + ridge * torch.eye(size, dtype=gram.dtype, device=gram.device), products)
    return change, mean[size:] - mean[:size] @ change


def out_features(linear: nn.Linear | Conv1D) -> int:
    """Width of the output; `Conv1D` stores its weight transposed."""
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
