"""Regularized batch normalisation: BatchNorm whose batch statistics are held near the running ones."""

import torch

from .batchnorm import BatchNorm
from .discrepancy import DISTANCES, penalty
from .options import check_number
from .registry import register_norm


@register_norm("rbn", "regularized_batchnorm")
class RegularizedBatchNorm(BatchNorm):
    """Regularized batch normalisation (Wang, Wu and Huang, NeurIPS 2022, arXiv 2210.05153).

    Forward and backward are those of [`BatchNorm`]. To the loss belongs, per layer,
    `lambda_mean · d(μ_B, μ) + lambda_var · d(σ_B, σ)`: [`NormSwapTrainer`](hf_normswap.NormSwapTrainer) adds it; in a
    loop of your own, [`norm_penalty`](hf_normswap.norm_penalty). The running values are those from before the batch,
    and constants; the gradient reaches the network through the batch's.

    Args:
        num_features (`int`): number of channels.
        lambda_mean (`float`, *optional*, defaults to 8): weight of the means, for a loss that is a mean.
        lambda_var (`float`, *optional*, defaults to 8): weight of the standard deviations.
        distance (`str`, *optional*, defaults to `"relative"`):
            `"relative"`: in units of σ, mean over channels; `"paper"`: squared L2 of means and deviations;
            `"reference"`: squared L2 of means, L1 of variances, as the published code runs. The published λ belong to
            the last two and to a loss summed over about 4,000 tokens: divide them by that.
        eps, momentum, bias: as in [`BatchNorm`].
    """

    earlier_defaults = {"lambda_mean": 0.1, "lambda_var": 0.1}

    def __init__(
        self,
        num_features: int,
        *,
        lambda_mean: float = 8.0,
        lambda_var: float = 8.0,
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
        """The regularisation term of the last training forward, a scalar; it can be taken once.

        Raises:
            RuntimeError: when there was no training forward since the last call.
        """
        if not self.has_observed:
            raise RuntimeError(
                "There is no penalty to take: call this after each forward in training mode, before the next one."
            )
        moments, running, value = self._observed
        self.forget_statistics()
        return penalty(moments, *running.values(), *self.regularization) if value is None else value

    @property
    def regularization(self):
        return self.eps, self.distance, (self.lambda_mean, self.lambda_var)
