"""The passes of batch norms on CUDA, in Triton."""

import functools

import torch
import triton

from hf_normswap.modeling.backends import ReferenceBackend
from hf_normswap.modeling.moments import Moments

from .triton_kernels import ELEMENTS, STAGES, WARPS, backward_kernel, forward_kernel, merge_kernel, moments_kernel


COLUMNS = 128  # of a block without groups: 256 bytes of bfloat16, two whole cache lines
PROGRAMS = 4  # of each multiprocessor: enough to keep the memory busy, so few that the second step is small
LEAST_ROWS = 16  # of a program


class TritonBackend(ReferenceBackend):
    """The [`ReferenceBackend`](hf_normswap.modeling.backends.ReferenceBackend) in Triton: a pass reads tokens once.

    Tokens are float32, bfloat16 or float16, statistics and coefficients float32. Two calls give the same bits; two
    processes only with `torch.use_deterministic_algorithms(True)`: else each takes the tiling that it finds fastest.
    """

    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    @staticmethod
    def load():
        """Raises `OSError` where Triton has no device to compile for, or cannot."""
        try:
            triton.runtime.driver.active.get_current_target()
        except Exception as error:  # of many kinds: without a device, without a C compiler, without a header
            raise OSError(f"Triton does not work here: {error}") from error

    @staticmethod
    def moments(x, mask):
        x, (programs, c) = x.contiguous(), _shape_of_parts(x, 0)
        counts, parts = _new(x, programs), _new(x, programs, 3, c)
        packed = _new(x, 2 * c + 1)
        _launch(moments_kernel, x, programs, 0, x, _bytes(mask), counts, parts, _count(x))
        with torch.cuda.device_of(x):
            merge_kernel[(triton.cdiv(c, 32),)](counts, parts, packed, programs, C=c, BLOCK=32, ROWS=64)
        return Moments(packed)

    @staticmethod
    def sum_squares(x, mask, groups, eps):
        return _forward(x, mask, None, None, None, False, groups, eps, True)[1]

    @staticmethod
    def affine_fwd(x, mask, center, scale, shift, groups, eps, wants_squares):
        return _forward(x, mask, center, scale, shift, True, groups, eps, wants_squares)

    @staticmethod
    def grad_sums(g, x, mask, center, groups, eps):
        return _backward(g, x, mask, center, (None,) * 4, False, groups, eps, True)[1]

    @staticmethod
    def affine_bwd(g, x, mask, center, coefficients, groups, eps, wants_sums):
        return _backward(g, x, mask, center, coefficients, True, groups, eps, wants_sums)


def _forward(x, mask, center, scale, shift, wants_y, groups, eps, wants_squares):
    x, shape = x.contiguous(), _shape_of_parts(x, groups)
    y, parts = torch.empty_like(x) if wants_y else None, _new(x, *shape) if wants_squares else None
    coefficients = map(_dense, (center, scale, shift))
    _launch(forward_kernel, x, shape[0], groups, x, _bytes(mask), *coefficients, y, parts, _count(x), eps, groups > 0)
    return y, None if parts is None else parts.sum(0)


def _backward(g, x, mask, center, coefficients, wants_dx, groups, eps, wants_sums):
    g, x, (programs, c) = g.contiguous(), x.contiguous(), _shape_of_parts(x, groups)
    dx = torch.empty_like(x) if wants_dx else None
    parts = _new(x, programs, 2 if mask is None else 4, c) if wants_sums else None
    coefficients = map(_dense, (center, *coefficients))
    arguments = g, x, _bytes(mask), *coefficients, dx, parts, _count(x), eps, groups > 0
    _launch(backward_kernel, x, programs, groups, *arguments)
    if parts is None:
        return dx, None
    sums = parts.sum(0)
    return dx, torch.cat([sums, torch.zeros_like(sums)]) if mask is None else sums


def _launch(kernel, x, programs, groups, *arguments):
    c, width = x.shape[-1], _width(x, groups)
    block = triton.next_power_of_2(width)
    sizes = {"C": c, "WIDTH": width, "BLOCK": block}
    # The fastest tiling is found by timing: never in the interpreter, nor where a run has to be like another.
    if torch.are_deterministic_algorithms_enabled() or not isinstance(kernel.fn, triton.JITFunction):
        sizes |= {"TILE": ELEMENTS, "STAGES": STAGES, "num_warps": max(WARPS, min(16, block // 256))}
        kernel = kernel.fn
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(triton.cdiv(c, width), programs)](*arguments, **sizes)


def _shape_of_parts(x, groups):
    """Rows of programs, and channels."""
    blocks = triton.cdiv(x.shape[-1], _width(x, groups))
    return max(1, min(PROGRAMS * _processors(x.device) // blocks, triton.cdiv(_count(x), LEAST_ROWS))), x.shape[-1]


def _width(x, groups):
    return x.shape[-1] // groups if groups else min(COLUMNS, triton.next_power_of_2(x.shape[-1]))


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _count(x):
    return x.numel() // x.shape[-1]


def _new(x, *shape):
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _dense(values):
    return None if values is None else values.contiguous()


def _bytes(mask):
    return None if mask is None else mask.contiguous().view(torch.uint8)
