"""Regularized batch normalisation: BatchNorm whose batch statistics are held near the running ones."""

from typing import NamedTuple

import torch
from transformers.utils import logging

from .batchnorm import BatchNorm
from .discrepancy import DISTANCES, penalty
from .moments import Moments
from .registry import check_number, register_norm


logger = logging.get_logger(__name__)

KEPT_PENALTIES = 16  # of forwards without a graph; more of them with a graph bring a warning
KEPT_COMPILED_PENALTIES = 4
# λ of each distance. On TREC, from scratch in both placements, 7.5 has the lowest or nearly the lowest validation loss
# of 0.1, 1, 7.5, 40 and 200; at 40 and 200 pre-norm models lose accuracy (results/penalty).
DEFAULT_WEIGHTS = {"relative": 7.5, "sigma_l2": 0.015, "var_l1": 0.015}
EARLIER_NAMES = {"paper": "sigma_l2", "reference": "var_l1"}  # of distances, in folders of before
NO_PENALTY = "There is no penalty to take: call this after a forward in training mode, and before its backward."


class PendingPenalty(NamedTuple):
    """The penalty of a training forward that is in no loss yet.

    Attributes:
        moments ([`Moments`]): of the batch, with their graph in a compiled one.
        running (`dict` of `str` to `torch.Tensor`): the running values from before the batch.
        value (`torch.Tensor`, *optional*): a scalar; `None` in a compiled graph, where it is made of the moments.
        is_paused (`bool`): whether statistics were paused, so that nobody need take the penalty.
        is_cut (`bool`): whether an older penalty was dropped to make room for this one.
    """

    moments: Moments
    running: dict[str, torch.Tensor]
    value: torch.Tensor | None
    is_paused: bool
    is_cut: bool = False

    @property
    def node(self) -> torch.autograd.graph.Node | None:
        """Where a backward of the penalty starts, `None` for a forward without a graph."""
        return (self.moments.packed if self.value is None else self.value).grad_fn

    @property
    def is_freed(self) -> bool:
        """Whether a backward has passed the node and freed it, which autograd tells by an error alone."""
        try:
            getattr(self.node, "_raw_saved_tensors", None)  # unpacks nothing: checkpointed blocks do not run again
        except RuntimeError:
            return True
        return False


@register_norm("rbn", "regularized_batchnorm")
class RegularizedBatchNorm(BatchNorm):
    """Regularized batch normalisation (Wang, Wu and Huang, NeurIPS 2022, arXiv 2210.05153).

    Forward and backward are those of [`BatchNorm`]. To the loss belongs, for each layer and training forward,
    `lambda_mean · d(μ_B, μ) + lambda_var · d(σ_B, σ)`: [`NormSwapTrainer`](hf_normswap.NormSwapTrainer) adds it; in a
    loop of your own, [`norm_penalty`](hf_normswap.norm_penalty). The running values are those from before the batch,
    and constants; the gradient reaches the network through the batch's.

    Args:
        num_features (`int`): number of channels.
        lambda_mean (`float`, *optional*): weight of the means, for a loss that is a mean. By default that of the paper
            for post-norm models, 60 for a loss summed over about 4,000 tokens: 0.015 where the distance is a sum over
            channels, 7.5 where it is the mean over the 512 channels of its models.
        lambda_var (`float`, *optional*): weight of the standard deviations; by default as `lambda_mean`.
        distance (`str`, *optional*, defaults to `"relative"`):
            `"relative"`: in units of σ, mean over channels; `"sigma_l2"`: squared L2 of means and deviations;
            `"var_l1"`: squared L2 of means, L1 of variances, as the published code runs.
        eps, momentum, bias, center_tokens: as in [`BatchNorm`].
    """

    # The weights are always recorded, so that folders stay what they are when these defaults change.
    earlier_defaults = {"lambda_mean": 0.1, "lambda_var": 0.1}

    def __init__(
        self,
        num_features: int,
        *,
        lambda_mean: float | None = None,
        lambda_var: float | None = None,
        distance: str = "relative",
        **kwargs,
    ):
        super().__init__(num_features, **kwargs)
        distance = EARLIER_NAMES.get(distance, distance)
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {sorted(DISTANCES)}, not {distance!r}.")
        default = DEFAULT_WEIGHTS[distance]
        lambda_mean = default if lambda_mean is None else lambda_mean
        lambda_var = default if lambda_var is None else lambda_var
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
        pending = self._without_freed()
        self.penalties = ()
        if any(term.is_cut for term in pending):
            logger.warning_once(
                f"A compiled RBN keeps the penalties of {KEPT_COMPILED_PENALTIES} training forwards, and older ones "
                f"are lost: call norm_penalty(model) after at most {KEPT_COMPILED_PENALTIES} forwards."
            )
        return [
            penalty(term.moments, *term.running.values(), *self.regularization) if term.value is None else term.value
            for term in pending
        ]

    @property
    def owes_penalty(self) -> bool:
        """Whether the gradient lacks the penalty of a training forward."""
        with_graph = [term for term in self.penalties if term.node is not None]
        return any(not term.is_paused or not term.is_freed for term in with_graph)

    def keep_penalty(self, moments: Moments, running: dict[str, torch.Tensor], value: torch.Tensor | None) -> None:
        """Keep what the penalty of a training forward is made of until it is taken."""
        is_compiling = torch.compiler.is_compiling()
        is_cut = is_compiling and len(self.penalties) == KEPT_COMPILED_PENALTIES
        new = PendingPenalty(moments, running, value, self.paused, is_cut)
        if is_compiling:
            # There it cannot be seen whose graph is freed, and each number of penalties is compiled anew.
            self.penalties = (*self.penalties[1 - KEPT_COMPILED_PENALTIES :], new)
            return
        self.penalties = (*self._without_freed(), new)
        if len(self.penalties) > KEPT_PENALTIES:
            self._bound_penalties()

    def _without_freed(self) -> tuple[PendingPenalty, ...]:
        if torch.compiler.is_compiling():
            return self.penalties
        freed = [term for term in self.penalties if term.is_freed]
        if not freed:
            return self.penalties
        if not all(term.is_paused for term in freed):
            logger.warning_once(
                "RBN's penalty was left out of a backward, and RBN trains as BatchNorm without it: add "
                "norm_penalty(model) to the loss before each backward."
            )
        return tuple(term for term in self.penalties if not term.is_freed)

    def _bound_penalties(self) -> None:
        constant = [index for index, term in enumerate(self.penalties) if term.node is None]
        if len(constant) > KEPT_PENALTIES:
            self.penalties = self.penalties[: constant[0]] + self.penalties[constant[0] + 1 :]
        if len(self.penalties) - len(constant) > KEPT_PENALTIES:
            logger.warning_once(
                f"RBN keeps the graphs of more than {KEPT_PENALTIES} training forwards in memory, as their penalties "
                "were not taken: add norm_penalty(model) to the loss, or run what is not trained under "
                "torch.no_grad()."
            )

    @property
    def regularization(self):
        return self.eps, self.distance, (self.lambda_mean, self.lambda_var)
