"""The progressive swap: LayerNorm gives way to the new norms during training instead of before it."""

import inspect
import math
import random

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from hf_normswap.core.data import make_batches, sample_batches
from hf_normswap.core.model_state import refuse_folded, refuse_offloaded, swapped_parts, unwrap
from hf_normswap.core.norm_sites import ASIDE, BLOCK_SUBLAYERS, STACKS, NormSite, find_norms
from hf_normswap.core.statistics import evaluating, statistic_norms
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.model_norms import refuse_other_copy
from hf_normswap.modeling.replace import layer_norm_shares, set_layer_norm_share


logger = logging.get_logger(__name__)

ORDERS = ("together", "forward", "backward")


class ProgressiveSwapCallback(TrainerCallback):
    """Lets LayerNorm give way to the swapped norms in the course of training.

    A swapped norm computes `λ · LayerNorm(x) + (1 − λ) · norm(x)`, with one gain and shift for both, and λ falls
    linearly from 1, the model from before the swap, to 0 (as in SLAB, Guo et al., 2024, arXiv 2405.11582). After the
    last step the running statistics are estimated afresh, with frozen weights.

    λ follows from the step alone: a resumed run goes on as the one that was interrupted. Checkpoints from before λ = 0
    load as the mixture that they are, and so does a model whose training was stopped before that. Evaluate and save
    after `train()`: only then are the statistics those of the final weights. [`NormSwapTrainer`] logs the mean λ of
    the norms, as `layer_norm_share`.

    The model may be a module around several swapped models, such as two towers or an encoder-decoder pair: λ falls in
    all of them. Its `forward` has to take the batches of the training, which it is called with at the end.

    Args:
        ratio (`float`, *optional*, defaults to 0.8): share of the run in which λ falls, above 0 and at most 1.
        order (`str`, *optional*, defaults to `"together"`):
            `"together"`: one λ for all norms; `"forward"`, `"backward"`: one norm after the other from the first or
            from the last of the model, each in an equal part of the time. Several swapped models have their turns in
            the order in which they stand in the module around them.
        statistics_batches (`int`, *optional*, defaults to 64):
            training batches, on each process, for the statistics at the end. They are chosen at random.

    Raises:
        ValueError: when an argument is out of range; on the start of training, when the model has no swapped norms,
            they were calibrated or folded, it has an adapter, is offloaded, its `forward` cannot read the batches, or
            `load_best_model_at_end` is set.

    Example:

    ```python
    >>> from hf_normswap import ProgressiveSwapCallback
    >>> callback = ProgressiveSwapCallback(ratio=0.5, order="forward")
    >>> callback.shares(step=15, max_steps=100, norms=3)  # three tenths of the way
    [0.1, 1.0, 1.0]

    ```
    """

    def __init__(self, ratio: float = 0.8, order: str = "together", statistics_batches: int = 64):
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio is a share of the run, above 0 and at most 1, and cannot be {ratio}.")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}.")
        if statistics_batches < 1:
            raise ValueError(
                f"The statistics at the end need batches: statistics_batches cannot be {statistics_batches}."
            )
        self.ratio, self.order, self.statistics_batches = ratio, order, statistics_batches

    def shares(self, step: int, max_steps: int, norms: int) -> list[float]:
        """λ of each norm, in the order of the forward, after `step` optimizer steps of `max_steps`."""
        progress = step / (self.ratio * max_steps)
        turns = [0] * norms if self.order == "together" else range(norms)
        speed = 1 if self.order == "together" else norms
        # Rounded: a last 1e-17 of LayerNorm would cost as much as half of it.
        shares = [round(min(max(1 + turn - speed * progress, 0.0), 1.0), 6) for turn in turns]
        return shares[::-1] if self.order == "backward" else shares

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would end with weights that were trained with another share of LayerNorm: "
                "turn it off."
            )
        if any(hasattr(module, "peft_config") for module in model.modules()):
            raise ValueError("An adapter does not save the share of LayerNorm: leave out one of the two.")
        refuse_other_copy(model)
        refuse_offloaded(model)
        parts = swapped_parts(model).values()
        for part in parts:
            refuse_folded(part)
            if "calibration" in (part.config.norm_swap or {}):
                raise ValueError(
                    "Calibration has fitted gains and shifts to the new norms, and LayerNorm cannot use them: leave "
                    "out one of the two."
                )
        if not any(map(_swapped_sites, parts)):
            raise ValueError(f"This {type(model).__name__} has no swapped norms: call swap_norm(model, ...) first.")
        if statistic_norms(model):
            _check_batches(unwrap(model), train_dataloader)
        self._set_shares(model, state)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._set_shares(model, state)

    def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._set_shares(model, state)
        if mean_layer_norm_share(model):
            logger.warning(
                f"Training stopped at step {state.global_step} of {state.max_steps}, before LayerNorm had given way: "
                "the model stays a mixture of old norms and new."
            )
        elif statistic_norms(model):
            from hf_normswap.conversion.calibrate import reestimate_statistics

            with evaluating(model):
                reestimate_statistics(model, sample_batches(train_dataloader, self.statistics_batches))

    def _set_shares(self, model, state) -> None:
        sites = {part: _swapped_sites(part) for part in swapped_parts(model).values()}
        shares = iter(self.shares(state.global_step, state.max_steps, sum(map(len, sites.values()))))
        for part, of_part in sites.items():
            if of_part:
                set_layer_norm_share(part, {site.path: next(shares) for site in of_part})


def mean_layer_norm_share(model: nn.Module) -> float:
    """Mean λ of the swapped norms of `model`, which may be wrapped, or a module around several swapped models."""
    parts = swapped_parts(model).values()
    shares = [share for part in parts for share in layer_norm_shares(part).values()]
    return sum(shares) / sum(len(_swapped_sites(part)) for part in parts)


def _swapped_sites(model: nn.Module) -> list[NormSite]:
    """The swapped norms in the order of the forward."""
    return sorted((site for site in find_norms(model) if isinstance(site.module, Norm)), key=_turn)


# Norms of queries and keys run inside of the attention; `other` ones stand anywhere in a block.
_SUBLAYERS = (BLOCK_SUBLAYERS[0], *ASIDE, *BLOCK_SUBLAYERS[1:])


def _turn(site: NormSite) -> tuple:
    if site.layer is None:
        return STACKS.index(site.stack), -1 if site.sublayer == "embedding" else math.inf, 0
    # Cross-attention stands last in the blocks of GPT-2, and runs second.
    return STACKS.index(site.stack), site.layer, _SUBLAYERS.index(site.sublayer)


def _check_batches(model: nn.Module, dataloader) -> None:
    """Raises `ValueError` where `model` cannot be called with what `dataloader` yields, as it is after the last step.

    Known from one example, where the data set gives it by its index, without a change of any random state.
    """
    dataset, collate = getattr(dataloader, "dataset", None), getattr(dataloader, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            batch = collate([dataset[0]])
    except Exception:  # one example alone may be too few, or for the training to complain of
        return
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    try:
        (inputs,) = make_batches(model, [batch])
        inspect.signature(model.forward).bind(**inputs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "After the last step the model is called with batches of the training, to estimate its statistics, and "
            f"its forward cannot read them ({str(error).rstrip('.')}): train a module whose forward does."
        ) from error
