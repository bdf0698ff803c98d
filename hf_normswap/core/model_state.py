"""Checks of a model, made before anything of it is changed or read.

Functions make them in this order: the model is a bare one, of this copy of the code, and in memory; then what the
function needs besides.
"""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.configuration_normswap import FORMAT_VERSION
from hf_normswap.modeling.model_norms import has_hooks, refuse_other_copy, wrapped_attribute
from hf_normswap.modeling.modeling_normswap import (
    NormSwapMixin,
    prepare_swapped,
    release_swapped,
    stock_class,
    swapped_class,
)
from hf_normswap.modeling.replace import change_class


# What to do where a weight is computed, or where something else comes between a layer and its output.
PLAIN = "merge adapters, make pruned and parametrized weights permanent, and remove hooks"
# They call the model inside them as it is, and change nothing of it.
WRAPPERS = nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel

_Function = TypeVar("_Function", bound=Callable[..., Any])


def unwrap(model) -> nn.Module:
    """The model inside DistributedDataParallel, `torch.compile` or an average of weights; any other model as it is."""
    while isinstance(model, WRAPPERS) or "_orig_mod" in getattr(model, "_modules", ()):
        model = getattr(model, wrapped_attribute(model))
    return model


def swapped_parts(model: nn.Module) -> dict[str, NormSwapMixin]:
    """The swapped models in `model` by name, without those inside another one; a swapped model itself is `""`."""
    parts: dict[str, NormSwapMixin] = {}
    for name, module in model.named_modules():
        is_inside = "" in parts or any(name.startswith(f"{part}.") for part in parts)
        if isinstance(module, NormSwapMixin) and not is_inside:
            parts[name] = module
    return parts


def is_composite(model: nn.Module) -> bool:
    """Whether `model` is a module around swapped models, which it may call any number of times, with any inputs."""
    return not swapped_parts(model).keys() <= {""}


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of a model have to be."""
    return next(model.parameters()).device


def run_model(model: nn.Module, batch: Mapping):
    """The output of a model for one batch, with names whatever its configuration says of tuples."""
    # Only where it is needed: accelerate leaves a forward in a model that it has prepared which does not take it.
    returns_tuples = isinstance(model, PreTrainedModel) and not getattr(model.config, "return_dict", True)
    return model(**send_to_device(batch, device_of(model)), **({"return_dict": True} if returns_tuples else {}))


def outside_modes(function: _Function) -> _Function:
    """Let a function of a model run outside `torch.autocast` and `torch.inference_mode` of its caller.

    Under autocast a fit rounds its sums to 16 bits: the logits of a converted model were wrong by 82 %, not by 22 %.
    Tensors that are made in inference mode cannot be trained later.
    """

    @functools.wraps(function)
    def run(model, *args, **kwargs):
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        with contextlib.ExitStack() as stack:
            for device in {parameter.device.type for parameter in parameters} - {"meta"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            if torch.is_inference_mode_enabled():  # it turns gradients on, too
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            return function(model, *args, **kwargs)

    return run  # type: ignore[return-value]


def check_whole(model, action: str | None = None, *, role: str = "model", needs_weights: bool = True) -> None:
    """Raises `ValueError` unless `model` is a bare model of transformers, of this copy of the code, and in memory.

    Args:
        model: anything.
        action (`str`, *optional*): what has to come before wrapping; else the model inside of the wrapper will do.
        role (`str`, *optional*, defaults to `"model"`): what the sentence calls it.
        needs_weights (`bool`, *optional*, defaults to `True`):
            whether its tensors have to have values; else the whole model may be on the meta device.
    """
    refuse_wrapped(model, action, role)
    refuse_replaced_forward(model, role)
    refuse_other_copy(model)
    refuse_offloaded(model, role)
    if needs_weights:
        refuse_meta(model, role)


def check_model(model) -> None:
    """Raises `ValueError` for a model whose norms cannot be changed."""
    check_whole(model, "swap, restore or move its norms", needs_weights=False)
    refuse_pair(model)
    if isinstance(model, NormSwapMixin):
        refuse_folded(model)
    if swapped_class(type(model)) is None:
        raise ValueError(
            f"{type(model).__name__} derives from no model class of transformers, and a folder of it would not load: "
            "derive it from one, such as the base class of transformers' models of its family."
        )


def refuse_pair(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model that is put together of two others, each with a configuration of its own."""
    configs = type(model.config).sub_configs
    if all(configs.get(name) is AutoConfig for name in ("encoder", "decoder")):
        parts = [name for name, part in model.named_children() if isinstance(part, PreTrainedModel)]
        raise ValueError(
            f"A {type(model).__name__} is a pair of models: pass its parts, {' and '.join(f'.{n}' for n in parts)}, "
            "one by one."
        )


def check_swapped(model) -> dict:
    """The record of the swap of `model`, once it is clear that its norms can be fitted or folded."""
    check_whole(model)
    refuse_training(model)
    record = getattr(model.config, "norm_swap", None)
    if record is None:
        raise ValueError(f"This {type(model).__name__} has no swapped norms: call swap_norm(model, ...) first.")
    refuse_folded(model)
    refuse_mixture(model)
    return record


