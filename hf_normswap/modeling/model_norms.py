"""The norms among the modules of a model: which modules they are, what they compute, and the paths that are saved."""

import copy
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .base import Norm
from .configuration_normswap import NormSwapConfigMixin


# Where the wrappers of FSDP1, of activation checkpointing and of torch.compile keep the module inside.
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# What these, and PEFT where an adapter saves a module, insert into the path of a module.
_INSERTED = re.compile(rf"\.(original_module|modules_to_save\.[^.]+|{'|'.join(WRAPPED)})(?=\.|$)")
EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps")


class StockNorm(NamedTuple):
    """What a norm of PyTorch or transformers computes for each token.

    Attributes:
        kind (`str`): `"layernorm"` or `"rmsnorm"`.
        eps (`float`): added to the variance or to the mean square.
        offset (`float`): added to the stored gain; 1 where a model such as Gemma stores the gain minus 1.
        has_shift (`bool`): whether there is a shift.
    """

    kind: str
    eps: float
    offset: float = 0.0
    has_shift: bool = True

    def apply(self, x: torch.Tensor, gain: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
        """The norm of `x` of shape `(..., C)` with a gain that has its offset already."""
        if self.kind == "layernorm":
            return functional.layer_norm(x, x.shape[-1:], gain, shift, self.eps)
        y = functional.rms_norm(x, x.shape[-1:], gain, self.eps)
        return y if shift is None else y + shift


def read_norm(module: nn.Module) -> StockNorm | None:
    """What a module computes, if that is LayerNorm or RMSNorm over the last dimension; `None` if it is anything else.

    The module is tried, not its name: a copy with random gains runs on random tokens. Modules of one class with the
    same settings are tried once.
    """
    width = norm_width(module)
    if width is None or isinstance(module, Norm):
        return None
    if type(module).forward in _OF_PYTORCH:
        kind = _OF_PYTORCH[type(module).forward]
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return StockNorm(kind, eps, has_shift=getattr(module, "bias", None) is not None)
    key = (type(module), width, tuple(module._parameters), module.bias is None if hasattr(module, "bias") else None)
    key += tuple((name, value) for name, value in vars(module).items() if isinstance(value, float | int | str | bool))
    if key not in _READ:
        _READ[key] = _try_norm(module, width)
    return _READ[key]


# Their weights may be computed, by pruning or a parametrization.
_OF_PYTORCH = {nn.LayerNorm.forward: "layernorm", nn.RMSNorm.forward: "rmsnorm"}
_READ: dict[tuple, StockNorm | None] = {}


def norm_width(module: nn.Module) -> int | None:
    """Number of channels of a norm, or of a module that may be one by its parameters; `None` of any other module."""
    if isinstance(module, Norm):
        return module.num_features
    if type(module).forward in _OF_PYTORCH:
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    if module._modules or not ("norm" in type(module).__name__.lower() or "weight" in module._parameters):
        return None
    if not module._parameters.keys() <= {"weight", "bias"} or module._buffers:
        return None
    shapes = {tuple(tensor.shape) for tensor in module._parameters.values() if tensor is not None}
    if not shapes:  # one without gain, such as that of OLMo
        shape = getattr(module, "normalized_shape", ())
        shapes = {tuple(shape) if isinstance(shape, list | tuple | torch.Size) else (shape,)}
    shape = shapes.pop()
    return shape[0] if not shapes and len(shape) == 1 else None


@torch.no_grad()
def _try_norm(module: nn.Module, width: int) -> StockNorm | None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    trial = copy.copy(module)
    trial._parameters = {
        name: None if tensor is None else nn.Parameter(draw(width), requires_grad=False)
        for name, tensor in module._parameters.items()
    }
    for hooks in HOOKS:
        setattr(trial, hooks, None if hooks == "_is_full_backward_hook" else {})
    trial.__dict__.pop("forward", None)
    gain, shift = trial._parameters.get("weight"), trial._parameters.get("bias")
    # The larger tokens show the formula, the smaller ones its eps.
    large, small = (draw(2, 3, width) + 0.5) * 3, (draw(2, 3, width) + 0.5) * 1e-3
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            seen = [trial(x) for x in (large, small)]
    except Exception:  # it wants something else than tokens
        return None
    told = [getattr(module, name, None) for name in EPS_NAMES]
    for eps in dict.fromkeys([*told, 1e-6, 1e-5, 1e-12, 1e-8]):
        if not isinstance(eps, float | int):
            continue
        for kind in ("layernorm", "rmsnorm"):
            for offset in (0.0, 1.0) if gain is not None else (0.0,):
                stock = StockNorm(kind, float(eps), offset, shift is not None)
                wanted = [stock.apply(x, gain if gain is None else gain + offset, shift) for x in (large, small)]
                if all(_agree(a, b) for a, b in zip(seen, wanted, strict=True)):
                    return stock
    return None


def _agree(seen: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a norm returned `wanted`, in float32, in which most of them compute, whatever they are given."""
    if seen.shape != wanted.shape:
        return False
    # A stock checkpoint of fixed maps has such an eps that all outputs are small.
    return torch.allclose(seen.double(), wanted, rtol=1e-4, atol=1e-5 * min(1.0, wanted.abs().max().item()))


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called along with `module`."""
    return any(getattr(module, hooks) for hooks in HOOKS if hooks.endswith("_hooks"))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of this package, or a LayerNorm or RMSNorm of another."""
    return isinstance(module, Norm) or read_norm(module) is not None


def path_of(model: nn.Module, name: str) -> str:
    """The path in a model with a head of the module `name` of `model`, which may have none."""
    prefix = getattr(model, "base_model_prefix", "")
    return _INSERTED.sub("", name if not prefix or hasattr(model, prefix) else f"{prefix}.{name}")


def swapped_norms(model: nn.Module) -> dict[str, Norm]:
    """The norms of this package that `model` uses, by [`path_of`]."""
    return {path_of(model, name): module for name, module in active_modules(model) if isinstance(module, Norm)}


def active_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as `named_modules()` gives them, without those that an adapter of PEFT has put out of use.

    For each module of its `modules_to_save` it keeps the original beside a copy, and calls one of the two.

    Raises:
        ValueError: when a module is of another copy of this code.
    """
    idle = set()
    for name, module in model.named_modules():
        if module in idle:
            continue
        _check_copy(module)
        yield name, module
        copies = module._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):
            names = [] if module.disable_adapters else module.active_adapters
            used = next((copies[name] for name in names if name in copies), module.original_module)
            for other in (module.original_module, *copies.values()):
                idle.update(() if other is used else other.modules())


def refuse_other_copy(model: nn.Module) -> None:
    """Raises `ValueError` where a module of `model` is of another copy of this code."""
    for module in model.modules():
        _check_copy(module)


def _check_copy(module: nn.Module) -> None:
    """Raises `ValueError` for a norm or a model of another copy of this code, such as that beside its weights.

    No function would know the norms for what they are, and all would take the model for one without them.
    """
    is_norm = hasattr(type(module), "norm_name") and not isinstance(module, Norm)
    config = module.config if isinstance(module, PreTrainedModel) else None
    is_swapped = (getattr(config, "model_type", None) or "").startswith("normswap_")
    if is_norm or (is_swapped and not isinstance(config, NormSwapConfigMixin)):
        source = type(module if is_norm else config).__module__.rpartition(".")[0]
        raise ValueError(
            f"The model was made by another copy of this code ({source}): import hf_normswap first, and load the "
            "model again."
        )


def wrapped_attribute(model: nn.Module) -> str | None:
    """Name of the one module that a wrapper such as DistributedDataParallel or `torch.compile` is around."""
    names = ("_orig_mod", "module")
    return next((name for name in names if isinstance(getattr(model, name, None), nn.Module)), None)
