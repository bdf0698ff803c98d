"""By which path the passes of batch norms are computed."""

from collections.abc import Callable

import torch
from torch import nn

from .passes import TorchPasses
from .slabs import SlabPasses


# Device type, or that and the name of a norm: what gives the passes for tokens, or None. `hf_normswap.kernels` enters
# others.
PATHS: dict[str | tuple[str, str | None], Callable[[torch.Tensor], type | None]] = {"cpu": lambda x: SlabPasses}
COMPILED: dict[str, type] = {}  # device type: the passes of a compiled graph, if they are operators


def is_watched() -> bool:
    """Whether something looks at single operations: a tracer, a transform or a mode. They see none in another path."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def path_of(x: torch.Tensor, *others: torch.Tensor, norm: str | None = None) -> type:
    """By what the passes over `x` with `others` are computed: the path of their device, else [`TorchPasses`].

    A path for the norm of that name goes first. Only plain tensors of floating point on one device take another path
    than [`TorchPasses`].
    """
    if torch.compiler.is_compiling():
        return COMPILED.get(x.device.type, TorchPasses)
    device = x.device
    find = PATHS.get((device.type, norm)) or PATHS.get(device.type)
    if find is None or not x.is_floating_point() or x.numel() == 0 or is_watched():
        return TorchPasses
    for tensor in (x, *others):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device != device:
            return TorchPasses
    return find(x) or TorchPasses


def passes_for(x: torch.Tensor, *others: torch.Tensor, norm: str | None = None) -> type:
    """The passes of [`path_of`], but [`TorchPasses`] inside of autograd, which looks at single operations."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return TorchPasses
    return path_of(x, *others, norm=norm)
