"""Attention of a decoder to the last few tokens alone, through the mask interface of transformers."""

from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def limit_attention(model: PreTrainedModel, size: int) -> None:
    """Let each token of a causal stack attend to itself and the `size` − 1 tokens before it, in place.

    Encoders and cross-attention see what they saw. A folder does not record the limit: call this after loading, too.

    Args:
        model ([`~transformers.PreTrainedModel`]): one whose masks come from `transformers.masking_utils`.
        size (`int`): tokens that each token sees, itself included.

    Raises:
        ValueError: when `size` is less than 1, or the attention of the model is not `"sdpa"`.
    """
    if size < 1:
        raise ValueError(f"A token sees itself at least: pass an ngram of 1 or more, not {size}.")
    if model.config._attn_implementation != "sdpa":
        raise ValueError(
            f"The limit is for sdpa, and the attention of the model is {model.config._attn_implementation}: load it "
            "with attn_implementation='sdpa'."
        )
    name = f"sdpa_ngram_{size}"
    AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register(name, partial(_make_mask, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], size))
    model.set_attn_implementation(name)


def _make_mask(make, size, *, kv_length, mask_function, **kwargs):
    """The mask that `make` makes, of the last `size` tokens where it hides later ones."""
    first, second = torch.arange(2)
    hides_later_tokens = not mask_function(first, first, first, second)
    if hides_later_tokens and kv_length > size:
        mask_function = and_masks(mask_function, sliding_window_overlay(size))
        kwargs["allow_is_causal_skip"] = False
    return make(kv_length=kv_length, mask_function=mask_function, **kwargs)
