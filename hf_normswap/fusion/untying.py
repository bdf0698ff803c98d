"""A head with weights of its own, where the configuration can say so: a saved model loads as it is."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_normswap.core.model_state import share_config


def obstacle_of_untying(model: PreTrainedModel, head: str) -> str | None:
    """Why `tie_word_embeddings=False` in the configuration would not give the linear layer `head` its own weights."""
    try:
        built = _build_untied(model)
    except TypeError:
        return f"a {type(model).__name__} is not made from its configuration alone"
    names = next((names for names in _names_of_parameters(built) if f"{head}.weight" in names), ())
    return (
        None if len(names) == 1 else f"{head} of every {type(model).__name__} shares its weights with the embeddings"
    )


def untie(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings=False`, and copy each weight that a model of this configuration has apart from others.

    In an encoder-decoder that is more than the head: encoder and decoder get embedding tables of their own.
    """
    built = _build_untied(model)
    parts = {name: names[0] for names in _names_of_parameters(built) for name in names}
    for names in _names_of_parameters(model):
        old = model.get_parameter(names[0])
        shared = {parts.get(names[0]): old}
        for name in names:
            owner, _, key = name.rpartition(".")
            part = parts.get(name, parts.get(names[0]))
            if part not in shared:
                shared[part] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            model.get_submodule(owner)._parameters[key] = shared[part]
    for name, module in built.named_modules():
        if isinstance(module, PreTrainedModel):
            model.get_submodule(name).all_tied_weights_keys = dict(module.all_tied_weights_keys)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    share_config(model, config)


def _build_untied(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same configuration, but for `tie_word_embeddings`, on the meta device."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
        return type(model)(config)


def _names_of_parameters(model: nn.Module) -> list[list[str]]:
    """All names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
