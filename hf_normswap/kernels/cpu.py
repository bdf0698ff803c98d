"""The passes of norms on CPUs: C++, compiled on first use and kept in the user's cache."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.autograd.graph import increment_version
from transformers.utils import logging

from hf_normswap.modeling.backends import ReferenceBackend
from hf_normswap.modeling.moments import Moments


logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
# -ffast-math lets sums be vectorised; NaN and infinity stay what they are.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp")
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # where the CPU has 512-bit vectors, a forward is faster
TIMEOUT = 300  # seconds

# Functions over tokens take pointers to tensors, then rows, channels, a mode (the number of groups; for batch_norm_*
# whether it is centered), eps and threads. Here stands the number of pointers.
_POINTERS = {"moments": 3, "affine_fwd": 7, "affine_bwd": 10}
_POINTERS |= {"batch_norm_fwd": 6, "batch_norm_bwd": 9, "power_norm_fwd": 7, "power_norm_bwd": 12}
_PENALTY_FLAGS = {"relative": (True, False), "sigma_l2": (False, False), "var_l1": (False, True)}
_SIZES = (*(3 * (ctypes.c_int64,)), ctypes.c_float, ctypes.c_int)
_CHANNEL_SIGNATURES = {
    "update_running": (*(5 * (ctypes.c_void_p,)), ctypes.c_int64, ctypes.c_float),
    "update_nu": (*(4 * (ctypes.c_void_p,)), ctypes.c_int64, ctypes.c_float),
    "merge_pending": (*(2 * (ctypes.c_void_p,)), ctypes.c_int64),
    "penalty_with_grad": (
        *(5 * (ctypes.c_void_p,)),
        *(2 * (ctypes.c_int64,)),
        ctypes.c_int64,
        *(3 * (ctypes.c_float,)),
    ),
}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def load_library() -> dict:
    """The compiled functions, by `(name, dtype)` where they are over tokens, else by name; compiled now if need be.

    Raises:
        OSError: when there is no compiler, it fails, or what it makes cannot be loaded.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    library, functions = ctypes.CDLL(str(_build(compiler))), {}
    for name, pointers in _POINTERS.items():
        prototype = ctypes.CFUNCTYPE(None, *(pointers * (ctypes.c_void_p,)), *_SIZES)
        for dtype, suffix in _DTYPES.items():
            functions[name, dtype] = prototype(ctypes.c_void_p.in_dll(library, f"{name}_{suffix}").value)
    for name, arguments in _CHANNEL_SIGNATURES.items():
        functions[name] = ctypes.CFUNCTYPE(None, *arguments)((name, library))
    return functions


def _build(compiler: str) -> Path:
    """The compiled library, in the cache."""
    made_of = [SOURCE.read_bytes(), repr(FLAGS).encode(), _run(compiler, "--version"), _processor()]
    path = _cache() / f"{SOURCE.stem}-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    logger.warning(f"Compiling {SOURCE.name} for this machine, once: a few seconds.")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{folder}/passes.o")
        # Without -fopenmp: the threads are to be those of PyTorch, whose OpenMP is loaded already.
        _run(compiler, "-shared", f"{folder}/passes.o", "-o", f"{folder}/passes.so")
        os.replace(f"{folder}/passes.so", path)  # another process may have been faster
    return path


def _run(*command: str) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT).stdout
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        raise OSError(f"{command[0]} fails: {said[0] if said else error}") from error


