"""How a norm learns which tokens are real.

transformers hands the padding mask to models and attention layers, never to a norm. Hooks on every model of the tree
put the mask of the call in a scope; a norm reads the innermost one. The scope is a `threading.local`, which
`torch.compile(fullgraph=True)` can trace and a `ContextVar` is not.
"""

import functools
import inspect
import threading

import torch
from torch import nn
from transformers import PreTrainedModel


class _Scope(threading.local):
    def __init__(self):
        self.masks = []  # innermost last: (mask of this stack, mask for a decoder inside)
        self.tape = None  # see recompute.py


SCOPE = _Scope()


def current_mask(x: torch.Tensor) -> torch.Tensor | None:
    """Token mask for activations `x` of shape `(B, T, C)` in the model call that is running.

    Returns:
        `torch.Tensor` of shape `(B, T)`, True at real tokens, or `None` where all tokens count: no mask was given, a
        4-dimensional attention mask (it says who sees whom, not what is padding), or activations of another shape.
    """
    if not SCOPE.masks:
        return None
    mask = SCOPE.masks[-1][0]
    # With a key-value cache the mask covers past tokens too: the last T columns are these.
    if mask is None or x.dim() != 3 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
        return None
    return mask[:, mask.shape[1] - x.shape[1] :]


def watch_masks(model: nn.Module) -> None:
    """Install the hooks on `model` and on every transformers model inside it that takes an `attention_mask`."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or _is_watched(module):
            continue
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if "attention_mask" in names:
            module.register_forward_pre_hook(functools.partial(_push, tuple(names)), with_kwargs=True)
            module.register_forward_hook(_pop, with_kwargs=True, always_call=True)


def unwatch_masks(model: nn.Module) -> None:
    """Remove what [`watch_masks`] installed."""
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                flags.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _is_ours(hook) -> bool:
    return hook is _pop or getattr(hook, "func", None) is _push


def _is_watched(module: nn.Module) -> bool:
    return any(_is_ours(hook) for hook in module._forward_hooks.values())


def _as_token_mask(mask) -> torch.Tensor | None:
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 3):
        return None
    return mask.reshape(-1, mask.shape[-1]).bool()  # (B, choices, T) of multiple choice is flattened by the model


def _push(names: tuple, module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = _as_token_mask(given.get("attention_mask"))
    outer = SCOPE.masks[-1][1] if SCOPE.masks else None
    if "decoder_input_ids" in names:
        SCOPE.masks.append((mask, _decoder_mask(module.config, given, outer)))
    else:
        # A bare decoder stack inside an encoder-decoder is rarely given a mask of its own.
        SCOPE.masks.append((outer if mask is None and not _is_encoder(module) else mask, None))


def _pop(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    if SCOPE.masks:
        SCOPE.masks.pop()


def _is_encoder(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Encoder")


def _decoder_mask(config, given: dict, outer: torch.Tensor | None) -> torch.Tensor | None:
    """Training code almost never passes `decoder_attention_mask`: derive it from what it does pass."""
    mask = _as_token_mask(given.get("decoder_attention_mask"))
    if mask is not None:
        return mask
    if given.get("labels") is not None:
        return given["labels"].ne(-100)  # position t predicts labels[t]
    if outer is not None:
        return outer  # the model with a head saw the labels, the one inside does not
    ids = given.get("decoder_input_ids")
    if ids is None or config.pad_token_id is None:
        return None
    # Label smoothing removes the labels before the forward. An end-of-sentence input has no label either.
    real = ids.ne(config.pad_token_id)
    if isinstance(config.eos_token_id, int):
        real = real & ids.ne(config.eos_token_id)
    return torch.cat([torch.ones_like(real[:, :1]), real[:, 1:]], dim=1)  # decoding starts with <pad>, which is real
