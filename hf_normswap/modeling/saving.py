"""A model of transformers whose norms are not its own class's is never saved as if it had LayerNorms.

A norm may stand in a model that does not know of it: put in by hand, in a part that was swapped by itself, or in a
part of a swapped model. transformers saves such a model as one of its own class, and it loads with LayerNorms.
"""

import functools
from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def guard_saving() -> None:
    """Let `PreTrainedModel.save_pretrained`, which has no hook of its own, call [`check_saving`] first."""
    save = PreTrainedModel.save_pretrained
    if getattr(save, "keeps_norms", False):  # the file may be imported twice: installed, and from the Hub
        return

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        check_saving(self)
        return save(self, *args, **kwargs)

    save_pretrained.keeps_norms = True
    PreTrainedModel.save_pretrained = save_pretrained


def check_saving(model: PreTrainedModel) -> None:
    """Make the configuration of a swapped model, or of its swapped parts, say what their modules are now.

    Raises:
        ValueError: when a folder of `model` would load with other norms than it has.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # it is the adapter that is saved
        return
    kind = type(model).__name__
    if is_swapped(model):
        model.update_record()
        if model.stock_class is not None:
            name = model.stock_class.__name__
            logger.warning(
                f"The code of {name} is not saved with its weights, and an Auto class would load another class: load "
                f"the folder with swapped_class({name}).from_pretrained(...)."
            )
        return
    if getattr(model.config, "norm_swap", None) is not None:
        raise ValueError(
            f"This {kind} has the configuration of a swapped model, and a folder of it would load with other norms: "
            "save the whole swapped model, or give the class a configuration of its own family."
        )
    parts = dict(_find_parts("", model))
    for name, part in parts.items():
        if is_swapped(part):
            part.update_record()
        if not is_swapped(part) or not any(config is part.config for config in _configs_of(model.config)):
            raise ValueError(
                f"{name} has a swapped norm that this {kind} does not know of, and a folder of it would load with "
                "LayerNorm: swap the whole model with swap_norm, and save that."
            )
    if parts:
        logger.warning(
            f"This {kind} is saved without the code of its swapped parts: load it after `import hf_normswap`, as "
            "trust_remote_code alone cannot."
        )


def is_swapped(model) -> bool:
    """Whether `model` is one of a class of swapped models, of this copy of the code or of another."""
    return hasattr(type(model), "update_record")


def _find_parts(prefix: str, module) -> Iterator[tuple]:
    """Names of the swapped models inside of `module`, and of the norms that stand in none of them."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if is_swapped(child) or hasattr(type(child), "norm_name"):
            yield name, child
        else:
            yield from _find_parts(f"{name}.", child)


def _configs_of(config) -> Iterator:
    """A configuration and those inside of it."""
    yield config
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            yield from _configs_of(inner)
