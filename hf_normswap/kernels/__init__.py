"""Faster paths for the passes of norms (see `hf_normswap/modeling/passes.py`), one for each kind of device.

On a CPU a C++ file is compiled on first use. The path for CUDA, in Triton, is taken when it is asked for, and by
default where [`FASTEST`] says so. Where a path does not work (no compiler, no Triton), PyTorch takes its place.
"""

import functools
import importlib

import torch
from transformers.utils import logging

from hf_normswap.modeling.paths import COMPILED, PATHS
from hf_normswap.modeling.slabs import SlabPasses

from .ops import OpPasses


logger = logging.get_logger(__name__)

# The norms and dtypes for which the kernels of a device are the default there. The rule: in committed figures of
# hardware (results/gpu/) the kernels are correct, and faster than PyTorch in the forward, and in forward and
# backward together, at every size. `choose_paths` in benchmarks/render_speed.py derives the table; a test compares.
FASTEST: dict[tuple[str, torch.dtype], str] = {}
CHOICES = {"auto": ["cpu"], "all": ["cpu", "cuda"], "none": []}
_HOMES = {"cpu": ("cpu", "CpuPasses"), "cuda": ("triton", "TritonPasses")}
_IN_PYTORCH = {"cpu": SlabPasses}


def use_kernels(kernels: str) -> None:
    """Choose how batch norms and RMSNorm compute from now on, in this process.

    `import hf_normswap` does what the environment variable `HF_NORMSWAP_KERNELS` says, and else `"auto"`.

    Args:
        kernels (`str`):
            `"auto"`: by compiled code on CPUs, by Triton on CUDA for the norms and dtypes that measurements have shown
            it to be faster for (none so far), in PyTorch elsewhere; `"all"`: by Triton on CUDA; `"none"`: in PyTorch.

    Raises:
        ValueError: when it is none of these.

    Example:

    ```python
    >>> from hf_normswap import use_kernels
    >>> use_kernels("none")
    >>> use_kernels("auto")

    ```
    """
    if kernels not in CHOICES:
        raise ValueError(f"HF_NORMSWAP_KERNELS is {', '.join(CHOICES)}, and cannot be {kernels!r}.")
    COMPILED.clear()
    COMPILED.update(dict.fromkeys(CHOICES[kernels], OpPasses))
    PATHS.clear()
    for device in _HOMES:
        PATHS[device] = functools.partial(_find, device if device in COMPILED else None, _IN_PYTORCH.get(device))
    if kernels == "auto":
        for (norm, _), device in FASTEST.items():
            dtypes = [dtype for name, dtype in FASTEST if name == norm]
            PATHS[device, norm] = functools.partial(_find, device, None, dtypes=dtypes)


def _find(device: str | None, otherwise: type | None, x: torch.Tensor, dtypes: list | None = None) -> type | None:
    passes = device and _load(device)
    return passes if passes and x.dtype in (dtypes or passes.dtypes) else otherwise


@functools.cache
def _load(device: str) -> type | None:
    module, name = _HOMES[device]
    try:
        passes = getattr(importlib.import_module(f".{module}", __name__), name)
        passes.load()
    except (ImportError, OSError) as error:
        logger.info(f"Batch norms run in PyTorch on {device}: {error}.")
        return None
    logger.info(f"Batch norms run in {name} on {device}.")
    return passes
