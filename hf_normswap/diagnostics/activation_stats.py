"""What norms do to activations: their scale, and the condition of what the next linear layer reads."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_normswap.core.data import complete_batches, make_batches
from hf_normswap.core.model_state import check_whole, refuse_training, run_model, unwrap
from hf_normswap.core.norm_sites import find_norms, format_table
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.model_norms import norm_width
from hf_normswap.modeling.moments import sum_over_ranks
from hf_normswap.modeling.padding_mask import current_mask, unwatch_masks, watch_masks


@dataclass(frozen=True)
class ActivationProbe:
    """Inputs and outputs of one norm over real tokens.

    Attributes:
        name (`str`): path of the norm in the model.
        input_scale, output_scale (`float`): root mean square of what comes in, and of what goes out.
        condition (`float`): largest eigenvalue of the covariance of the outputs over the smallest that is not 0, as
            one always is behind LayerNorm; NaN where there are no more tokens than channels. The curvature of the loss
            in the weights of the next linear layer has it as a factor.
        tokens (`int`): how many tokens were seen.
    """

    name: str
    input_scale: float
    output_scale: float
    condition: float
    tokens: int


class ActivationReport(list[ActivationProbe]):
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
        model ([`~transformers.PreTrainedModel`]): in evaluation mode, swapped or not, wrapped as in [`measure_tid`].
        data, tokenizer, batch_size: as in [`measure_tid`].

    Returns:
        [`ActivationReport`]: an [`ActivationProbe`] for each norm that a batch reaches; print it for a table.

    Raises:
        ValueError: when the data is empty or has no real tokens, or the model is in training mode or offloaded.
    """
    model = unwrap(model)
    check_whole(model)
    refuse_training(model)
    sites = find_norms(model)
    batches = complete_batches(model, make_batches(model, data, tokenizer, batch_size))
    sums = {}
    for site in sites:
        width = norm_width(site.module)
        sums[site.name] = torch.zeros(width + 3, width, dtype=torch.float64, device=model.device)

    def note(norm, args, output, name):
        mask = current_mask(args[0])
        x, y = (values.flatten(0, -2) if mask is None else values[mask] for values in (args[0], output))
        x, y = x.double(), y.double()
        squares = x.square().sum(0, keepdim=True)
        sums[name] += torch.cat([y.T @ y, y.sum(0, keepdim=True), squares, torch.full_like(squares, len(y))])

    is_watched = any(isinstance(site.module, Norm) for site in sites)
    watch_masks(model)
    handles = [site.module.register_forward_hook(partial(note, name=site.name)) for site in sites]
    try:
        for batch in batches:
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        if not is_watched:
            unwatch_masks(model)
    sums = {name: sum_over_ranks(values) for name, values in sums.items()}
    return ActivationReport(_probe(name, values) for name, values in sums.items() if values[-1, 0])


def _probe(name: str, sums: torch.Tensor) -> ActivationProbe:
    width = sums.shape[1]
    products, total, inputs, counts = sums.split([width, 1, 1, 1])
    count = counts[0, 0]
    mean = total[0] / count
    eigenvalues = torch.linalg.eigvalsh(products / count - torch.outer(mean, mean))
    nonzero = eigenvalues[eigenvalues > eigenvalues[-1] * width * torch.finfo(torch.float64).eps]
    return ActivationProbe(
        name,
        input_scale=(inputs.mean() / count).sqrt().item(),
        output_scale=(products.diagonal().mean() / count).sqrt().item(),
        condition=(nonzero[-1] / nonzero[0]).item() if count > width and len(nonzero) else float("nan"),
        tokens=int(count),
    )