def refuse_wrapped(model, action: str | None = None, role: str = "model") -> None:
    """Raises `ValueError` for what is no bare model of transformers."""
    kind = type(model).__name__
    if kind.startswith(("FSDP", "FullyShardedDataParallel")):
        raise ValueError(f"The {role} is sharded by FSDP: {action or 'do this'} before sharding it.")
    if isinstance(model, PreTrainedModel):
        return
    if attribute := wrapped_attribute(model):
        cure = f"{action} before wrapping or compiling it" if action else f"pass its .{attribute}"
        raise ValueError(f"The {role} is wrapped in {kind}: {cure}.")
    if hasattr(model, "get_base_model"):
        raise ValueError(f"The {role} is wrapped in {kind}: pass its .get_base_model().")
    raise ValueError(f"Norms are those of a model of transformers, not of a {kind}: pass one.")


def refuse_replaced_forward(model: nn.Module, role: str = "model") -> None:
    """Raises `ValueError` where a module of `model` has another `forward` than its class, which a copy takes along.

    `model.forward = torch.compile(model.forward)` is one: in a copy it computes with the weights of the original.
    """
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if forward is None or hasattr(module, "_hf_hook") or getattr(forward, "__self__", None) is module:
            continue
        place = f"the {role}" if name == "" else f"{name} of the {role}"
        raise ValueError(
            f"The forward of {place} was replaced, as by model.forward = torch.compile(model.forward), and copies of "
            "the model would go on calling it: delete the attribute forward, and set it again afterwards."
        )


def refuse_offloaded(model: nn.Module, role: str = "model") -> None:
    """Raises `ValueError` where accelerate keeps weights of `model` elsewhere and brings them for each forward."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook])):
            raise ValueError(
                f"The {role} is offloaded ({name or 'the whole of it'}): load it where all of it fits into memory, "
                "without offloading."
            )


def refuse_meta(model: nn.Module, role: str = "model") -> None:
    """Raises `ValueError` where tensors of `model` have no values."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_meta:
                raise ValueError(f"The {role} is on the meta device ({name}): load its weights first.")


def refuse_training(model: nn.Module, role: str = "model") -> None:
    """Raises `ValueError` for a model that is in training mode, wholly or in part."""
    if any(module.training for module in model.modules()):
        raise ValueError(f"The {role} is in training mode: call {role}.eval() first.")


def refuse_folded(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model whose norms are folded away."""
    if "folded" in (getattr(model.config, "norm_swap", None) or {}):
        raise ValueError("The norms of this model are folded away: load it from before that.")


def refuse_mixture(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model in the middle of a progressive swap."""
    if "layer_norm_share" in (model.config.norm_swap or {}):
        raise ValueError("LayerNorm still has a share in these norms: finish the progressive swap first.")


def obstacle_of_linear(module: nn.Module) -> str | None:
    """Why a linear layer does not simply multiply by its weight and add its bias, `None` where it does."""
    if not _is_plain_linear(type(module)):
        return f"is a {type(module).__module__}.{type(module).__name__}"
    if has_hooks(module):
        return "has hooks"
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return "has a forward of its own"
    return None if _has_plain_parameters(module) else "has a weight or a bias that is no plain parameter"


@functools.cache
@torch.no_grad()
def _is_plain_linear(cls: type) -> bool:
    """Whether a class of layers computes what `nn.Linear` does, as some of transformers' own do."""
    if cls in (nn.Linear, Conv1D):
        return True
    if not issubclass(cls, nn.Linear) or not cls.__module__.startswith("transformers.models."):
        return False
    linear, x = cls(3, 2), torch.ones(1, 3)
    return torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def refuse_computed(norms: Mapping[str, nn.Module]) -> None:
    """Raises `ValueError` where the gain or the shift of a norm is computed from something else."""
    for name, norm in norms.items():
        if not _has_plain_parameters(norm):
            raise ValueError(f"{name} has a gain or a shift that is computed, or no plain parameter: {PLAIN} first.")


def refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Raises `ValueError` where a module of `names` has its weight in common with another place in the model."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in names:
        if any(uses[id(parameter)] > 1 for parameter in model.get_submodule(name).parameters()):
            raise ValueError(
                f"{name} shares its weights with another layer, and cannot be fitted to two places: give it its own."
            )


def _has_plain_parameters(module: nn.Module) -> bool:
    own = ("bias",) if isinstance(module, Norm) and not module.has_gain else ("weight", "bias")
    names = [name for name in own if getattr(module, name, None) is not None]
    values = [module._parameters.get(name) for name in names]
    return all(type(value) is nn.Parameter and value.is_floating_point() for value in values)


def set_recorded_swap(model, record: dict) -> None:
    """Make `model` one of the class of swapped models, whose configuration has this `record`."""
    change_class(model, swapped_class(type(model)))
    _set_config(model, model.config_class, record)
    release_swapped(model)
    prepare_swapped(model)


def restore_transformers_class(model) -> None:
    """Make a model without swapped norms one of its class of transformers."""
    stock = stock_class(type(model))
    if stock is None:  # derived from a swapped class, it stays of that without a swapped norm
        return set_recorded_swap(model, {"format_version": FORMAT_VERSION, "norms": []})
    change_class(model, stock)
    _set_config(model, model.config_class, None)
    release_swapped(model)


def _set_config(model, config_class, record: dict | None) -> None:
    """Give the model, and every part that shares its configuration, a copy of the class `config_class`."""
    new = copy.deepcopy(model.config)  # the caller's object may belong to another model too
    new.__class__ = config_class
    for name in ("model_type", "auto_map", "norm_swap"):
        new.__dict__.pop(name, None)
    if record is not None:
        new.norm_swap = record
        new.register_models()
    share_config(model, new)


def share_config(model, config) -> None:
    """Give the model, and every part that shares its configuration, another one."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
