"""Which tokens are real: how a norm learns the padding mask.

transformers hands the mask to models and attention layers, never to a norm. Hooks on every model of the tree put what
a call says into the scope, [`padding_mask`] puts there what the user says, and a norm reads the innermost entry. "Not
known" and "no padding" are two things: a norm that does not know counts every token and warns.

The scope is a `threading.local`, which `torch.compile(fullgraph=True)` can trace and a `ContextVar` is not.
"""

import inspect
import math
import sys
import threading
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Calls without a mask that are searched for padding tokens: each search waits for the device.
_SEARCHES = 10
# Additive masks hide a token by the smallest number of a dtype, -inf, -1e9 or -10000. exp(-1000) is 0 in any dtype.
_HIDDEN = -1000.0


class _Scope(threading.local):
    def __init__(self):
        self.masks: list[_Entry] = []  # innermost last
        self.recompute = None  # see activation_checkpointing.py


# This file may be loaded twice, from the package and from the Hub: both copies read and write the same scope.
SCOPE = vars(torch).setdefault("_hf_normswap_scope_1", _Scope())


class TokenMask(NamedTuple):
    """Which tokens of one stack are real. Where that is not known, there is `None` in place of it.

    Attributes:
        real (`torch.Tensor` of shape `(B, T)`, *optional*): True at real tokens; `None` when all are.
        has_past (`bool`): whether columns for the tokens of a cache may stand in front.
        is_binding (`bool`): whether it comes from [`padding_mask`]: it must fit, and no other mask replaces it.
        recording (`PreTrainedModel`, *optional*): a model that makes its tokens of the samples that `real` is for.
    """

    real: torch.Tensor | None
    has_past: bool = False
    is_binding: bool = False
    recording: PreTrainedModel | None = None


NO_PADDING = TokenMask(None)


class _Stack(NamedTuple):
    """What is known about the tokens of one stack of a model."""

    tokens: TokenMask | None = None
    given: torch.Tensor | None = None  # the argument of the call that says it


class _Entry(NamedTuple):
    """What one model call, or one [`padding_mask`], says."""

    owner: object  # the model, or the padding_mask
    stack: _Stack
    decoder_stack: _Stack | None = None  # of a decoder inside, where that has other tokens
    decoder: nn.Module | None = None
    inputs: torch.Tensor | None = None  # the tokens of `stack`, or their embeddings
    parents: int = 0  # entries below that leave with this one
    running: int = 0  # of a padding_mask: models that ran when it was entered


_NOTHING = _Entry(None, _Stack())


class padding_mask:
    """Context manager that tells the norms which tokens are real.

    Norms leave padding out of their statistics. They know it from the `attention_mask` of the model call, and where
    that is missing from other arguments (the page "Concepts" of the documentation lists them). Inside this context the
    given masks count instead, whatever the models are called with. It works around every forward: a model, a stack
    such as `model.bert.encoder`, a block, a module that contains several models; with activation checkpointing and
    `torch.compile` too. The innermost context counts, in the thread that entered it.

    The mask is for the norms alone: attention goes by what the model is given.

    Args:
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            True or 1 at real tokens, one entry for each token of the forward; `None` says that all tokens are real.
            For multiple choice `(B, choices, T)`. In an encoder-decoder model it is for the tokens of the encoder.
        decoder_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            the same for the tokens of a decoder. Without it an encoder-decoder model goes by its arguments there, and
            a decoder that is called by itself takes `mask`.

    Raises:
        ValueError: when a mask has another number of dimensions; and in the forward, when the mask does not fit the
            tokens of a norm.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import padding_mask, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertModel(config), "batchnorm").train()
    >>> states, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> with padding_mask(mask):
    ...     states = model.encoder(states).last_hidden_state

    ```
    """

    def __init__(self, mask: torch.Tensor | None, decoder_mask: torch.Tensor | None = None):
        self._stack = _Stack(_binding(mask))
        self._decoder_stack = None if decoder_mask is None else _Stack(_binding(decoder_mask))

    def __enter__(self):
        SCOPE.masks.append(_Entry(self, self._stack, self._decoder_stack, running=len(_running_models())))
        return self

    def __exit__(self, *error):
        _leave(self)


