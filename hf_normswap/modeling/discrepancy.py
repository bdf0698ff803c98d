"""How far a batch's statistics are from the running ones: the RBN penalty and the TID, as pure functions.

Distances take a [`Statistics`] whose fields have shape `(..., C)` and return values of shape `(...)`.
Deviations are σ = √(variance + ε) throughout: the bare root has an infinite gradient at a constant channel.
"""

from typing import NamedTuple

import torch

from .moments import Moments


class Statistics(NamedTuple):
    """A batch's statistics beside the running ones from before that batch.

    For norms on the second moment ψ² (PowerNorm, PN-V) the means are `None` and the variances are ψ².
    """

    batch_mean: torch.Tensor | None
    batch_var: torch.Tensor
    running_mean: torch.Tensor | None
    running_var: torch.Tensor


def sigma_l2_distance(statistics: Statistics, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared L2 distance of the means and of the standard deviations (Wang et al. 2022, section 4)."""
    batch_mean, batch_var, mean, var = statistics
    sigma_gap = (batch_var + eps).sqrt() - (var + eps).sqrt()
    return (batch_mean - mean).square().sum(-1), sigma_gap.square().sum(-1)


def var_l1_distance(statistics: Statistics, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared L2 of the means, L1 of the variances: what the published commands of the RBN code run."""
    batch_mean, batch_var, mean, var = statistics
    return (batch_mean - mean).square().sum(-1), (batch_var - var).abs().sum(-1)


def relative_distance(statistics: Statistics, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared discrepancy in units of the running σ, averaged over channels: free of scale and width."""
    batch_mean, batch_var, mean, var = statistics
    sigma = (var + eps).sqrt()
    ratio = (batch_var + eps).sqrt() / sigma
    return ((batch_mean - mean) / sigma).square().mean(-1), (ratio - 1).square().mean(-1)


DISTANCES = {"relative": relative_distance, "sigma_l2": sigma_l2_distance, "var_l1": var_l1_distance}


def compare_moments(moments: Moments, mean: torch.Tensor, var: torch.Tensor) -> Statistics:
    """A batch's mean and variance beside the running ones, and equal to these where the batch has no tokens."""
    pairs = (moments.mean, mean), (moments.var, var)
    return Statistics(*(torch.where(moments.count > 0, value, old) for value, old in pairs), mean, var)


def penalty(moments: Moments, mean, var, eps: float, distance: str, weights: tuple[float, float]) -> torch.Tensor:
    """`λ_μ d(μ_B, μ) + λ_σ d(σ_B, σ)` of a batch's moments; `mean`, `var`: the running pair, `weights`: both λ."""
    of_mean, of_var = DISTANCES[distance](compare_moments(moments, mean, var), eps)
    return weights[0] * of_mean + weights[1] * of_var


def penalty_with_grad(
    moments: Moments, mean, var, eps: float, distance: str, weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """The [`penalty`], and its gradient with respect to `moments.packed` (the count is a constant), in closed form."""
    of_mean, of_var = 2 * weights[0] * (moments.mean - mean), moments.var
    if distance == "var_l1":
        of_var = weights[1] * (of_var - var).sign()
    else:
        of_var = weights[1] * (1 - ((var + eps) / (of_var + eps)).sqrt())
    if distance == "relative":
        of_mean, of_var = (value / (len(var) * (var + eps)) for value in (of_mean, of_var))
    gradient = Moments.of(torch.zeros_like(moments.count), of_mean, of_var / moments.count.clamp(min=1)).packed
    return penalty(moments, mean, var, eps, distance, weights), torch.where(moments.count > 0, gradient, 0)


def differentiate_penalty(moments: Moments, *options) -> torch.Tensor:
    """The gradient that [`penalty_with_grad`] returns, in operations that can be differentiated again."""
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(penalty(moments, *options), moments.packed, create_graph=True)
    return gradient


def training_inference_discrepancy(statistics: Statistics, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """TID of one batch (Wang et al. 2022, section 3): `‖μ_B − μ‖₂ / ‖σ‖₂` and `‖σ_B − σ‖₂ / ‖σ‖₂`.

    Returns:
        The mean TID and the variance TID. A norm on the second moment has no mean TID (0 is returned); its other
        value is `‖ψ_B − ψ‖₂ / ‖ψ‖₂`.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap.modeling.discrepancy import Statistics, training_inference_discrepancy
    >>> running = torch.zeros(2), torch.ones(2)
    >>> batch = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 1.0])
    >>> mean, variance = training_inference_discrepancy(Statistics(*batch, *running), eps=0.0)
    >>> f"{mean:.3f} {variance:.3f}"  # 5 / √2 and 1 / √2
    '3.536 0.707'

    ```
    """
    batch_mean, batch_var, mean, var = statistics
    sigma = (var + eps).sqrt()
    scale = torch.linalg.vector_norm(sigma, dim=-1)
    variance_tid = torch.linalg.vector_norm((batch_var + eps).sqrt() - sigma, dim=-1) / scale
    if mean is None:
        return torch.zeros_like(variance_tid), variance_tid
    return torch.linalg.vector_norm(batch_mean - mean, dim=-1) / scale, variance_tid
