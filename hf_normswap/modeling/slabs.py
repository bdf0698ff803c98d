"""The passes of batch norms on CPUs, in PyTorch: slab by slab.

A slab is so many rows that intermediate results stay in the cache. Over all rows at once each of these would be as
large as the activations, and go to memory and back.
"""

from collections.abc import Iterator

import torch

from .moments import Moments, merge_moments
from .passes import TorchPasses, scale_groups


ELEMENTS = 2**18  # of a slab


class SlabPasses(TorchPasses):
    """See [`TorchPasses`](hf_normswap.modeling.passes.TorchPasses): the same passes, each one trip through memory."""

    @staticmethod
    def moments(x, mask):
        parts = []
        for _, values, real, _ in _slabs(x, mask):
            # About a real token: a mean far from zero would cost the digits of its sum.
            count, reference = real.sum(), values[real.argmax()]
            deviations = values - reference
            shift = real @ deviations / count.clamp(min=1)
            parts.append(Moments(count, reference + shift, real @ deviations.sub_(shift).square_()))
        return merge_moments(Moments(*map(torch.stack, zip(*parts))))

    @staticmethod
    def squares(x, mask, groups, eps):
        return sum(real @ scale_groups(values, groups, eps)[0].square() for _, values, real, _ in _slabs(x, mask))

    @staticmethod
    def forward(x, mask, center, scale, shift, groups, eps, wants_squares):
        y, squares = _empty_rows(x), 0
        for rows, values, real, _ in _slabs(x, mask):
            z, _ = scale_groups(values, groups, eps)
            if wants_squares:
                squares = squares + real @ z.square()
            y[rows] = torch.addcmul(shift, z if center is None else z - center, scale)
        return y.view(x.shape), squares if wants_squares else None

    @staticmethod
    def sums(g, x, mask, center, groups, eps):
        g, total = g.reshape(-1, g.shape[-1]), 0
        for rows, values, real, _ in _slabs(x, mask):
            z, _ = scale_groups(values, groups, eps)
            total = total + _sums(g[rows].to(values.dtype), z if center is None else z - center, real)
        return total

    @staticmethod
    def backward(g, x, mask, center, a, b, shift, pad, groups, eps, wants_sums):
        shape, x, g, dx, total = x.shape, x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), _empty_rows(x), 0
        for rows, values, real, is_dirty in _slabs(x, mask):
            wide = g[rows].to(values.dtype)
            z, inverse = scale_groups(values, groups, eps)
            centered, is_pad = z if center is None else z - center, real == 0
            of_z = (wide * a).addcmul_(centered, b)
            if shift is not None:
                of_z += shift
            if is_pad.any():
                of_z[is_pad] = wide[is_pad] * pad
            if groups:
                z, of_z = z.unflatten(-1, (groups, -1)), of_z.unflatten(-1, (groups, -1))
                along = (of_z * z).mean(-1, keepdim=True)
                of_z = torch.addcmul(of_z, z, along, value=-1).mul_(inverse).flatten(-2)
            if is_dirty:
                of_z[values != x[rows]] = 0
            dx[rows] = of_z
            if wants_sums:
                total = total + _sums(wide, centered, real)
        return dx.view(shape), total if wants_sums else None


def _slabs(x: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, bool]]:
    """Slabs: rows; values in the dtype of statistics; 1 for a real token and 0 for a pad; whether a pad was dirty."""
    c = x.shape[-1]
    x, dtype = x.reshape(-1, c), torch.promote_types(x.dtype, torch.float32)
    mask = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.reshape(-1)
    bound, step = torch.finfo(dtype).max ** 0.5 / c, max(1, ELEMENTS // c)
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        values, real = x[rows].to(dtype), mask[rows]
        pads = values[~real]
        is_dirty = len(pads) > 0 and not pads.abs().max() < bound
        if is_dirty:
            values = torch.where(real.unsqueeze(-1) | (values.abs() < bound), values, 0)
        yield rows, values, real.to(dtype), is_dirty


def _sums(g, z, real):
    both = torch.stack([real, 1 - real])
    return torch.stack([both @ g, both @ (g * z)], dim=1).flatten(0, 1)


def _empty_rows(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format).view(-1, x.shape[-1])
