"""The initial weights of a new model without norms: Fixup, and weight normalisation."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .core.data import complete_batches
from .core.model_state import check_whole, obstacle_of_linear, outside_modes, run_model
from .core.residual_stream import ResidualStream
from .core.statistics import evaluating
from .modeling.fixup import Fixup
from .modeling.linears import WeightNormalized
from .modeling.model_norms import swapped_norms
from .modeling.moments import masked_moments
from .modeling.padding_mask import current_mask


logger = logging.get_logger(__name__)


@outside_modes
def initialize_fixup(model: PreTrainedModel) -> PreTrainedModel:
    """Give the linear layers of a new model the initialisation of Fixup (arXiv 1901.09321), in place.

    It goes with the norms: `swap_norm(model, "fixup", where="all")` comes first. With L residual branches in the model
    and m linear layers in a row in a branch, the last linear layer of each branch becomes 0, and the weights of the
    others are multiplied by `L^(−1/(2m − 2))`. m is 2 in attention, whose queries, keys and values are side by side,
    and in a feed-forward network. The head, such as a classifier, becomes 0; a head that is tied to the embeddings
    stays, and a warning says so. The branches are read off the graph of the forward, for any architecture.

    Args:
        model ([`~transformers.PreTrainedModel`]): a new model with `"fixup"` in the place of its norms. A pretrained
            one is refused, as it would lose its weights.

    Returns:
        The same model.

    Raises:
        ValueError: when the model is pretrained, has no such norms, or has other weights in its residual branches than
            those of plain linear layers. Nothing was changed then.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import initialize_fixup, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertForSequenceClassification(config), "fixup", where="all")
    >>> model = initialize_fixup(model)
    >>> model.bert.encoder.layer[0].output.dense.weight.any().item()
    False

    ```
    """
    check_whole(model)
    if not any(isinstance(norm, Fixup) for norm in swapped_norms(model).values()):
        raise ValueError(f'This {type(model).__name__} has no fixup norms: call swap_norm(model, "fixup") first.')
    _refuse_pretrained(model, "initialize_fixup")
    stream = ResidualStream(model)
    branches = stream.branches()
    factors = {}
    for branch in branches:
        for name in branch.linears:
            obstacle = obstacle_of_linear(model.get_submodule(name))
            if branch.obstacle or obstacle:
                reason = branch.obstacle or f"{name} {obstacle}"
                raise ValueError(f"{reason}, which Fixup cannot initialise: take another norm.")
            is_end = name in branch.ends
            factors[name] = 0.0 if is_end else len(branches) ** (-1 / (2 * branch.length - 2))
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for name in stream.heads() if model.base_model is not model else ():
        if model.get_submodule(name).weight in tables:
            logger.warning(f"The head {name} is tied to the embeddings, and keeps its weights.")
        else:
            factors.setdefault(name, 0.0)
    with torch.no_grad():
        for name, factor in factors.items():
            linear = model.get_submodule(name)
            linear.weight.mul_(factor)
            if linear.bias is not None and factor == 0:
                linear.bias.zero_()
    return model


@outside_modes
@torch.no_grad()
def initialize_weightnorm(model: PreTrainedModel, batch: Mapping) -> PreTrainedModel:
    """Give a new model with weight normalisation its initialisation by data (arXiv 1602.07868, section 3), in place.

    It goes with the norms: `swap_norm(model, "weightnorm", where="all")` comes first. Each linear layer that has a
    length g for each output gets those with which its outputs have variance 1 over the real tokens of `batch`, and the
    bias with which they have mean 0. The layers are taken in the order of the forward, each one behind those that have
    their lengths. An output that is constant in `batch` keeps its length.

    Without it, the outputs of the layers are as large as the stream that they read, and the stream grows with each
    layer by a factor.

    Args:
        model ([`~transformers.PreTrainedModel`]): a new model with `"weightnorm"` in the place of its norms. A
            pretrained one is refused, as it would lose its weights.
        batch (`dict`): what `model(**batch)` takes, some tens of examples of the training data.

    Returns:
        The same model.

    Raises:
        ValueError: when the model is pretrained or has no such layers. Nothing was changed then.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import initialize_weightnorm, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertModel(config), "weightnorm", where="all")
    >>> model = initialize_weightnorm(model, {"input_ids": torch.randint(9, (4, 6))})
    >>> model.encoder.layer[0].intermediate.dense.weight_gain.shape
    torch.Size([3072])

    ```
    """
    check_whole(model)
    layers = [module for module in model.modules() if isinstance(module, WeightNormalized)]
    if not layers:
        raise ValueError(
            f'This {type(model).__name__} has no weight normalisation: call swap_norm(model, "weightnorm") first.'
        )
    _refuse_pretrained(model, "initialize_weightnorm")

    seen = set()

    def scale(layer, args, output):
        if layer in seen:  # of a block that runs again, as in ALBERT
            return None
        seen.add(layer)
        moments = masked_moments(output.to(torch.promote_types(output.dtype, torch.float32)), current_mask(output))
        scale = moments.var.sqrt()
        scale = scale.where(scale > 0, 1)
        layer.weight_gain.div_(scale)
        if layer.bias is None:
            return (output / scale).to(output.dtype)
        layer.bias.copy_((layer.bias - moments.mean) / scale)
        return ((output - moments.mean) / scale).to(output.dtype)

    (batch,) = complete_batches(model, [dict(batch)])
    handles = [layer.register_forward_hook(scale) for layer in layers]
    try:
        with evaluating(model):
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return model


def _refuse_pretrained(model: PreTrainedModel, name: str) -> None:
    if model.name_or_path:
        raise ValueError(
            f"{name} is for a new model, and would erase weights of this pretrained one: build a new model from the "
            "configuration."
        )
