"""By which path the passes of batch norms are computed."""

from collections.abc import Callable

import torch
from torch import nn

from .passes import TorchPasses
from .slabs import SlabPasses


# Device type: what gives the passes for tokens, or None. `hf_normswap.kernels` enters others.
PATHS: dict[str, Callable[[torch.Tensor], type | None]] = {"cpu": lambda x: SlabPasses}
COMPILED: dict[str, type] = {}  # device type: the passes of a compiled graph, if they are operators


def passes_for(x: torch.Tensor) -> type:
    """What computes the passes over `x`: that of its device, and [`TorchPasses`] where there is none.

    Only plain tensors of floating point, outside of autograd, take another path than that.
    """
    if torch.compiler.is_compiling():
        return COMPILED.get(x.device.type, TorchPasses)
    find = PATHS.get(x.device.type)
    is_plain = type(x) in (torch.Tensor, nn.Parameter) and x.is_floating_point() and x.numel() > 0
    if find is None or not is_plain or torch.is_grad_enabled():
        return TorchPasses
    return find(x) or TorchPasses
