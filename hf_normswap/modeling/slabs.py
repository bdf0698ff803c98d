"""The passes of batch norms on CPUs, in PyTorch: slab by slab.

A slab is so many rows that intermediate results stay in the cache. Over all rows at once each of these would be as
large as the activations, and go to memory and back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .moments import Moments, merge_moments
from .passes import TorchPasses, scale_groups


ELEMENTS = 2**19  # of a slab


class SlabPasses(TorchPasses):
    """See [`TorchPasses`](hf_normswap.modeling.passes.TorchPasses): the same passes, each one trip through memory."""

    @staticmethod
    def moments(x, mask):
        parts = []
        for rows in _rows(x):
            values = _take(x, rows, mask)
            count = max(1, len(values))
            mean = values.sum(0) / count
            # A mean far from zero is rounded: what it leaves is taken off again.
            rest, squares = _products(values.sub_(mean), values)
            m2 = (squares - rest.square() / count).clamp(min=0)
            parts.append(Moments.of(mean.new_tensor(len(values)), mean + rest / count, m2))
        return merge_moments(Moments(torch.stack([part.packed for part in parts])))

    @staticmethod
    def squares(x, mask, groups, eps):
        scaled = (scale_groups(_take(x, rows, mask), groups, eps)[0] for rows in _rows(x))
        return sum(_products(z, z)[1] for z in scaled)

    @staticmethod
    def forward(x, mask, center, scale, shift, groups, eps, wants_squares):
        y, squares = _empty_rows(x), 0
        for rows, values, reals, pads, _ in _slabs(x, mask):
            z, _ = scale_groups(values, groups, eps)
            if wants_squares:
                squares = squares + _squares(z, reals, pads)
            with _written_to(y[rows], z) as to:
                torch.addcmul(shift, z if center is None else torch.sub(z, center, out=to), scale, out=to)
        return y.view(x.shape), squares if wants_squares else None

    @staticmethod
    def sums(g, x, mask, center, groups, eps):
        g, total = g.reshape(-1, g.shape[-1]), 0
        for rows, values, reals, pads, _ in _slabs(x, mask):
            z, _ = scale_groups(values, groups, eps)
            total = total + _sums(g[rows].to(z.dtype), z if center is None else z - center, reals, pads)
        return total

    @staticmethod
    def backward(g, x, mask, center, a, b, shift, pad, groups, eps, wants_sums):
        dx, g, total = _empty_rows(x), g.reshape(-1, g.shape[-1]), 0
        shift = torch.zeros_like(a) if shift is None else shift
        for rows, values, reals, pads, is_dirty in _slabs(x, mask):
            wide = g[rows].to(values.dtype)
            z, inverse = scale_groups(values, groups, eps)
            with _written_to(dx[rows], z) as of_z:
                centered = z if center is None else torch.sub(z, center, out=of_z)
                if wants_sums:
                    total = total + _sums(wide, centered, reals, pads)
                torch.addcmul(shift, centered, b, out=of_z)
                of_z.addcmul_(wide, a)
                if len(pads):
                    of_z.index_copy_(0, pads, wide.index_select(0, pads).mul_(pad))
                if groups:
                    by_group, of_group = z.unflatten(-1, (groups, -1)), of_z.unflatten(-1, (groups, -1))
                    along = (of_group * by_group).mean(-1, keepdim=True)
                    of_group.addcmul_(by_group, along, value=-1).mul_(inverse)
            if is_dirty:
                changed = values != x.reshape(dx.shape)[rows]
                dx[rows][changed.index_fill_(0, reals, False)] = 0  # what is not finite at a real token stays so
        return dx.view(x.shape), total if wants_sums else None


def _rows(x: torch.Tensor) -> list[slice]:
    """The rows of each slab."""
    count, step = x.numel() // x.shape[-1], max(1, ELEMENTS // x.shape[-1])
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _take(x, rows, mask):
    """A copy of the real tokens of a slab, in the dtype of statistics."""
    values = x.reshape(-1, x.shape[-1])[rows]
    if mask is not None:
        values = values.index_select(0, mask.reshape(-1)[rows].nonzero().flatten())
    return values.to(torch.promote_types(x.dtype, torch.float32), copy=mask is None)


def _slabs(x: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple]:
    """Slabs: rows, values in the dtype of statistics, real tokens, pads (none without a mask), if one was dirty."""
    x, dtype = x.reshape(-1, x.shape[-1]), torch.promote_types(x.dtype, torch.float32)
    mask = None if mask is None else mask.reshape(-1)
    bound = torch.finfo(dtype).max ** 0.5 / x.shape[-1]
    for rows in _rows(x):
        values = x[rows].to(dtype)
        if mask is None:
            yield rows, values, None, (), False
            continue
        # A sum of squares takes one trip and no memory; what is above it by one value is looked at value by value.
        if is_dirty := not torch.dot(values.flatten(), values.flatten()) < bound**2:
            values = torch.where(mask[rows].unsqueeze(-1) | (values.abs() < bound), values, 0)
        yield rows, values, mask[rows].nonzero().flatten(), (~mask[rows]).nonzero().flatten(), is_dirty


def _sums(g, z, reals, pads):
    """Sums of g and of g z, over real tokens and over pads."""
    if len(pads) == 0:
        of_all = _products(g, z)
        return torch.stack([*of_all, *map(torch.zeros_like, of_all)])
    parts = [(g.index_select(0, rows), z.index_select(0, rows)) for rows in (reals, pads)]
    return torch.stack([value for part in parts for value in _products(*part)])


def _squares(z, reals, pads):
    """Sum of z² over real tokens."""
    z = z.index_select(0, reals) if len(pads) else z
    return _products(z, z)[1]


def _products(g, z):
    """Sums of g and of g z: those of the backward of a layer norm of mean 0 and deviation 1, no product stored."""
    c, mean, inverse, one = z.shape[-1:], z.new_zeros(len(z), 1), z.new_ones(len(z), 1), z.new_ones(z.shape[-1])
    arguments = g, z, c, mean, inverse, one, one, [False, True, True]
    _, products, total = torch.ops.aten.native_layer_norm_backward(*arguments)
    return total, products


@contextmanager
def _written_to(rows: torch.Tensor, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Where results are computed that end in `rows`: there, or in the dtype of `values`, and copied."""
    to = rows if rows.dtype == values.dtype else torch.empty_like(values)
    yield to
    if to is not rows:
        rows.copy_(to)


def _empty_rows(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format).view(-1, x.shape[-1])
