"""The training-inference discrepancy (TID) of every norm of a model, after training and over it."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_normswap.core.data import complete_batches, make_batches
from hf_normswap.core.model_state import check_whole, run_model, unwrap
from hf_normswap.core.norm_sites import find_norms, format_table
from hf_normswap.core.statistics import evaluating, observing, sum_discrepancies
from hf_normswap.modeling.base import BatchStatisticNorm
from hf_normswap.modeling.moments import sum_over_ranks


@dataclass(frozen=True)
class LayerTid:
    """The TID of one norm (Wang, Wu and Huang, 2022, section 3), averaged over batches.

    Attributes:
        name (`str`): path of the norm in the model.
        mean (`float`, *optional*): `E ‖μ_B − μ‖₂ / ‖σ‖₂`; `None` for PN-V and PowerNorm, which have no mean.
        variance (`float`): `E ‖σ_B − σ‖₂ / ‖σ‖₂`; of PN-V and PowerNorm `E ‖ψ_B − ψ‖₂ / ‖ψ‖₂`.
        batches (`int`): how many batches were seen.
    """

    name: str
    mean: float | None
    variance: float
    batches: int


class TidReport(list[LayerTid]):
    """A list of [`LayerTid`], in the order of the modules, that prints as a table."""

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        cells = [(None if tid.mean is None else f"{tid.mean:.4f}", f"{tid.variance:.4f}", tid.name) for tid in self]
        return [("TID of mean", "TID of variance", "name"), *cells]

    def __str__(self):
        return format_table(self.rows())


@torch.no_grad()
def measure_tid(
    model: PreTrainedModel,
    data: Iterable,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
) -> TidReport:
    """How far the statistics of batches are from the running ones, norm by norm.

    Each batch passes through the model as in training, where norms normalise with the statistics of the batch, but
    without dropout. Only real tokens count. The model is as before then, with its buffers. In several processes each
    measures its share of the batches, and all get the mean over all of them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            swapped to norms with running statistics. It may be in DistributedDataParallel, `torch.compile` or
            [`~torch.optim.swa_utils.AveragedModel`]; names are those in the model inside.
        data: texts, a data set or batches, as [`make_batches`] takes them.
        tokenizer (*optional*): for texts, and to pad a data set.
        batch_size (`int`, *optional*, defaults to 32): rows of a batch, where `data` is not in batches. Small batches
            have a larger TID: take that of the training.

    Returns:
        [`TidReport`]: a [`LayerTid`] for each norm that a batch reaches; print it for a table.

    Raises:
        ValueError: when the data is empty or has no real tokens, no norm has running statistics, or the model is
            offloaded.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import measure_tid, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertModel(config), "batchnorm")
    >>> report = measure_tid(model, [{"input_ids": torch.randint(9, (4, 6))}])
    >>> [tid.name for tid in report]
    ['encoder.layer.0.attention.output.LayerNorm', 'encoder.layer.0.output.LayerNorm']

    ```
    """
    model = unwrap(model)
    check_whole(model)
    norms = {site.name: site.module for site in find_norms(model) if isinstance(site.module, BatchStatisticNorm)}
    if not norms:
        raise ValueError(f"No norm of this {type(model).__name__} has running statistics: there is no discrepancy.")
    with evaluating(model):
        batches = complete_batches(model, make_batches(model, data, tokenizer, batch_size))
        totals = torch.zeros(3, len(norms), dtype=torch.float64, device=model.device)
        with observing(norms.values()):
            for batch in batches:
                run_model(model, batch)
                sums, forwards = sum_discrepancies(list(norms.values()))
                forwards = torch.tensor(forwards, device=totals.device)
                # A batch counts once for a norm, however often the model calls it.
                totals += torch.cat([(forwards > 0)[None], sums.double() / forwards.clamp(min=1)])
                for norm in norms.values():
                    norm.forget_statistics()
    counts, means, variances = sum_over_ranks(totals).tolist()
    return TidReport(
        LayerTid(name, mean / count if has_mean(norm) else None, variance / count, int(count))
        for (name, norm), count, mean, variance in zip(norms.items(), counts, means, variances, strict=True)
        if count
    )


def has_mean(norm: BatchStatisticNorm) -> bool:
    """Whether there is a TID of the mean: PN-V and PowerNorm have none."""
    return "running_mean" in norm.running


class TidHistory:
    """The TID of every norm over a training, as [`NormSwapTrainer`](hf_normswap.NormSwapTrainer) leaves in `tid.json`.

    Args:
        layers (list of `str`): names of the norms.

    Attributes:
        steps (list of `int`): optimizer steps of the entries.
        mean, variance (list of list of `float`): for each entry the TID of each norm since the entry before; `None`
            where a norm has none, or did not run.
    """

    FILE = "tid.json"

    def __init__(self, layers: list[str]):
        self.layers, self.steps, self.mean, self.variance = layers, [], [], []

    def add(self, step: int, values: torch.Tensor) -> None:
        """Add an entry: `values` of shape `(2, layers)`, the mean TID and the variance TID of each norm."""
        self.steps.append(step)
        for entries, row in zip((self.mean, self.variance), values.tolist(), strict=True):
            entries.append([value if math.isfinite(value) else None for value in row])

    def write(self, folder: str | os.PathLike) -> None:
        """Write `tid.json` into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {name: getattr(self, name) for name in ("layers", "steps", "mean", "variance")}
        Path(folder, self.FILE).write_text(json.dumps({"format_version": 1, **content}), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "TidHistory":
        """Read what [`TidHistory.write`] wrote.

        Raises:
            ValueError: when there is no history in `folder`, or a damaged one.
        """
        try:
            content = json.loads(Path(folder, cls.FILE).read_text(encoding="utf-8"))
            history = cls(content["layers"])
            history.steps, history.mean, history.variance = (content[name] for name in ("steps", "mean", "variance"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"There is no history of the TID in {folder}, or a damaged one ({error}): give the output folder of a "
                "training with running statistics."
            ) from error
        return history
