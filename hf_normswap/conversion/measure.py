"""What a conversion keeps of a model: its norms and its predictions against those of the original, on other data."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hf_normswap.core.data import predicted_tokens
from hf_normswap.core.model_state import run_model
from hf_normswap.core.norm_sites import find_norms
from hf_normswap.modeling.moments import Moments, merge_over_ranks

from .least_squares import add_tokens, tokens_of_all_ranks
from .predictions import both, find_predictors, tokens_of_predictions
from .sequential import given_mask


# Names of the predictions that a model may return, those of one head together.
_HEADS = [("logits",), ("start_logits", "end_logits"), ("prediction_logits",), ("logits_per_image",)]
_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample of examples, with its 95 % interval.

    The interval is that of the percentile bootstrap over examples, 1,000 times.

    Attributes:
        value (`float`): of all examples of the sample.
        low (`float`): lower end of the interval; NaN where there is one example only.
        high (`float`): its upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass
class Measurement:
    """A converted model against the original one.

    Attributes:
        examples (`int`): rows of the data.
        figures (`dict[str, Estimate]`):
            of predictions `kl`, the mean divergence from the original's, `agreement`, the share with the same largest
            logit, and `relative_error`, `‖Δ‖₂ / ‖logits‖₂`; of embeddings `cosine` and `relative_error`; of one
            output `relative_error` alone.
        norms (`dict[str, tuple]`): R², relative error and number of tokens of each norm.
    """

    examples: int
    figures: dict[str, Estimate]
    norms: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    @property
    def distance(self) -> Estimate:
        """What a budget limits: the divergence of the predictions, where there is one, else the relative error."""
        return self.figures.get("kl", self.figures["relative_error"])


@torch.no_grad()
def measure_conversion(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Iterable[dict],
    norms: Iterable[str] = (),
    seed: int = 0,
) -> Measurement:
    """Compare predictions, and the outputs of `norms`, with those of the `original` for the same inputs.

    Predictions of tokens count at real tokens, those of a masked language model where a token is masked. A model
    without a head is compared in its embeddings, the mean of the last hidden states over real tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): swapped, in evaluation mode.
        original ([`~transformers.PreTrainedModel`]): in evaluation mode.
        batches (list of dict): inputs of both.
        norms (list of `str`, *optional*): names of norms.
        seed (`int`, *optional*, defaults to 0): of the bootstrap.

    Raises:
        ValueError: when the outputs are not finite, or there are none to compare.
    """
    tables: list[dict[str, torch.Tensor]] = []
    pooled: dict[str, torch.Tensor] = {}
    norms, batches, sites = list(norms), list(batches), {site.name: site for site in find_norms(model)}
    read = find_predictors(model, [sites[name] for name in norms])
    counted = {name: iter(tokens_of_predictions(original, batches, name, linear)) for name, linear in read.items()}
    for batch in batches:
        ours, output = _observe(model, batch, list(sites))
        theirs, wanted = _observe(original, batch, norms)
        tables.append(_compare(output, wanted, list(ours.values()), predicted_tokens(model, batch)))
        for name in theirs.keys() & ours.keys():
            (y, mask), t = ours[name], theirs[name][0]
            if name in counted:
                mask = both(mask, next(counted[name]), y)
            values = torch.cat([t, y - t], dim=-1)
            empty = torch.zeros(2 * values.shape[-1] + 1, dtype=torch.float64)
            pooled[name] = add_tokens(pooled.get(name, empty), values, mask)
    table = {name: tokens_of_all_ranks(torch.cat([part[name] for part in tables])) for name in tables[0]}
    if not all(column.isfinite().all() for column in table.values()):
        raise ValueError("The outputs for the held-out data are not finite: check the data, and the model's dtype.")
    moments = {name: merge_over_ranks(Moments(pooled[name].to(model.device))) for name in norms if name in pooled}
    return Measurement(
        len(table["count"]),
        _estimate(table, seed),
        {name: _of_norm(Moments(each.packed.cpu())) for name, each in moments.items()},
    )


def _observe(model, batch: dict, names: list[str]) -> tuple[dict, object]:
    """Outputs and token masks of the norms by name, in the order of the forward, and the output of the model."""
    seen = {}

    def keep(module, args, kwargs, output, name):
        seen[name] = output, given_mask(args, kwargs)

    handles = [
        model.get_submodule(name).register_forward_hook(functools.partial(keep, name=name), with_kwargs=True)
        for name in names
    ]
    try:
        return seen, run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _of_norm(moments: Moments) -> tuple[float, float, int]:
    width = len(moments.mean) // 2
    residual = moments.power[width:].sum()
    r2 = 1 - residual / moments.var[:width].sum()
    return r2.item(), (residual / moments.power[:width].sum()).sqrt().item(), int(moments.count)


def _compare(output, wanted, seen: list[tuple], predicted: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """For each row the sums over its tokens, and their number, by name; rows without tokens are left out."""
    ours, theirs = ([_by_token(values) for values in _predictions(each)] for each in (output, wanted))
    if not ours:
        return _compare_embeddings(output, wanted, seen)
    is_span = len(ours) > 1  # what is chosen is a token
    mask = _mask_like(seen, ours[0].transpose(1, 2) if is_span else ours[0])
    if predicted is not None and predicted.shape == ours[0].shape[:2]:
        mask = predicted.cpu()

    def real(values, row):
        values = values[row].cpu().double()
        if mask is None:
            return values
        return values[:, mask[row]] if is_span else values[mask[row]]

    rows = [
        _compare_row(*([real(values, row) for values in both] for both in (ours, theirs)))
        for row in range(len(ours[0]))
    ]
    table = {name: torch.stack([each[name] for each in rows]) for name in rows[0]}
    return {name: column[table["count"] > 0] for name, column in table.items()}


def _compare_row(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    count, classes = ours[0].shape
    pairs = list(zip(ours, theirs, strict=True))
    sums = {
        "count": torch.tensor(float(count), dtype=torch.float64),
        "error": sum((our - their).square().sum() for our, their in pairs),
        "size": sum(their.square().sum() for _, their in pairs),
    }
    if classes == 1 and len(pairs) == 1:  # a regression
        return sums
    same = torch.stack([our.argmax(-1) == their.argmax(-1) for our, their in pairs])
    logs = [(our.log_softmax(-1), their.log_softmax(-1)) for our, their in pairs]
    divergences = [functional.kl_div(*pair, log_target=True, reduction="sum").clamp(min=0) for pair in logs]
    return {**sums, "kl": sum(divergences), "agreement": same.all(0).sum().double()}


def _compare_embeddings(output, wanted, seen: list[tuple]) -> dict[str, torch.Tensor]:
    ours, theirs = (getattr(each, "last_hidden_state", None) for each in (output, wanted))
    if ours is None:
        raise ValueError(
            f"The output of the model, a {type(output).__name__}, has neither logits nor a last_hidden_state to "
            "compare: convert its parts one by one, or use swap_norm and calibrate."
        )
    mask = _mask_like(seen, ours)
    ours, theirs = (_embed(states.cpu().double(), mask) for states in (ours, theirs))
    cosine = functional.cosine_similarity(ours, theirs, dim=-1)
    return {
        "count": torch.ones_like(cosine),
        "error": (ours - theirs).square().sum(-1),
        "size": theirs.square().sum(-1),
        "cosine": cosine,
    }


def _predictions(output) -> list[torch.Tensor]:
    """What a model with a head predicts; nothing for one without."""
    for names in _HEADS:
        values = [getattr(output, name, None) for name in names]
        if all(isinstance(value, torch.Tensor) for value in values):
            return values
    return []


def _by_token(logits: torch.Tensor) -> torch.Tensor:
    """Logits `(B, T, C)`, with T = 1 where there is one prediction for a row."""
    if logits.dim() > 3:  # of pixels, `(B, C, H, W)`
        return logits.flatten(2).transpose(1, 2)
    return logits if logits.dim() == 3 else logits.reshape(len(logits), 1, -1)


def _mask_like(seen: list[tuple], values: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of `values` are real, `None` for all: as the last norm knows that has as many of them."""
    rows, columns = values.shape[:2]
    for output, mask in reversed(seen):
        if output.shape[:-1] in ((rows, columns), (rows * columns,)):  # some models flatten their tokens
            return None if mask is None else mask.reshape(rows, columns).cpu()
    return None


def _embed(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the real tokens of each row."""
    if states.dim() > 3:  # of pixels
        return states.flatten(1)
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
    return states.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _estimate(table: dict[str, torch.Tensor], seed: int) -> dict[str, Estimate]:
    """Figures of all rows, with the spread of those of as many rows drawn with replacement."""
    names, values = list(table), torch.stack(list(table.values()), dim=1)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(_RESAMPLES))
    sampled = torch.stack([values[draw].sum(0) for draw in draws])
    whole, samples = (_figures(dict(zip(names, sums.unbind(-1), strict=True))) for sums in (values.sum(0), sampled))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    estimates = {}
    for name, value in whole.items():
        low, high = samples[name].quantile(ends).tolist() if len(values) > 1 else (torch.nan, torch.nan)
        estimates[name] = Estimate(value.item(), low, high)
    return estimates


def _figures(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    means = {name: sums[name] / sums["count"] for name in ("kl", "agreement", "cosine") if name in sums}
    return {**means, "relative_error": (sums["error"] / sums["size"]).sqrt()}