def current_mask(x: torch.Tensor) -> torch.Tensor | None:
    """Token mask for activations `x` in the model call or [`padding_mask`] that is running.

    `x` has the shape `(B, T, C)`, `(B·T, C)` where a model flattens its tokens, or `(B, T, heads, C)`.

    Returns:
        `torch.Tensor` of the shape of `x` without its channels, True at real tokens, or `None` where all tokens count.

    Raises:
        ValueError: when the mask of a [`padding_mask`] has another shape.
    """
    return find_mask(x)[1]


def find_mask(x: torch.Tensor) -> tuple[bool, torch.Tensor | None]:
    """Whether it is known which tokens of `x` are real, and [`current_mask`]."""
    tokens = SCOPE.masks[-1].stack.tokens if SCOPE.masks else None
    if tokens is None or tokens.real is None:
        return tokens is not None, None
    real = _fit_to(tokens, x.shape[:-1])
    if real is not None:
        return True, real.to(x.device)
    if x.dim() == 2 and len(x) == len(tokens.real):  # one vector for each row of the batch, which all count
        return True, None
    if tokens.is_binding and x.dim() in (3, 4):
        raise ValueError(
            f"The mask of padding_mask has shape {tuple(tokens.real.shape)} and a norm inside it gets tokens of "
            f"shape {tuple(x.shape[:-1])}: give one entry for each token, and a padding_mask to each part of the "
            "forward that has other tokens."
        )
    return False, None


@torch.compiler.assume_constant_result  # under torch.compile it runs when the graph is made
def warn_of_unknown_mask(of_sentence: bool) -> None:
    """Say once that norms, with statistics of a sentence or of the batch, did not know which tokens are padding."""
    norms = "Norms with statistics of a sentence ran" if of_sentence else "Norms with batch statistics ran in training"
    logger.warning_once(
        f"{norms} without knowing which tokens are padding, and counted every token: call the whole model with a "
        "2-dimensional attention_mask, or wrap the call in "
        "`with hf_normswap.padding_mask(mask):`, where padding_mask(None) says that there is no padding."
    )


