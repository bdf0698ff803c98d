"""Native backends of the norms, one for each kind of device (see `hf_normswap/modeling/backends.py`).

The backend for CPUs is a C++ file that is compiled on first use. The backend for CUDA, in Triton, is used when it is
asked for, and by default where [`FASTEST`] says so. Where a backend does not work (no compiler, no Triton), the
reference in PyTorch takes its place.
"""

import functools
import importlib

import torch
from transformers.utils import logging

from hf_normswap.modeling.backends import BACKENDS, COMPILED_BACKENDS, ReferenceBackend

from .ops import OperatorBackend


logger = logging.get_logger(__name__)

# A device, and the norms and dtypes for which its backend is the default there. The rule: in committed figures of
# hardware (`results/gpu/`) the kernels are correct, and faster than PyTorch in the forward, and in forward and
# backward together, at every size. `choose_defaults` in results/tables_speed.py derives the table; a test compares.
FASTEST: dict[str, set[tuple[str, torch.dtype]]] = {}
# What `use_kernels` takes: the devices whose backend computes every norm. Compiled graphs there have operators.
CHOICES = {"auto": ["cpu"], "all": ["cpu", "cuda"], "none": []}
# A device: the module of its backend in this folder, and the class.
_HOMES = {"cpu": ("cpu", "CpuBackend"), "cuda": ("triton", "TritonBackend")}


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
    COMPILED_BACKENDS.clear()
    COMPILED_BACKENDS.update(dict.fromkeys(CHOICES[kernels], OperatorBackend))
    BACKENDS.clear()
    BACKENDS.update({device: functools.partial(_find, device) for device in CHOICES[kernels]})
    if kernels == "auto":
        for device, defaults in FASTEST.items():
            for norm in {norm for norm, _ in defaults}:
                dtypes = [dtype for name, dtype in defaults if name == norm]
                BACKENDS[device, norm] = functools.partial(_find, device, dtypes=dtypes)


def load_backend(device: str) -> type[ReferenceBackend]:
    """The native backend of a kind of device, compiled now if need be.

    Raises:
        ImportError, OSError: when it does not work here, with the reason.
    """
    module, name = _HOMES[device]
    backend = getattr(importlib.import_module(f".{module}", __name__), name)
    backend.load()
    return backend


def _find(device: str, x: torch.Tensor, dtypes: list | None = None) -> type | None:
    backend = _load(device)
    return backend if backend and x.dtype in (dtypes or backend.dtypes) else None


@functools.cache
def _load(device: str) -> type | None:
    try:
        backend = load_backend(device)
    except (ImportError, OSError) as error:
        logger.info(f"Norms are computed in PyTorch on {device}: {error}.")
        return None
    logger.info(f"Norms are computed by {backend.__name__} on {device}.")
    return backend
