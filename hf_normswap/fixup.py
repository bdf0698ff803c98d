"""The initialisation of Fixup, for a new model without norms."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .core.model_state import check_whole, obstacle_of_linear
from .core.residual_stream import ResidualStream
from .modeling.fixup import Fixup
from .modeling.model_norms import swapped_norms


logger = logging.get_logger(__name__)


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
    if model.name_or_path:
        raise ValueError(
            "initialize_fixup is for a new model, and would erase weights of this pretrained one: build a new model "
            "from the configuration."
        )
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
