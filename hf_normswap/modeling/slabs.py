"""The passes of batch norms on CPUs, in PyTorch: slab by slab.

A slab is so many rows that intermediate results stay in the cache. Over all rows at once each of these would be as
large as the activations, and go to memory and back. Where a kernel of PyTorch takes tokens of few bits and computes in
float32, they are not converted first.
"""

from collections.abc import Iterator

import torch

from .moments import Moments, merge_moments
from .passes import TorchPasses


ELEMENTS = 2**20  # of a slab
aten = torch.ops.aten


class SlabPasses(TorchPasses):
    """See [`TorchPasses`](hf_normswap.modeling.passes.TorchPasses): the same passes, each one trip through memory."""

    @staticmethod
    def moments(x, mask):
        parts, zeros = [], x.new_zeros(2, x.shape[-1], dtype=_wide(x))
        for rows in _rows(x):
            values = x.reshape(-1, x.shape[-1])[rows]
            if mask is not None:
                values = values.index_select(0, mask.reshape(-1)[rows].nonzero().flatten())
            count = len(values)
            # Given running statistics in float32, it returns such for tokens of few bits too.
            mean, var = aten.batch_norm_update_stats(values, *zeros.clone(), 0.0) if count else zeros
            m2 = var * count
            if (mean.square() > var).any():
                # A mean far from zero is rounded: what it leaves is taken off again.
                rest = _products(torch.ones_like(values), values, mean)[1]
                mean, m2 = mean + rest / count, (m2 - rest.square() / count).clamp(min=0)
            parts.append(Moments.of(mean.new_tensor(count), mean, m2))
        return merge_moments(Moments(torch.stack([part.packed for part in parts])))

    @staticmethod
    def squares(x, mask, groups, eps):
        total = 0
        for _, values, reals, pads, _, room in _slabs(x, mask, 1):
            z, _ = _scale_groups(values, groups, eps, room)
            total = total + _squares(z, reals, pads)
        return total

    @staticmethod
    def forward(x, mask, center, scale, shift, groups, eps, wants_squares):
        y, squares = _empty_rows(x), 0
        is_wide = x.dtype == _wide(x) or _is_far(center, scale, x.dtype)
        for rows, values, reals, pads, _, room in _slabs(x, mask, 2):
            z, _ = _scale_groups(values, groups, eps, room)
            if wants_squares:
                squares = squares + _squares(z, reals, pads)
            to = y[rows]
            if z.dtype == to.dtype and not is_wide:
                _scale(z, center, scale, shift, to)
            else:
                of_z, z = to if to.dtype == room.dtype else room[1], _widen(z, room[1])
                z = z if center is None else torch.sub(z, center, out=of_z)
                to.copy_(torch.addcmul(shift, z, scale, out=of_z))
        return y.view(x.shape), squares if wants_squares else None

    @staticmethod
    def sums(g, x, mask, center, groups, eps):
        g, total = g.reshape(-1, g.shape[-1]), 0
        for rows, values, reals, pads, _, room in _slabs(x, mask, 1):
            z, _ = _scale_groups(values, groups, eps, room)
            total = total + _sums(g[rows].to(z.dtype), z, center, reals, pads)
        return total

    @staticmethod
    def backward(g, x, mask, center, a, b, shift, pad, groups, eps, wants_sums):
        dx, g, total = _empty_rows(x), g.reshape(-1, g.shape[-1]), 0
        for rows, values, reals, pads, is_dirty, room in _slabs(x, mask, 4):
            if wants_sums and not groups:
                total = total + _sums(g[rows], values, center, reals, pads)
            wide = _widen(g[rows], room[0])
            z, inverse = _scale_groups(_widen(values, room[1]), groups, eps, room[2:])
            if wants_sums and groups:
                total = total + _sums(wide, z, center, reals, pads)
            of_z = dx[rows] if dx.dtype == z.dtype else room[3]
            centered = z if center is None else torch.sub(z, center, out=of_z)
            if shift is None:
                torch.mul(centered, b, out=of_z)
            else:
                torch.addcmul(shift, centered, b, out=of_z)
            if len(pads) and pad is a:
                of_z.index_fill_(0, pads, 0)  # one trip less than what is done for another factor
            of_z.addcmul_(wide, a)
            if len(pads) and pad is not a:
                of_z.index_copy_(0, pads, wide.index_select(0, pads).mul_(pad))
            if groups:
                by_group, of_group = z.unflatten(-1, (groups, -1)), of_z.unflatten(-1, (groups, -1))
                along = torch.mul(of_z, z, out=room[1]).view(by_group.shape).mean(-1, keepdim=True)
                of_group.addcmul_(by_group, along, value=-1).mul_(inverse)
            dx[rows].copy_(of_z)
            if is_dirty:
                changed = values != x.reshape(dx.shape)[rows]
                dx[rows][changed.index_fill_(0, reals, False)] = 0  # what is not finite at a real token stays so
        return dx.view(x.shape), total if wants_sums else None


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: torch.Tensor) -> list[slice]:
    """The rows of each slab."""
    count = x.numel() // x.shape[-1]
    step = -(-count // -(-x.numel() // ELEMENTS))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _slabs(x: torch.Tensor, mask: torch.Tensor | None, count: int) -> Iterator[tuple]:
    """Slabs: rows, values, real tokens, pads (none without a mask), if one was dirty, and room for `count` results."""
    x, slabs = x.reshape(-1, x.shape[-1]), _rows(x)
    mask = None if mask is None else mask.reshape(-1)
    room = x.new_empty(count, slabs[0].stop, x.shape[-1], dtype=_wide(x))
    bound = torch.finfo(room.dtype).max ** 0.5 / x.shape[-1]
    for rows in slabs:
        values, own = x[rows].contiguous(), room[:, : rows.stop - rows.start]
        if mask is None:
            yield rows, values, None, (), False, own
            continue
        reals, pads = mask[rows].nonzero().flatten(), (~mask[rows]).nonzero().flatten()
        # A sum of squares takes one trip and no memory; what is above it by one value is looked at value by value.
        at_pads = values.index_select(0, pads).to(room.dtype).flatten()
        if is_dirty := not torch.dot(at_pads, at_pads) < bound**2:
            values = torch.where(mask[rows].unsqueeze(-1) | (values.abs() < bound), values, 0)
        yield rows, values, reals, pads, is_dirty, own


def _widen(values, room):
    return values if values.dtype == room.dtype else room.copy_(values)


def _scale_groups(values, groups, eps, room):
    """z, in the first of `room`, and 1 / rms of each group."""
    if not groups:
        return values, None
    z = _widen(values, room[0]).unflatten(-1, (groups, -1))
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    inverse = norm.square_().div_(z.shape[-1]).add_(eps).rsqrt_()
    torch.mul(z, inverse, out=room[0].view(z.shape))
    return room[0], inverse


def _sums(g, z, center, reals, pads):
    """Sums of g and of g (z − center), over real tokens and over pads."""
    if len(pads) == 0:
        of_all = _products(g, z, center)
        return torch.stack([*of_all, *map(torch.zeros_like, of_all)])
    parts = [(g.index_select(0, rows), z.index_select(0, rows), center) for rows in (reals, pads)]
    return torch.stack([value for part in parts for value in _products(*part)])


def _squares(z, reals, pads):
    """Sum of z² over real tokens."""
    z = z.index_select(0, reals) if len(pads) else z
    return _products(z, z)[1]


def _products(g, z, center=None):
    """Sums of g and of g (z − center): those of the backward of a batch norm of deviation 1, no product stored."""
    zeros, ones = _zeros_and_ones(z)
    if len(z) == 0:
        return zeros, zeros
    center = zeros if center is None else center.to(zeros.dtype)
    arguments = g, z, ones, center, ones, center, ones, False, 0.0, [False, True, True]
    _, products, total = aten.native_batch_norm_backward(*arguments)
    return total, products


def _scale(z, center, scale, shift, out):
    """`scale (z − center) + shift` as an evaluating batch norm of deviation 1: `scale z + (shift − scale center)`."""
    zeros, ones = _zeros_and_ones(z)
    nothing = zeros.new_empty(0)
    center = zeros if center is None else center
    aten.native_batch_norm.out(
        z, scale, shift, center, ones, False, 0.0, 0.0, out=out, save_mean=nothing, save_invstd=nothing
    )


def _is_far(center, scale, dtype):
    """Whether `scale z − scale center` would be rounded by more than `dtype` rounds a result of size 1."""
    bound = torch.finfo(dtype).eps / torch.finfo(scale.dtype).eps / 4
    return center is not None and not (center * scale).abs().amax() < bound


def _zeros_and_ones(z):
    return z.new_zeros(z.shape[-1], dtype=_wide(z)), z.new_ones(z.shape[-1], dtype=_wide(z))


def _empty_rows(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format).view(-1, x.shape[-1])
