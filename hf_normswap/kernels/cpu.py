"""The passes of batch norms on CPUs: a C++ file, compiled on first use and kept in the user's cache."""

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

from hf_normswap.modeling.moments import Moments
from hf_normswap.modeling.passes import TorchPasses


SOURCE = Path(__file__).with_name("cpu.cpp")
# -ffast-math lets sums be vectorised; NaN and infinity stay what they are.
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-std=c++17", "-fPIC", "-fopenmp")
TIMEOUT = 300  # seconds

_POINTER, _INTEGER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIZES = {
    "forward": (7 * (_POINTER,), (_INTEGER, _INTEGER, _INTEGER, _FLOAT, _INT)),
    "moments": (5 * (_POINTER,), (_INTEGER, _INTEGER, _INT)),
    "backward": (10 * (_POINTER,), (_INTEGER, _INTEGER, _INTEGER, _FLOAT, _INT)),
}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled passes, compiled now if need be.

    Raises:
        OSError: when there is no compiler, it fails, or what it makes cannot be loaded.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    made_of = [SOURCE.read_bytes(), repr(FLAGS).encode(), _run(compiler, "--version"), _processor()]
    name = f"passes-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    path = _cache() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{folder}/passes.o")
            # Without -fopenmp: the threads are to be those of PyTorch, whose OpenMP is loaded already.
            _run(compiler, "-shared", f"{folder}/passes.o", "-o", f"{folder}/{name}")
            os.replace(f"{folder}/{name}", path)  # another process may have been faster
    passes = ctypes.CDLL(str(path))
    for function, (pointers, sizes) in _SIZES.items():
        for dtype in _DTYPES.values():
            getattr(passes, f"{function}_{dtype}").argtypes = pointers + sizes
    return passes


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


class CpuPasses(TorchPasses):
    """See [`TorchPasses`](hf_normswap.modeling.passes.TorchPasses): the same passes, each one trip through memory.

    Tokens are float32 or bfloat16, statistics and coefficients float32. Deterministic for a number of threads.
    """

    dtypes = tuple(_DTYPES)
    load = staticmethod(load_library)

    @staticmethod
    def moments(x, mask):
        x, mask = x.contiguous(), _bytes(mask)
        n, c = _shape(x)
        count, mean, m2 = x.new_empty((), dtype=torch.float32), _channels(x), _channels(x)
        _call("moments", x, x, mask, count, mean, m2, n, c)
        return Moments(count, mean, m2)

    @staticmethod
    def squares(x, mask, groups, eps):
        x, squares = x.contiguous(), _channels(x)
        _call("forward", x, x, _bytes(mask), None, None, None, None, squares, *_shape(x), groups, eps)
        return squares

    @staticmethod
    def forward(x, mask, center, scale, shift, groups, eps, wants_squares):
        x, scale, shift = x.contiguous(), scale.float(), shift.float()
        y, squares = torch.empty_like(x), _channels(x) if wants_squares else None
        _call("forward", x, x, _bytes(mask), _floats(center), scale, shift, y, squares, *_shape(x), groups, eps)
        return y, squares

    @staticmethod
    def sums(g, x, mask, center, groups, eps):
        return _backward(g, x, mask, center, None, None, None, None, groups, eps, None, _channels(x, 4))

    @staticmethod
    def backward(g, x, mask, center, a, b, shift, pad, groups, eps, wants_sums):
        dx, sums = torch.empty_like(x, memory_format=torch.contiguous_format), _channels(x, 4) if wants_sums else None
        return dx, _backward(g, x, mask, center, a.float(), b.float(), shift, pad.float(), groups, eps, dx, sums)


def _backward(g, x, mask, center, a, b, shift, pad, groups, eps, dx, sums):
    g, x = g.contiguous(), x.contiguous()
    _call("backward", x, g, x, _bytes(mask), _floats(center), a, b, _floats(shift), pad, dx, sums, *_shape(x), groups, eps)
    return sums


def _call(function, x, *arguments):
    """Calls a compiled pass: tensors by their addresses, and as many threads as PyTorch has."""
    values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    getattr(load_library(), f"{function}_{_DTYPES[x.dtype]}")(*values, torch.get_num_threads())


def _shape(x):
    return x.numel() // x.shape[-1], x.shape[-1]


def _bytes(mask):
    return None if mask is None else mask.contiguous()


def _channels(x, *rows):
    return x.new_empty((*rows, x.shape[-1]), dtype=torch.float32)


def _floats(values):
    return None if values is None else values.float().contiguous()
