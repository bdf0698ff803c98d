"""LayerNorm as RMSNorm: where the residual stream has no mean over the channels, they are the same."""

import torch
from transformers import PreTrainedModel

from hf_normswap.core.model_state import PLAIN, check_whole, obstacle_of_linear, refuse_training
from hf_normswap.core.norm_sites import find_norms
from hf_normswap.core.residual_stream import ResidualStream, find_tied_head
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.configuration_normswap import family_of
from hf_normswap.modeling.norms import NormSwapConfig
from hf_normswap.modeling.replace import untie_head
from hf_normswap.swap import swap_norm

from .equivalence import apply_if_equivalent


@torch.no_grad()
def convert_to_rmsnorm(model: PreTrainedModel, *, untie: bool = False) -> PreTrainedModel:
    """Replace every LayerNorm of a pre-norm model by RMSNorm, in place, without changing what it computes.

    What is added to the residual stream loses its mean over the channels: embeddings, and outputs of the linear layers
    that write to it. LayerNorm subtracts that mean anyway, and the rest of it is RMSNorm (Jiang et al., "Pre-RMSNorm
    and Pre-CRMSNorm Transformers", 2023, arXiv 2305.14858).

    Args:
        model ([`~transformers.PreTrainedModel`]): a GPT-2 with its LayerNorms, in evaluation mode.
        untie (`bool`, *optional*, defaults to `False`):
            whether a head that shares its weights with the embeddings gets weights of its own, which it needs.

    Returns:
        The same model, swapped to `"rmsnorm"`.

    Raises:
        ValueError: when the model has post-norm blocks or norms other than LayerNorm, its head shares the weights of
            the embeddings without `untie`, it is in training mode, or its outputs would change. The model is untouched
            then.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2ForSequenceClassification
    >>> from hf_normswap import convert_to_rmsnorm, find_norms
    >>> model = GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).eval()
    >>> [site.kind for site in find_norms(convert_to_rmsnorm(model))]
    ['rmsnorm', 'rmsnorm', 'rmsnorm']

    ```
    """
    check_whole(model)
    sites = find_norms(model)
    refuse_training(model)
    if any(site.placement == "post" for site in sites):
        raise ValueError("The residual stream of a post-norm model has a mean that matters: convert a pre-norm one.")
    if family_of(model.config.model_type) != "gpt2":
        raise ValueError(f"Only GPT-2 is converted, not a {type(model).__name__} in the pre placement.")
    if any(isinstance(site.module, Norm) for site in sites):
        raise ValueError("Some norms are swapped already: call restore_norm(model) first.")
    tied = find_tied_head(model)
    if tied and not untie:
        raise ValueError(f"{tied} shares its weights with the embeddings, which have to change: pass untie=True.")
    for name in _writers(model):
        if reason := obstacle_of_linear(model.get_submodule(name)):
            raise ValueError(f"{name} {reason}, and cannot lose the mean of its outputs: {PLAIN} first.")
    apply_if_equivalent(model, _convert)
    return model


def _writers(model: PreTrainedModel) -> list[str]:
    """The linear layers that write to the residual stream."""
    stream = ResidualStream(model)
    return list(dict.fromkeys(name for total in stream.sums for name in stream.writers(total).linears))


def _convert(model: PreTrainedModel) -> None:
    if tied := find_tied_head(model):
        untie_head(model, tied)
    sites = find_norms(model)
    inside = model.base_model
    for module in (inside.wte, inside.wpe, *map(model.get_submodule, _writers(model))):
        for values in (module.weight, getattr(module, "bias", None)):
            if values is not None:
                # The channels of the stream are the last dimension of embeddings, biases and Conv1D.
                exact = values.double()
                values.copy_(exact - exact.mean(-1, keepdim=True))
    (eps,) = {site.module.eps for site in sites}
    swap_norm(model, NormSwapConfig("rmsnorm", eps=eps), where="all")  # with a configuration of the model's own
    if tied:
        model.config.tie_word_embeddings = False  # of GPT-2 that is the head alone
