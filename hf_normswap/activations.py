"""What norms do to activations: their scale, and the condition of what the next linear layer reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batches import complete_batches, make_batches
from .modeling.ranks import sum_over_ranks
from .modeling.sites import find_norms, format_table
from .modeling.swapped import NormSwapMixin
from .modeling.token_mask import current_mask, unwatch_masks, watch_masks
from .surgery import refuse_training, refuse_wrapped
from .walk import run_model


@dataclass(frozen=True)
class ActivationProbe:
    """Inputs and outputs of one norm over real tokens.

    Attributes:
        name (`str`): path of the norm in the model.
        input_scale, output_scale (`float`): root mean square of what comes in, and of what goes out.
        condition (`float`): largest eigenvalue of the covariance of the outputs over the smallest, infinite where that
            is 0. The curvature of the loss in the weights of the next linear layer has it as a factor.
        tokens (`int`): over so many.
    """

    name: str
    input_scale: float
    output_scale: float
    condition: float
    tokens: int


class ActivationReport(list):
    """A list of [`ActivationProbe`], in the order of the modules, that prints as a table."""

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        cells = [
            (
                f"{probe.input_scale:.3g}",
                f"{probe.output_scale:.3g}",
                f"{probe.condition:.3g}",
                probe.tokens,
                probe.name,
            )
            for probe in self
        ]
        return [("scale in", "scale out", "condition", "tokens", "name"), *cells]

    def __str__(self):
        return format_table(self.rows())


@torch.no_grad()
def probe_activations(
    model: PreTrainedModel,
    data: Iterable,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
) -> ActivationReport:
    """Scale and condition of the activations around each norm, in evaluation, over the real tokens of `data`.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode, swapped or not.
        data, tokenizer, batch_size: as in [`measure_tid`].

    Returns:
        [`ActivationReport`]: an [`ActivationProbe`] for each norm that a batch reaches; print it for a table.

    Raises:
        ValueError: when the data is empty or has no real tokens, or the model is in training mode.
    """
    refuse_wrapped(model)
    refuse_training(model)
    sites = find_norms(model)
    batches = complete_batches(model, make_batches(model, data, tokenizer, batch_size))
    sums = {site.name: None for site in sites}

    def note(norm, args, output, name):
        mask = current_mask(args[0])
        x, y = (values.flatten(0, -2) if mask is None else values[mask] for values in (args[0], output))
        x, y = x.double(), y.double()
        squares = x.square().sum(0, keepdim=True)
        new = torch.cat([y.T @ y, y.sum(0, keepdim=True), squares, torch.full_like(squares, len(y))])
        sums[name] = new if sums[name] is None else sums[name] + new

    watch_masks(model)
    handles = [site.module.register_forward_hook(partial(note, name=site.name)) for site in sites]
    try:
        for batch in batches:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        if not isinstance(model, NormSwapMixin):
            unwatch_masks(model)
    return ActivationReport(_probe(name, values) for name, values in sums.items() if values is not None)


def _probe(name: str, sums: torch.Tensor) -> ActivationProbe:
    products, total, inputs, counts = sum_over_ranks(sums).split([sums.shape[1], 1, 1, 1])
    count = counts[0, 0]
    mean = total[0] / count
    eigenvalues = torch.linalg.eigvalsh(products / count - torch.outer(mean, mean))
    largest, smallest = eigenvalues[-1], eigenvalues[0]
    is_singular = smallest <= largest * len(eigenvalues) * torch.finfo(torch.float64).eps
    return ActivationProbe(
        name,
        input_scale=(inputs.mean() / count).sqrt().item(),
        output_scale=(products.diagonal().mean() / count).sqrt().item(),
        condition=float("inf") if is_singular else (largest / smallest).item(),
        tokens=int(count),
    )
