"""What folding leaves in a model: functions where norms were, and heads of their own weights and biases."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel


def pass_through(x: torch.Tensor) -> torch.Tensor:
    """`x` itself: stands where a norm was."""
    return x


def remove_norms(model: nn.Module, names: Iterable[str]) -> None:
    """Leave no module in the places `names`."""
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        delattr(parent, child)
        setattr(parent, child, pass_through)


def untie_head(model: PreTrainedModel, name: str) -> None:
    """Give the linear layer `name` a weight of its own, a copy of the embedding table that it shared."""
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    key = f"{name}.weight"
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        setattr(model, table, {target: source for target, source in getattr(model, table).items() if target != key})


def add_bias(linear: nn.Linear) -> None:
    """Give a linear layer that has none a bias of zeros."""
    zeros = linear.weight.new_zeros(linear.out_features)
    linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
