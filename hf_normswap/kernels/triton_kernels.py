"""The kernels of `triton.py`.

Programs share out the tokens by blocks of columns (under group scaling, the groups) and, within a block, tile after
tile in turn: those that run at the same time read rows that lie side by side. What a program sums goes to a row of its
own in a scratch tensor, and a second step adds up these few rows: no atomics, and no order that varies.

Offsets are of 64 bits, for N · C may pass 2³¹. Arguments that are `None` are compiled out.
"""

import torch
import triton
import triton.language as tl


ELEMENTS, STAGES, WARPS = 2048, 4, 4  # of a tile, of its loads and of a program, where nothing is tuned
TILINGS = [(1024, 4, 4), (2048, 2, 4), (ELEMENTS, STAGES, WARPS), (4096, 2, 4), (4096, 3, 8), (8192, 2, 16)]

_ROOT_OF_MAX = tl.constexpr(torch.finfo(torch.float32).max ** 0.5)


def _prune(configs, _, BLOCK, **sizes):
    """Tilings that leave a thread no more of a tile than its registers hold; for a very wide block the last."""
    fitting = [config for config in configs if max(config.kwargs["TILE"], BLOCK) <= 1024 * config.num_warps]
    return fitting or configs[-1:]


_tune = triton.autotune(
    [triton.Config({"TILE": tile, "STAGES": stages}, num_warps=warps) for tile, stages, warps in TILINGS],
    key=["C", "WIDTH"],  # and dtypes, by itself
    prune_configs_by={"early_config_prune": _prune},
)
# Batches vary in their number of rows: no kernel is compiled or tuned anew for that.
_jit = triton.jit(do_not_specialize=["n"])


