"""Activation checkpointing runs a block a second time inside backward.

The second run must see the padding masks and the running statistics of the first, and must not update anything. The
first run records them, and the second replays the record.
"""

import functools
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .padding_mask import SCOPE


# What transformers calls it: 5.17 still by the older name.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def checkpoint_norms(function: Callable, refuse_compile: bool = True) -> Callable:
    """Wrap an activation checkpoint function (`torch.utils.checkpoint.checkpoint` or a partial of it).

    Exact with `use_reentrant` true and false, on the autograd threads of a GPU too. Pass it to what does its own
    checkpointing; `model.activation_checkpointing_enable()` of a swapped model does so by itself.

    Raises:
        RuntimeError: on a call inside `torch.compile(fullgraph=True)`, which cannot keep the two runs apart; where
            the graph may break, it does so here, and the result is exact.
    """

    @functools.wraps(function)
    def checkpoint(block, *args, **kwargs):
        if torch.compiler.is_compiling():
            if refuse_compile:
                raise RuntimeError(
                    "Batch statistics cannot be kept under torch.compile together with activation checkpointing: "
                    "turn one of the two off."
                )
            return function(block, *args, **kwargs)
        # Inside of another checkpointed block, as the blocks of a stage of Swin are, the record is a part of its.
        recorded, is_first = replay_or_record(list) if SCOPE.recompute is not None else ([], True)
        masks = list(SCOPE.masks)

        def run(*args, **kwargs):
            nonlocal is_first
            outer = SCOPE.masks, SCOPE.recompute
            SCOPE.masks = list(masks)
            SCOPE.recompute = ("record", recorded) if is_first else ("replay", list(recorded))
            is_first = False
            try:
                return block(*args, **kwargs)
            finally:
                SCOPE.masks, SCOPE.recompute = outer

        return function(run, *args, **kwargs)

    checkpoint.records_norms = True
    return checkpoint


def may_run_again() -> bool:
    """Whether what this forward reads has to go through [`replay_or_record`], and through operators of a graph."""
    return torch.compiler.is_compiling() or SCOPE.recompute is not None or torch._C._current_graph_task_id() != -1


def replay_or_record(make: Callable):
    """What `make()` returned in the first run of this block, and whether this is the first run.

    Raises:
        RuntimeError: in a second run whose first run was not recorded.
    """
    if SCOPE.recompute is None:
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "A norm is being recomputed inside backward without a record of its first run: enable checkpointing "
                f"with model.{CHECKPOINTING}_enable() (TrainingArguments({CHECKPOINTING}=True)) on the swapped model, "
                "not through FSDP or checkpoint_wrapper."
            )
        return make(), True
    mode, items = SCOPE.recompute
    if mode == "replay":
        return items.pop(0), False
    value = make()
    items.append(value)
    return value, True


if not hasattr(torch.ops.hf_normswap, "snapshot"):  # the file may be imported twice: installed, and from the Hub

    @torch.library.custom_op("hf_normswap::snapshot", mutates_args=())
    def _snapshot(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @_snapshot.register_fake
    def _(x):
        return torch.empty_like(x)


def snapshot(buffer: torch.Tensor) -> torch.Tensor:
    """A copy of `buffer` as it is now.

    In a compiled graph an ordinary clone of a buffer that is updated later in the same graph may be recomputed in the
    backward, from the updated values (pytorch#197039): an opaque operator is never recomputed.
    """
    return torch.ops.hf_normswap.snapshot(buffer) if torch.compiler.is_compiling() else buffer.clone()