def _processor() -> bytes:
    """What -march=native depends on: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(dict.fromkeys(line for line in lines if line.startswith((b"model name", b"flags", b"Features"))))


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_normswap")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


class CpuBackend(ReferenceBackend):
    """The [`ReferenceBackend`](hf_normswap.modeling.backends.ReferenceBackend) in C++: a pass reads its tokens once.

    Tokens are float32 or bfloat16, statistics and coefficients float32. Deterministic for a number of threads.
    """

    dtypes = tuple(_DTYPES)
    load = staticmethod(load_library)

    @staticmethod
    def moments(x, mask):
        packed = _new_packed(x)
        _call("moments", (x,), mask, (), (packed,))
        return Moments(packed)

    @staticmethod
    def sum_squares(x, mask, groups, eps):
        squares = _new(x, x.shape[-1])
        _call("affine_fwd", (x,), mask, (None,) * 3, (None, squares), groups, eps)
        return squares

    @staticmethod
    def affine_fwd(x, mask, center, scale, shift, groups, eps, wants_squares):
        y, squares = _new_tokens(x), _new(x, x.shape[-1]) if wants_squares else None
        _call("affine_fwd", (x,), mask, (center, scale, shift), (y, squares), groups, eps)
        return y, squares

    @staticmethod
    def grad_sums(g, x, mask, center, groups, eps):
        sums = _new(x, 4, x.shape[-1])
        _call("affine_bwd", (g, x), mask, (center, *(None,) * 4), (None, sums), groups, eps)
        return sums

    @staticmethod
    def affine_bwd(g, x, mask, center, coefficients, groups, eps, wants_sums):
        dx, sums = _new_tokens(x), _new(x, 4, x.shape[-1]) if wants_sums else None
        _call("affine_bwd", (g, x), mask, (center, *coefficients), (dx, sums), groups, eps)
        return dx, sums

    @classmethod
    def batch_norm_fwd(cls, x, weight, bias, mask, eps, centered, group):
        if group is not None:
            return super().batch_norm_fwd(x, weight, bias, mask, eps, centered, group)
        y, packed = _new_tokens(x), _new_packed(x)
        _call("batch_norm_fwd", (x,), mask, (weight, bias), (y, packed), centered, eps)
        return y, Moments(packed)

    @classmethod
    def batch_norm_bwd(cls, g, x, weight, mask, moments, grad_moments, eps, centered, group):
        if group is not None:
            return super().batch_norm_bwd(g, x, weight, mask, moments, grad_moments, eps, centered, group)
        gradients = _new_gradients(x)
        _call("batch_norm_bwd", (g, x), mask, (weight, moments.packed, grad_moments), gradients, centered, eps)
        return gradients

    @classmethod
    def power_norm_fwd(cls, x, weight, bias, mask, power, groups, eps):
        y, packed = _new_tokens(x), _new_packed(x)
        _call("power_norm_fwd", (x,), mask, (power, weight, bias), (y, packed), groups, eps)
        return y, Moments(packed)

    @classmethod
    def power_norm_bwd(cls, g, x, weight, mask, power, grad_power, nu, moments, groups, eps):
        results = *_new_gradients(x), _new_packed(x)
        _call("power_norm_bwd", (g, x), mask, (weight, power, grad_power, nu, moments.packed), results, groups, eps)
        return results

    @staticmethod
    def update_running(running, moments, updates, weight):
        packed, buffers = moments.packed, [running.get(name) for name in ("mean", "var", "power")]
        c, kept = len(packed) // 2, [buffer for buffer in buffers if buffer is not None]
        is_known = len(kept) == len(running) and updates.dtype == torch.int64 and updates.device == packed.device
        if not (is_known and _are_floats(c, *kept) and _are_floats(2 * c + 1, packed)):
            return ReferenceBackend.update_running(running, moments, updates, weight)
        load_library()["update_running"](*_addresses((*buffers, updates, packed)), c, float(weight))
        increment_version([*kept, updates])

    @staticmethod
    def update_nu(nu, largest_gamma, batch_sums, weight, loss_scale):
        tensors, c = (nu, largest_gamma, batch_sums, loss_scale), len(nu)
        if not (
            _are_floats(c, nu) and _are_floats(1, largest_gamma, loss_scale) and _are_floats(2 * c + 1, batch_sums)
        ):
            return ReferenceBackend.update_nu(nu, largest_gamma, batch_sums, weight, loss_scale)
        load_library()["update_nu"](*_addresses(tensors), c, float(weight))
        increment_version([nu, largest_gamma])

    @staticmethod
    def merge_pending(pooled, moments):
        if not _are_floats(len(pooled), pooled, moments.packed):
            return ReferenceBackend.merge_pending(pooled, moments)
        load_library()["merge_pending"](*_addresses((pooled, moments.packed)), len(pooled) // 2)
        increment_version([pooled])

    @staticmethod
    def penalty_with_grad(moments, mean, var, eps, distance, weights):
        packed, c = moments.packed, len(mean)
        if distance not in _PENALTY_FLAGS or not (_are_floats(c, mean, var) and _are_floats(2 * c + 1, packed)):
            return ReferenceBackend.penalty_with_grad(moments, mean, var, eps, distance, weights)
        value, grad_packed = _new(packed), torch.empty_like(packed)
        addresses = _addresses((packed, mean, var, value, grad_packed))
        load_library()["penalty_with_grad"](*addresses, c, *_PENALTY_FLAGS[distance], *weights, eps)
        return value, grad_packed


def _call(name, tokens, mask, inputs, outputs, groups=0, eps=0.0):
    """Calls a compiled function with as many threads as PyTorch has."""
    x = tokens[-1]
    inputs = [value if value is None or value.dtype is torch.float32 else value.float() for value in inputs]
    tensors = [t if t is None or t.is_contiguous() else t.contiguous() for t in (*tokens, mask, *inputs)]
    channels = x.shape[-1]
    rows = x.numel() // channels
    for value in inputs:
        if value is not None and value.numel() not in (channels, 2 * channels + 1):
            raise ValueError(f"{value.numel()} statistics or coefficients do not fit tokens of {channels} channels.")
    addresses = _addresses((*tensors, *outputs))
    load_library()[name, x.dtype](*addresses, rows, channels, groups, eps, torch.get_num_threads())


def _addresses(tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _are_floats(size, *tensors):
    return all(t.numel() == size and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _new(x, *shape):
    return x.new_empty(shape, dtype=torch.float32)


def _new_tokens(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _new_packed(x):
    return _new(x, 2 * x.shape[-1] + 1)


def _new_gradients(x):
    c = x.shape[-1]
    return _new_tokens(x), _new(x, c), _new(x, c)
