"""Gradients of every layer at a point of training."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_normswap.core.model_state import check_whole, run_model, unwrap
from hf_normswap.core.norm_sites import find_norms, format_table
from hf_normswap.core.residual_stream import ResidualStream
from hf_normswap.core.statistics import evaluating, norm_penalty, observing, statistic_norms


@dataclass(frozen=True)
class GradientNorm:
    """The L2 norm of the gradient of a group of parameters.

    Attributes:
        stack (`str`, *optional*): `"encoder"` or `"decoder"`; `None` outside the blocks.
        layer (`int`, *optional*): index of the block; `None` outside the blocks.
        group (`str`): `"attention"`, `"cross_attention"`, `"ffn"`, `"norm"`, `"embedding"` or `"head"`.
        value (`float`): `‖∇‖₂` over all parameters of the group.
        parameters (`int`): how many numbers they are.
    """

    stack: str | None
    layer: int | None
    group: str
    value: float
    parameters: int


class GradientReport(list[GradientNorm]):
    """A list of [`GradientNorm`] that prints as a table."""

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        cells = [(item.stack, item.layer, item.group, f"{item.value:.4g}", item.parameters) for item in self]
        return [("stack", "layer", "group", "gradient", "parameters"), *cells]

    def __str__(self):
        return format_table(self.rows())


def gradient_norms(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> GradientReport:
    """Norms of the gradient of the loss on `batch`, block by block and sublayer by sublayer.

    The loss is that of training, with the penalty of RBN, without dropout: norms use the statistics of the batch. The
    model is as before then, with its gradients and buffers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            with a head that returns a loss, swapped or not, wrapped as in [`measure_tid`].
        batch (`dict`): inputs of the model, with labels.

    Returns:
        [`GradientReport`]: print it for a table.

    Raises:
        ValueError: when the model returns no loss for the batch, or is offloaded.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import gradient_norms
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> batch = {"input_ids": torch.randint(9, (4, 6)), "labels": torch.tensor([0, 1, 1, 0])}
    >>> report = gradient_norms(BertForSequenceClassification(config), batch)
    >>> [(item.layer, item.group) for item in report]
    [(None, 'embedding'), (None, 'norm'), (0, 'attention'), (0, 'norm'), (0, 'ffn'), (None, 'head')]

    ```
    """
    model = unwrap(model)
    check_whole(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, raw_gradients(model, batch, list(named.values())), strict=True))
    groups = _groups(model)
    squares: dict[tuple, list] = {}
    for name, gradient in gradients.items():
        if gradient is not None:
            entry = squares.setdefault(groups[name], [0.0, 0])
            entry[0] += gradient.double().square().sum()
            entry[1] += gradient.numel()
    return GradientReport(GradientNorm(*group, math.sqrt(square), count) for group, (square, count) in squares.items())


def raw_gradients(model, batch: dict, parameters: list) -> tuple:
    """The gradients of `parameters`, without dropout and with norms as in training; the model stays as it was."""
    with evaluating(model), observing(statistic_norms(model)), torch.enable_grad():
        loss = getattr(run_model(model, batch), "loss", None)
        if loss is None:
            raise ValueError("The model returns no loss for this batch: pass a model with a head, and labels.")
        return torch.autograd.grad(loss + norm_penalty(model), parameters, allow_unused=True)


def _groups(model) -> dict[str, tuple]:
    """`(stack, layer, group)` of every parameter by its name."""
    groups = {}
    sites = find_norms(model)
    owners = ResidualStream(model).sites_of_linears(sites)
    linears = {name: (site.stack, site.layer, site.sublayer) for name, site in owners.items()}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            site = next((site for site in sites if site.name == module_name), None)
            if site is not None:
                group = (site.stack if site.block else None), site.layer, "norm"
            elif isinstance(module, nn.Embedding):
                group = None, None, "embedding"
            else:
                group = linears.get(module_name, (None, None, "head"))
            groups[f"{module_name}.{name}".lstrip(".")] = group
    return groups
