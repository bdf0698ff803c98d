"""One norm in place of another: the same parameters, hooks, device, dtype and training flag."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .blend import unblend_norm
from .norm import Norm
from .registry import get_norm
from .swap_config import NormSwapConfig


_HOOKS = (
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
    return any(getattr(module, hooks) for hooks in _HOOKS if hooks.endswith("_hooks"))


def new_norm(old: nn.Module, config: NormSwapConfig, *, on_default_device: bool = False) -> Norm:
    """The norm of `config` in place of `old`: the same parameters, hooks, device, dtype and training flag.

    A model under construction makes its buffers `on_default_device`, as every module of it does: its parameters may
    have gone to the meta device meanwhile, to be loaded. Running values that are not loaded with them stay NaN:
    accelerate's `load_checkpoint_and_dispatch` leaves buffers of what goes to disk out, unless `offload_buffers=True`.
    """
    cls = get_norm(config.norm)
    options = dict(config.options)
    if cls.keeps_eps:
        options.setdefault("eps", old.eps)
    options["bias"] = options.get("bias", True) and old.bias is not None
    device = None if on_default_device else old.weight.device
    norm = cls(old.weight.shape[0], device=device, dtype=old.weight.dtype, **options)
    norm.options, norm.replaced_eps = options, old.eps
    if on_default_device and old.weight.is_meta:
        for running in getattr(norm, "running", ()):
            getattr(norm, running).fill_(torch.nan)
    return _take_over(old, norm)


def new_layer_norm(old: Norm) -> nn.LayerNorm:
    """The LayerNorm that `old` replaced."""
    unblend_norm(old)  # its hooks go over to the new one
    norm = nn.LayerNorm(old.num_features, eps=old.replaced_eps, device=old.weight.device, dtype=old.weight.dtype)
    return _take_over(old, norm)


def _take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    new.weight = old.weight  # the parameter itself: an optimizer built before, and ties, go on working
    if new.bias is not None and old.bias is not None:
        new.bias = old.bias
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    return new.train(old.training)


def change_class(module: nn.Module, cls: type) -> None:
    """Make a live module one of the class `cls`, with what construction does for its class.

    transformers notes the outputs that a class of models can record, such as hidden states, when one is constructed.
    """
    module.__class__ = cls
    if isinstance(module, PreTrainedModel):
        # By the name of the class, in every version; later ones derive it from a model that is given as the key.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)


def place_norms(model: nn.Module, norms: dict[str, nn.Module]) -> None:
    """Put each norm in its place."""
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, norm)
