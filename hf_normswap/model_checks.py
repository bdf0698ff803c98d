"""Checks of a model, made before anything of it is changed or read."""

from torch import nn
from transformers import PreTrainedModel


def refuse_training(model) -> None:
    """Raises `ValueError` for a model that is in training mode, wholly or in part."""
    if any(module.training for module in model.modules()):
        raise ValueError("The model is in training mode: call model.eval() first.")


def refuse_folded(model) -> None:
    """Raises `ValueError` for a model whose norms are folded away."""
    if "folded" in (getattr(model.config, "norm_swap", None) or {}):
        raise ValueError("The norms of this model are folded away: load it from before that.")


def refuse_wrapped(model) -> None:
    """Raises `ValueError` for what is no bare model of transformers."""
    if not isinstance(model, PreTrainedModel):
        if isinstance(getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
            raise ValueError(
                f"The model is wrapped in {type(model).__name__}: swap or restore its norms before wrapping or "
                "compiling it."
            )
        raise ValueError(f"Norms are those of a model of transformers, not of a {type(model).__name__}: pass one.")
    if type(model).__name__.startswith("FSDP"):
        raise ValueError("The model is sharded by FSDP: swap or restore its norms before sharding it.")