def watch_masks(model: nn.Module) -> None:
    """Install the hooks on `model` and on every transformers model inside it whose arguments tell its padding."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or _watcher_of(module) is not None:
            continue
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if {"attention_mask", "decoder_attention_mask"} & set(names) or not _reads_text(module):
            module.register_forward_pre_hook(_Watcher(names), with_kwargs=True)
            module.register_forward_hook(_leave_model, with_kwargs=True, always_call=True)


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


class _Watcher:
    """Forward pre-hook of a model: enters what its arguments say about the tokens.

    Args:
        names (list of `str`): the parameters of its forward.
    """

    watches_masks = True

    def __init__(self, names: list[str]):
        self.names = names
        self.is_encoder_decoder = "decoder_attention_mask" in names
        self.searches = _SEARCHES

    def __call__(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> None:
        _forget_interrupted(model)
        parents = _enter_parents(model)
        SCOPE.masks.append(self.read(model, args, kwargs, parents))

    def read(self, model: PreTrainedModel, args: tuple, kwargs: dict, parents: int = 0) -> _Entry:
        """The entry of a call with these arguments."""
        # torch 2.11 cannot compile the `_replace` of a named tuple: entries are made with all that they have.
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        outer = SCOPE.masks[-1] if SCOPE.masks else _NOTHING
        inputs = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if self.is_encoder_decoder:
            decoder_stack = _read_decoder(model.config, given, outer.decoder_stack or _Stack())
            stack = self._read(model, given, outer.stack)
            return _Entry(model, stack, decoder_stack, model.get_decoder(), inputs, parents)
        attends = given.get("encoder_hidden_states") is not None
        is_decoder = model is outer.decoder or attends or getattr(model.config, "is_decoder", False)
        if outer.decoder_stack is not None and is_decoder:
            stack = self._read(model, given, outer.decoder_stack, is_decoder=True)
            return _Entry(model, stack, inputs=inputs, parents=parents)
        around = outer.stack
        if attends and isinstance(outer.owner, nn.Module) and inputs is not outer.inputs:
            around = _Stack()  # what is known there is about the tokens that it attends to
        return _Entry(model, self._read(model, given, around), inputs=inputs, parents=parents)

    def _read(self, model: PreTrainedModel, given: dict, outer: _Stack, is_decoder: bool = False) -> _Stack:
        """What a call says about its tokens, given what is known around it."""
        mask, shape = given.get("attention_mask"), _token_shape(given)
        if _settles(outer, mask):
            return _Stack(outer.tokens, mask)
        if not _reads_text(model):  # its tokens are others than those of the model around it
            makes_mask = mask is not None and hasattr(model, "_get_feature_vector_attention_mask")
            return _Stack(TokenMask(mask, recording=model) if makes_mask else NO_PADDING, mask)
        # What a model computes for its decoder may count the last label as an input, and a mask of who sees whom tells
        # less about padding than that of the model around it.
        inherited = _inherit(outer.tokens, shape)
        if inherited is not None and (is_decoder or not _is_of_tokens(mask)):
            return _Stack(inherited, mask)
        has_past = given.get("past_key_values") is not None
        if mask is None:  # the model around may have made what the decoder reads, as BART does for classification
            tokens = _read_decoder_ids(model.config, given.get("input_ids")) if is_decoder else NO_PADDING
        else:
            tokens = read_mask(mask, shape, has_past)
        if tokens is not None and not _is_of_tokens(mask):
            self._search_padding(model, given.get("input_ids"), tokens)
        return _Stack(tokens, mask)

    def _search_padding(self, model: PreTrainedModel, ids: torch.Tensor | None, tokens: TokenMask) -> None:
        """Warn where padding tokens count, in one of the first training calls."""
        pad = next(iter(_token_ids(model.config, "pad_token_id")), None)
        if torch.compiler.is_compiling() or not self.searches or not model.training or ids is None or pad is None:
            return
        self.searches -= 1
        if not any(hasattr(norm, "update_statistics") and norm.training for norm in model.modules()):
            return
        pads = ids.reshape(-1, ids.shape[-1]).eq(pad)
        real = None if tokens.real is None else _columns_of_call(tokens, pads.shape)
        if real is not None:
            pads = pads & real
        if any(pad in _token_ids(model.config, f"{name}_token_id") for name in ("bos", "eos", "sep", "decoder_start")):
            pads = pads[:, 1:] & pads[:, :-1]  # one by itself may be an end of a sentence
        if pads.any():
            self.searches = 0
            logger.warning_once(
                f"The input_ids of a training call contain the padding token {pad} where no 2-dimensional "
                "attention_mask says that it is padding, and norms with batch statistics counted it: give the "
                "attention_mask, or wrap the call in `with hf_normswap.padding_mask(mask):`, where padding_mask(None) "
                "says that there is no padding."
            )


def _reads_text(model: PreTrainedModel) -> bool:
    """Whether a model reads token ids, or states; not one of images or sound alone, as a tower of CLIP is."""
    names = inspect.signature(type(model).forward).parameters.keys()
    return bool(names & {"input_ids", "inputs_embeds"}) or not names & {
        "pixel_values",
        "input_features",
        "input_values",
    }


def _leave_model(model: nn.Module, args: tuple, kwargs: dict, output) -> None:
    _leave(model)


_leave_model.watches_masks = True


def _is_ours(hook) -> bool:
    return getattr(hook, "watches_masks", False)


def _watcher_of(model: nn.Module) -> _Watcher | None:
    return next((hook for hook in model._forward_pre_hooks.values() if _is_ours(hook)), None)


def _leave(owner) -> None:
    """Remove the entry of `owner` and all above it."""
    for index in reversed(range(len(SCOPE.masks))):
        if SCOPE.masks[index].owner is owner:
            del SCOPE.masks[index - SCOPE.masks[index].parents :]
            return


def _forget_interrupted(model: nn.Module) -> None:
    """Remove what calls left behind that ended without their hooks, as at Ctrl-C in a notebook."""
    if any(entry.owner is model for entry in SCOPE.masks):
        SCOPE.masks = [entry for entry in SCOPE.masks if not isinstance(entry.owner, nn.Module)]


def _enter_parents(model: nn.Module) -> int:
    """Enter the running calls of models around `model` that are not watched yet, and watch these from now on.

    Such as an `EncoderDecoderModel` whose parts were swapped: nothing tells a part where it is put. Returns how many
    entries there are.
    """
    around = SCOPE.masks[-1] if SCOPE.masks else _NOTHING
    if isinstance(around.owner, nn.Module):
        return 0
    before = len(SCOPE.masks)
    for parent, args, kwargs in _running_models()[around.running :]:
        watch_masks(parent)
        watcher = _watcher_of(parent)
        if parent is not model and watcher is not None:
            SCOPE.masks.append(watcher.read(parent, args, kwargs))
    return len(SCOPE.masks) - before


def _running_models() -> list[tuple[PreTrainedModel, tuple, dict]]:
    """The models whose calls run in this thread, outermost first, with their arguments: from the stack of Python."""
    if torch.compiler.is_compiling():
        return []
    frame, models = sys._getframe(), []
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            call = frame.f_locals
            if isinstance(call["self"], PreTrainedModel):
                models.append((call["self"], call["args"], call["kwargs"]))
        frame = frame.f_back
    return models[::-1]


def _binding(mask: torch.Tensor | None) -> TokenMask:
    if mask is not None and not _is_of_tokens(mask):
        kind = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            f"A mask of {kind} does not say which tokens are real: give padding_mask one entry per token."
        )
    return TokenMask(None if mask is None else _flatten_choices(mask), is_binding=True)


def _is_of_tokens(mask) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() in (2, 3)


def _flatten_choices(mask: torch.Tensor) -> torch.Tensor:
    return mask.reshape(-1, mask.shape[-1]).bool()  # (B, choices, T) of multiple choice is flattened by the model


def read_mask(mask, shape: tuple | None, has_past: bool = False) -> TokenMask | None:
    """What an attention mask says about tokens of `shape`, `None` where that is not known.

    Where the call `has_past`, tokens in a cache, the first columns of the mask may be theirs.
    """
    if _is_of_tokens(mask):
        return TokenMask(_flatten_choices(mask), has_past)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    # (B, heads, queries, keys): what no query may see is padding.
    seen = mask > _HIDDEN if mask.is_floating_point() else mask.bool()
    real = seen.flatten(1, 2).any(1)
    if shape is not None and real.shape[0] == 1:
        real = real.expand(shape[0], -1)  # one mask for all rows
    return TokenMask(real, has_past)


def _fit_to(tokens: TokenMask, shape: tuple) -> torch.Tensor | None:
    """The mask of tokens of this shape, `None` where it does not fit."""
    if tokens.recording is not None:
        return _read_recording(tokens, shape)
    if len(shape) == 1 and shape[0] == tokens.real.numel():
        return tokens.real.reshape(-1)
    if len(shape) not in (2, 3):
        return None
    real = _columns_of_call(tokens, shape[:2])
    return real if real is None or len(shape) == 2 else real[..., None].expand(shape)


def _read_recording(tokens: TokenMask, shape: tuple) -> torch.Tensor | None:
    """The mask of the tokens of a recording, of which the model knows how many samples each one has."""
    rows, samples = tokens.real.shape
    count = int(tokens.recording._get_feat_extract_output_lengths(samples))
    if tuple(shape) != (rows, count):
        return None
    return tokens.recording._get_feature_vector_attention_mask(shape[1], tokens.real).bool()


def fit_mask(mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """A token mask for activations `x`; `None` where these are no tokens that it is for, such as a table."""
    return None if mask is None else _fit_to(TokenMask(mask), x.shape[:-1])


def _columns_of_call(tokens: TokenMask, shape: tuple) -> torch.Tensor | None:
    """The part of `tokens.real` for the tokens of a call, of this shape; `None` where it does not fit."""
    rows, columns = tokens.real.shape
    past = columns - shape[1]
    if rows != shape[0] or past < 0 or (past > 0 and not tokens.has_past):
        return None
    return tokens.real[:, past:]


def _token_shape(given: dict, prefix: str = "") -> tuple[int, int] | None:
    """`(B, T)` of the tokens that a call is given."""
    ids, embeddings = given.get(f"{prefix}input_ids"), given.get(f"{prefix}inputs_embeds")
    if ids is None and embeddings is None:
        return None
    shape = ids.shape if ids is not None else embeddings.shape[:-1]
    return math.prod(shape[:-1]), shape[-1]  # Size.numel() would fix the batch size of an exported graph


def _inherit(outer: TokenMask | None, shape: tuple | None) -> TokenMask | None:
    """What is known around a call, if that is about tokens of exactly this shape."""
    if outer is None or outer.real is None or shape not in (None, tuple(outer.real.shape)):
        return None
    return TokenMask(outer.real, False, outer.is_binding, outer.recording)


def _settles(outer: _Stack, mask: torch.Tensor | None) -> bool:
    """Whether what is known around a call decides: it is binding, or `mask` is the argument that it was read from."""
    if outer.tokens is None:
        return False
    return outer.tokens.is_binding or (mask is not None and mask is outer.given)


def _token_ids(config, name: str) -> list[int]:
    """Special tokens of a model; an EncoderDecoderModel may have them in the configuration of its decoder."""
    for part in (config, getattr(config, "decoder", None)):
        ids = getattr(part, name, None)
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def _read_decoder(config, given: dict, outer: _Stack) -> _Stack:
    """Training code almost never passes `decoder_attention_mask`: derive it from what it does pass."""
    mask, labels, ids = (given.get(name) for name in ("decoder_attention_mask", "labels", "decoder_input_ids"))
    shape = _token_shape(given, "decoder_")
    has_past = given.get("past_key_values") is not None
    tokens = outer.tokens if _settles(outer, mask) else read_mask(mask, shape, has_past)
    if tokens is None and labels is not None and _are_of_tokens(labels) and shape in (None, tuple(labels.shape)):
        tokens = TokenMask(labels.ne(-100))  # position t predicts labels[t]
    # The model with a head saw the labels, the one inside does not.
    return _Stack(tokens or _inherit(outer.tokens, shape) or _read_decoder_ids(config, ids), mask)


def _are_of_tokens(labels: torch.Tensor) -> bool:
    """Whether labels are token ids, and not several numbers for each text."""
    return labels.dim() == 2 and not labels.is_floating_point()


def _read_decoder_ids(config, ids: torch.Tensor | None) -> TokenMask:
    pads = _token_ids(config, "pad_token_id")
    if ids is None or not pads:
        return NO_PADDING
    # Label smoothing removes the labels before the forward. An end-of-sentence input has no label either.
    real = torch.ones_like(ids, dtype=torch.bool)
    for token in (*pads, *_token_ids(config, "eos_token_id")):
        real = real & ids.ne(token)
    # Decoding starts with <pad>, which is real.
    return TokenMask(torch.cat([torch.ones_like(real[:, :1]), real[:, 1:]], dim=1))