@triton.jit
def _columns(C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of this program, and which of them exist."""
    lanes = tl.arange(0, BLOCK)
    columns = tl.program_id(0) * WIDTH + lanes
    return columns, (lanes < WIDTH) & (columns < C)


@triton.jit
def _rows(first, mask, n, ROWS: tl.constexpr):
    """The rows of a tile, which of them exist, and which are real tokens."""
    rows = first + tl.arange(0, ROWS)
    exist = rows < n
    real = exist
    if mask is not None:
        real = exist & (tl.load(mask + rows, mask=exist, other=0) != 0)
    return rows.to(tl.int64)[:, None], exist[:, None], real[:, None]


@triton.jit
def _coefficients(values, columns, valid):
    """Those of the columns; 0 for `None`."""
    if values is None:
        return tl.zeros(columns.shape, tl.float32)
    else:
        return tl.load(values + columns, mask=valid, other=0).to(tl.float32)


@triton.jit
def _tokens(x, read, mask, real, eps, GROUPED: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """z of a tile, 1 / rms of its groups, and where x counts: not at pads that have no finite sum of squares."""
    z = tl.load(x, mask=read, other=0).to(tl.float32)
    counts = real | (tl.abs(z) < _ROOT_OF_MAX / C)
    inverse = tl.full((1, 1), 1, tl.float32)
    if mask is not None:
        z = tl.where(counts, z, 0)
    if GROUPED:
        inverse = tl.rsqrt(tl.sum(z * z, 1, keep_dims=True) / WIDTH + eps)
        z *= inverse
    return z, inverse, counts


@triton.jit
def _merge(count, pivot, mean, m2, weights, values, offsets):
    """Moments merged with those of weighted rows (Chan et al.), which are taken in two passes.

    Means are relative to a pivot, the first rows' own: the mean of tokens that lie far from 0 would be rounded to a
    unit that shows in m2. A value is the sum of `values` and `offsets`.
    """
    share = tl.sum(weights)
    if count == 0:
        pivot = tl.sum(weights * values, 0) / tl.maximum(share, 1)
    deviations = values - pivot + offsets - mean
    delta = tl.sum(weights * deviations, 0) / tl.maximum(share, 1)
    deviations -= delta
    part = share / tl.maximum(count + share, 1)
    m2 += tl.sum(weights * deviations * deviations, 0) + delta * delta * count * part
    return count + share, pivot, mean + delta * part, m2


@_tune
@_jit
def moments_kernel(
    x, mask, counts, parts, n,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
    columns, valid = _columns(C, WIDTH, BLOCK)
    program, programs = tl.program_id(1), tl.num_programs(1)
    count = 0.0
    pivot = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    m2 = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(program * ROWS, n, programs * ROWS, num_stages=STAGES):
        rows, _, real = _rows(first, mask, n, ROWS)
        values = tl.load(x + rows * C + columns, mask=real & valid, other=0).to(tl.float32)  # pads are not even read
        count, pivot, mean, m2 = _merge(count, pivot, mean, m2, real.to(tl.float32), values, 0.0)
    if tl.program_id(0) == 0:
        tl.store(counts + program, count)
    parts += program * 3 * C + columns
    tl.store(parts, pivot, mask=valid)
    tl.store(parts + C, mean, mask=valid)
    tl.store(parts + 2 * C, m2, mask=valid)


@triton.jit
def merge_kernel(counts, parts, packed, programs, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    columns, valid = _columns(C, BLOCK, BLOCK)
    total = 0.0
    pivot = tl.zeros((BLOCK,), tl.float32)
    center = tl.zeros((BLOCK,), tl.float32)
    within = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, programs, ROWS):
        rows, exist, _ = _rows(first, None, programs, ROWS)
        places, read = parts + rows * 3 * C + columns, exist & valid
        weights = tl.load(counts + rows, mask=exist, other=0)
        pivots = tl.load(places, mask=read, other=0)
        means = tl.load(places + C, mask=read, other=0)
        within += tl.sum(tl.load(places + 2 * C, mask=read, other=0), 0)
        total, pivot, center, within = _merge(total, pivot, center, within, weights, pivots, means)
    if tl.program_id(0) == 0:
        tl.store(packed, total)
    tl.store(packed + 1 + columns, pivot + center, mask=valid)
    tl.store(packed + 1 + C + columns, within, mask=valid)


@_tune
@_jit
def forward_kernel(
    x, mask, center, scale, shift, y, parts, n, eps, GROUPED: tl.constexpr,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`y`, or sums of z², or both."""
    ROWS: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
    columns, valid = _columns(C, WIDTH, BLOCK)
    program, programs = tl.program_id(1), tl.num_programs(1)
    center = _coefficients(center, columns, valid)
    scale = _coefficients(scale, columns, valid)
    shift = _coefficients(shift, columns, valid)
    # A sum for each place of a tile: the threads need not meet before the end.
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(program * ROWS, n, programs * ROWS, num_stages=STAGES):
        rows, exist, real = _rows(first, mask, n, ROWS)
        places, read = rows * C + columns, exist & valid
        z, _, _ = _tokens(x + places, read if y is not None else real & valid, mask, real, eps, GROUPED, C, WIDTH)
        if parts is not None:
            squares += tl.where(real, z * z, 0)
        if y is not None:
            tl.store(y + places, ((z - center) * scale + shift).to(y.dtype.element_ty), mask=read)
    if parts is not None:
        tl.store(parts + program * C + columns, tl.sum(squares, 0), mask=valid)


@_tune
@_jit
def backward_kernel(
    g, x, mask, center, a, b, shift, pad, dx, parts, n, eps, GROUPED: tl.constexpr,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dx`, or sums, or both."""
    ROWS: tl.constexpr = (TILE + BLOCK - 1) // BLOCK
    columns, valid = _columns(C, WIDTH, BLOCK)
    program, programs = tl.program_id(1), tl.num_programs(1)
    center = _coefficients(center, columns, valid)
    a = _coefficients(a, columns, valid)
    b = _coefficients(b, columns, valid)
    shift = _coefficients(shift, columns, valid)
    pad = _coefficients(pad, columns, valid)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    pad_total = tl.zeros((ROWS, BLOCK), tl.float32)
    pad_products = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(program * ROWS, n, programs * ROWS, num_stages=STAGES):
        rows, exist, real = _rows(first, mask, n, ROWS)
        places, read = rows * C + columns, exist & valid
        z, inverse, counts = _tokens(x + places, read, mask, real, eps, GROUPED, C, WIDTH)
        of_y = tl.load(g + places, mask=read, other=0).to(tl.float32)
        if parts is not None:
            # Selected, not weighted: 0 · NaN is NaN.
            product = of_y * (z - center)
            total += tl.where(real, of_y, 0)
            products += tl.where(real, product, 0)
            if mask is not None:
                pad_total += tl.where(real, 0, of_y)
                pad_products += tl.where(real | ~exist, 0, product)
        if dx is not None:
            grad_z = a * of_y + b * (z - center) + shift
            if mask is not None:
                grad_z = tl.where(real, grad_z, pad * of_y)
            if GROUPED:
                along = tl.sum(grad_z * z, 1, keep_dims=True) / WIDTH
                grad_z = (grad_z - z * along) * inverse
            if mask is not None:
                grad_z = tl.where(counts, grad_z, 0)
            tl.store(dx + places, grad_z.to(dx.dtype.element_ty), mask=read)
    if parts is not None:
        parts += program * (2 if mask is None else 4) * C + columns
        tl.store(parts, tl.sum(total, 0), mask=valid)
        tl.store(parts + C, tl.sum(products, 0), mask=valid)
        if mask is not None:
            tl.store(parts + 2 * C, tl.sum(pad_total, 0), mask=valid)
            tl.store(parts + 3 * C, tl.sum(pad_products, 0), mask=valid)
