"""Regularized batch normalisation: BatchNorm whose batch statistics are held near the running ones."""

import itertools

import torch
from transformers.utils import logging

from .batchnorm import BatchNorm
from .discrepancy import DISTANCES, penalty
from .norm import KEPT_RECORDS, BatchRecord
from .options import check_number
from .registry import register_norm


logger = logging.get_logger(__name__)

KEPT_COMPILED_RECORDS = 4
NO_PENALTY = "There is no penalty to take: call this after a forward in training mode, and before its backward."


@register_norm("rbn", "regularized_batchnorm")
class RegularizedBatchNorm(BatchNorm):
    """Regularized batch normalisation (Wang, Wu and Huang, NeurIPS 2022, arXiv 2210.05153).

    Forward and backward are those of [`BatchNorm`]. To the loss belongs, per layer,
    `lambda_mean · d(μ_B, μ) + lambda_var · d(σ_B, σ)`: [`NormSwapTrainer`](hf_normswap.NormSwapTrainer) adds it; in a
    loop of your own, [`norm_penalty`](hf_normswap.norm_penalty). The running values are those from before the batch,
    and constants; the gradient reaches the network through the batch's.

    Args:
        num_features (`int`): number of channels.
        lambda_mean (`float`, *optional*, defaults to 0.1): weight of the means, for a loss that is a mean.
        lambda_var (`float`, *optional*, defaults to 0.1): weight of the standard deviations.
        distance (`str`, *optional*, defaults to `"relative"`):
            `"relative"`: in units of σ, mean over channels; `"paper"`: squared L2 of means and deviations;
            `"reference"`: squared L2 of means, L1 of variances, as the published code runs. The published λ belong to
            the last two and to a loss summed over about 4,000 tokens: divide them by that.
        eps, momentum, bias: as in [`BatchNorm`].
    """

    def __init__(
        self,
        num_features: int,
        *,
        lambda_mean: float = 0.1,
        lambda_var: float = 0.1,
        distance: str = "relative",
        **kwargs,
    ):
        super().__init__(num_features, **kwargs)
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {sorted(DISTANCES)}, not {distance!r}.")
        check_number("lambda_mean", lambda_mean)
        check_number("lambda_var", lambda_var)
        self.lambda_mean, self.lambda_var, self.distance = lambda_mean, lambda_var, distance

    def penalty(self) -> torch.Tensor:
        """The regularisation term of all training forwards since the last call, a scalar.

        Raises:
            RuntimeError: when there was none, or a backward has freed their graphs.
        """
        penalties = self.take_penalties()
        if not penalties:
            raise RuntimeError(NO_PENALTY)
        return penalties[0] if len(penalties) == 1 else torch.stack(penalties).sum()

    def take_penalties(self) -> list[torch.Tensor]:
        """The terms that [`RegularizedBatchNorm.penalty`] adds up, one for each training forward."""
        records = self.trainable_records()
        self.forget_statistics()
        if any(record.is_cut for record in records):
            logger.warning_once(
                f"A compiled RBN keeps the penalties of {KEPT_COMPILED_RECORDS} training forwards, and older ones are "
                f"lost: call norm_penalty(model) after at most {KEPT_COMPILED_RECORDS} forwards."
            )
        return [
            penalty(record.moments, *record.running.values(), *self.regularization)
            if record.penalty is None
            else record.penalty
            for record in records
        ]

    def trainable_records(self) -> tuple[BatchRecord, ...]:
        """The records without those whose graph a backward has freed; a penalty that is lost so brings a warning."""
        if torch.compiler.is_compiling():
            return self.records
        is_lost = [_is_freed(record) for record in self.records]
        if not any(is_lost):
            return self.records
        if not all(record.is_paused for record in itertools.compress(self.records, is_lost)):
            logger.warning_once(
                "RBN's penalty was left out of a backward, and RBN trains as BatchNorm without it: add "
                "norm_penalty(model) to the loss before each backward."
            )
        return tuple(record for record, lost in zip(self.records, is_lost, strict=True) if not lost)

    @property
    def owes_penalty(self) -> bool:
        """Whether a training forward has a penalty with a graph, and nobody has taken it."""
        return any(
            _node(record) is not None and not (record.is_paused and _is_freed(record)) for record in self.records
        )

    def _record(self, record: BatchRecord) -> None:
        if torch.compiler.is_compiling():
            # There it cannot be seen whose graph is freed, and each number of records is compiled anew.
            is_cut = len(self.records) == KEPT_COMPILED_RECORDS
            self.records = (*self.records[1 - KEPT_COMPILED_RECORDS :], record._replace(is_cut=is_cut))
            return
        self.records = (*self.trainable_records(), record)
        if len(self.records) > KEPT_RECORDS:
            self._bound_records()

    def _bound_records(self) -> None:
        idle = [index for index, record in enumerate(self.records) if _node(record) is None]
        if len(idle) > KEPT_RECORDS:
            self.records = self.records[: idle[0]] + self.records[idle[0] + 1 :]
        if len(self.records) - len(idle) > KEPT_RECORDS:
            logger.warning_once(
                f"RBN keeps the graphs of more than {KEPT_RECORDS} training forwards in memory, as their penalties "
                "were not taken: add norm_penalty(model) to the loss, or run what is not trained under "
                "torch.no_grad()."
            )

    @property
    def regularization(self):
        return self.eps, self.distance, (self.lambda_mean, self.lambda_var)


def _node(record: BatchRecord) -> torch.autograd.graph.Node | None:
    """Where a backward of the penalty starts, `None` for a forward without a graph."""
    return (record.moments.packed if record.penalty is None else record.penalty).grad_fn


def _is_freed(record: BatchRecord) -> bool:
    """Whether a backward has passed the node of the penalty and freed it, which autograd tells by an error alone."""
    try:
        getattr(_node(record), "_raw_saved_tensors", None)  # unpacks nothing: checkpointed blocks do not run again
    except RuntimeError:
        return True
    return False
