"""Norms of a trained model replaced in one call: fitted on a part of the data, and measured on another one."""

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .conversion.calibrate import MEMORY_BUDGET, calibrate, fit_each_alone
from .conversion.distill import distill
from .conversion.fitting import CalibrationReport
from .conversion.measure import Estimate, Measurement, measure_conversion
from .conversion.sequential import call_order
from .core.data import complete_batches, make_batches, refuse_non_finite, split_data
from .core.model_state import check_model, outside_modes, refuse_meta, refuse_training
from .core.norm_sites import find_norms, format_table
from .modeling.layernorm import LayerNorm
from .modeling.norms import NormSwapConfig
from .modeling.registry import get_norm
from .modeling.replace import place_norms
from .swap import make_norms, place_new_norms, refuse_swapped, select_norms


logger = logging.get_logger(__name__)

# Conversions of the whole model in the search for what a budget allows, unless none has met it by then.
_TRIES = 5
# What a distillation chooses from. MiniLM on 2,048 sentences: a cosine of 0.961 before, of 0.971 and 0.959 after 200
# steps at 3e-4 and 1e-3.
_LEARNING_RATES = (1e-4, 3e-4, 1e-3)
# The most batches of each part of the data that damages are measured with.
_BATCHES_OF_DAMAGE = 4


@dataclass(frozen=True)
class ConvertedNorm:
    """How well a converted norm reproduces the LayerNorm that it replaced, on data that it was not fitted on.

    Attributes:
        name (`str`): path of the norm in the model.
        r2 (`float`): share of the variance of the LayerNorm's output that is explained, on held-out data.
        error (`float`): `‖y − LN‖₂ / ‖LN‖₂` over all tokens and channels, on held-out data.
        fitted_r2 (`float`): the share on the data of the fit, before a distillation.
        tokens (`int`): real tokens of the held-out data.
    """

    name: str
    r2: float
    error: float
    fitted_r2: float
    tokens: int


@dataclass
class ConversionReport:
    """What a conversion has changed, and how far; it prints as a table.

    All figures are of data that took part in neither the fit nor a choice. An [`Estimate`] has a 95 % interval, of a
    bootstrap over examples. What a model has no figure of is `None`.

    Attributes:
        norm (`str`): name of the new norm.
        norms (list of [`ConvertedNorm`]): in the order of the forward.
        kept (list of `str`): paths of the norms that stay, for the budget or because the data does not reach them.
        examples (`int`): held-out examples that the figures are of.
        agreement ([`Estimate`], *optional*): share of predictions whose largest logit is that of the original model.
        kl ([`Estimate`], *optional*): mean Kullback–Leibler divergence of predictions from those of the original.
        relative_error ([`Estimate`]): `‖Δ‖₂ / ‖original‖₂` of logits, or of embeddings.
        cosine ([`Estimate`], *optional*): mean cosine of embeddings, of a model without a head.
        budget (`float`, *optional*): what was asked for.
        damage (`dict[str, float]`):
            with a budget, the distance that each norm causes when it alone is converted, without linear layers.
        distillation (pair of `float`, *optional*): the distance before and after it, on the data of the choice.
        distilled (`bool`): whether the model is that after the distillation.
        scores (`dict[str, tuple]`): what `score` returned for the original model and for the converted one.
    """

    norm: str
    norms: list[ConvertedNorm]
    kept: list[str]
    examples: int
    relative_error: Estimate
    kl: Estimate | None = None
    agreement: Estimate | None = None
    cosine: Estimate | None = None
    budget: float | None = None
    damage: dict[str, float] = field(default_factory=dict)
    distillation: tuple[float, float] | None = None
    distilled: bool = False
    scores: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def rows(self) -> list[tuple]:
        """The cells of the table of norms, the heading first."""
        damage = {name: f"{value:.2g}" for name, value in self.damage.items()}
        rows = [
            (f"{each.r2:.4f}", f"{each.error:.4f}", f"{each.fitted_r2:.4f}", damage.get(each.name), each.name)
            for each in self.norms
        ]
        rows += [(None, None, None, damage.get(name), f"{name} (kept)") for name in self.kept]
        rows = [("R²", "error", "R² of the fit", "damage alone", "name"), *rows]
        return rows if self.damage else [(*row[:3], row[4]) for row in rows]

    def lines(self) -> list[str]:
        """What there is to say about the whole model, a sentence a line."""
        names = {
            "agreement": "same prediction",
            "kl": "KL divergence",
            "cosine": "cosine",
            "relative_error": "relative error",
        }
        found = {label: getattr(self, name) for name, label in names.items()}
        lines = [f"{label}: {value}" for label, value in found.items() if value is not None]
        lines += [f"{name}: {before:.4g} before, {after:.4g} after" for name, (before, after) in self.scores.items()]
        if self.distillation is not None:
            before, after = self.distillation
            lines.append(f"distillation: {before:.4g} before, {after:.4g} after, {_kept(self.distilled)}")
        return [f"on {self.examples} held-out examples, with 95 % intervals:", *lines]

    def __str__(self):
        return "\n".join([format_table(self.rows()), *self.lines()])

    def plot(self, path: str | os.PathLike | None = None):
        """Draw the damage of each norm alone, and write the figure to `path`; see [`plot_damage`].

        Returns:
            `matplotlib.figure.Figure`
        """
        from .diagnostics.plots import plot_damage

        figure = plot_damage(self)
        if path is not None:
            figure.savefig(path)
        return figure


def _kept(distilled: bool) -> str:
    return "kept" if distilled else "undone"


@outside_modes
def convert_norms(
    model: PreTrainedModel,
    data: Iterable,
    norm: str | NormSwapConfig = "batchnorm",
    *,
    where: str | Iterable[str] = "all",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    linears: bool = True,
    distill_steps: int = 0,
    learning_rate: float | None = None,
    budget: float | None = None,
    holdout: float = 0.2,
    seed: int = 0,
    score: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    batch_size: int = 32,
    memory_budget: int = MEMORY_BUDGET,
) -> ConversionReport:
    """Replace the norms of a trained model, in place, and measure what it keeps: no labels, no training.

    It swaps the norms as [`swap_norm`] does, and fits them and the linear layers to a part of the data, as
    [`calibrate`] does. It compares the model with the original one on the rest. With a `budget` or a distillation the
    rest is divided once more: one half is for the choice, the other for the figures of the report.

    With a `budget` it converts as many norms as it can. Each norm is converted alone first, on a few batches, which
    gives its damage. Errors of norms add up in no simple way: so it then converts all norms in the order of the
    forward, leaves the most damaging ones out, and finds by bisection how many it has to leave out.

    Args:
        model ([`~transformers.PreTrainedModel`]): with LayerNorms or RMSNorms, in evaluation mode.
        data: unlabelled texts, a data set or batches, as [`make_batches`] takes them.
        norm (`str` or [`NormSwapConfig`], *optional*, defaults to `"batchnorm"`): as in [`swap_norm`].
        where, filter_fn (*optional*): which norms, as in [`swap_norm`]; all of them by default.
        tokenizer (*optional*): for texts, images and recordings, and to pad a data set.
        linears (`bool`, *optional*, defaults to `True`): whether to correct linear layers, as in [`calibrate`].
        distill_steps (`int`, *optional*, defaults to 0):
            steps of [`distill`] afterwards. They are undone where the distance of the data of the choice grows.
        learning_rate (`float`, *optional*):
            of the distillation. By default 1e-4, 3e-4 and 1e-3 are tried for a tenth of the steps each, and the one
            with the smallest distance on the data of the choice is taken.
        budget (`float`, *optional*):
            the largest distance from the original model that is allowed: the mean Kullback–Leibler divergence of
            predictions, or the relative error of a model without a head or with one output. The upper end of its 95 %
            interval on the data of the choice has to meet it.
        holdout (`float`, *optional*, defaults to 0.2): share of the examples, or batches, that is held out.
        seed (`int`, *optional*, defaults to 0): of the division, the distillation and the bootstrap.
        score (`Callable`, *optional*):
            returns metrics by name for a model. It gets the original model and a converted copy.
        batch_size (`int`, *optional*, defaults to 32): as in [`calibrate`].
        memory_budget (`int`, *optional*, defaults to 1 GiB): as in [`calibrate`].

    Returns:
        [`ConversionReport`]: print it for a table.

    Raises:
        ValueError: as [`swap_norm`], [`calibrate`] and [`distill`] do; when the data is too little to hold some out,
            inputs are not finite, or no norm fits the `budget`. The model is untouched after any error.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import convert_norms
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = BertForSequenceClassification(config).eval()
    >>> report = convert_norms(model, [{"input_ids": torch.randint(9, (4, 6))} for _ in range(5)])
    >>> len(report.norms), report.examples, type(model).__name__
    (3, 4, 'NormSwapBertForSequenceClassification')

    ```
    """
    config = NormSwapConfig.of(norm)
    _check_arguments(config, distill_steps, budget, holdout)
    check_model(model)
    refuse_meta(model)
    refuse_training(model)
    sites = select_norms(model, where, filter_fn)
    refuse_swapped(find_norms(model))  # no other one either: the original model has to have their LayerNorms
    chooses = budget is not None or distill_steps > 0
    parts = split_data(data, [holdout / 2, holdout / 2] if chooses else [holdout], seed)
    batches = [complete_batches(model, make_batches(model, part, tokenizer, batch_size)) for part in parts]
    for part in batches:
        refuse_non_finite(part)
    trial = _Trial(model, config, batches[0], batches[1], linears, memory_budget, seed)
    before = _score(score, model)
    damage, names = {}, trial.reached([site.name for site in sites])
    if budget is None:
        student, fits = trial.convert(names)
    else:
        damage = trial.damages(names)
        student, fits = trial.convert_within(budget, damage)
    distillation = None
    if distill_steps:
        student, *distillation = trial.distill(student, distill_steps, learning_rate)
    measured = measure_conversion(student, model, batches[-1], [fit.name for fit in fits], seed)
    after = _score(score, student)
    report = _report(config, sites, fits, measured, damage, budget, distillation)
    report.scores = {name: (before[name], after[name]) for name in before if name in after}
    if budget is not None and measured.distance.value > budget:
        logger.warning(
            f"The distance of the held-out data, {measured.distance}, is above the budget of {budget:g} that the data "
            "of the choice met: pass more data."
        )
    # Only now does the model change, and nothing is left that can fail.
    chosen = {fit.name for fit in fits}
    place_new_norms(model, make_norms(model, config, [site for site in sites if site.name in chosen], True))
    model.load_state_dict(student.state_dict())
    model.config.norm_swap = copy.deepcopy(student.config.norm_swap)
    return report


class _Trial:
    """Conversions of copies of `model`, fitted on some batches and compared with it on others."""

    def __init__(self, model, config, batches, others, linears, memory_budget, seed):
        self.model, self.config, self.batches, self.others = model, config, batches, others
        self.linears, self.memory_budget, self.seed = linears, memory_budget, seed

    def reached(self, names: list[str]) -> list[str]:
        """Those of the norms that the data reaches, in the order of the forward."""
        modules = {name: self.model.get_submodule(name) for name in names}
        with torch.no_grad():
            reached = list(itertools.chain(*call_order(self.model, self.batches, modules)))
        if not reached:
            raise ValueError(f"The data reaches none of the norms, such as {names[0]}: pass what the model reads.")
        return reached

    def convert(self, names: Iterable[str]) -> tuple[PreTrainedModel, CalibrationReport]:
        """A copy with these norms converted, and how well they are fitted."""
        student = self._swap(names)
        fits = calibrate(
            student, self.batches, teacher=self.model, linears=self.linears, memory_budget=self.memory_budget
        )
        _refuse_constant({fit.name: (fit.r2, fit.tokens) for fit in fits}, "fit")
        return student, fits

    def measure(self, student) -> Measurement:
        return measure_conversion(student, self.model, self.others, seed=self.seed)

    def damages(self, names: list[str]) -> dict[str, float]:
        """The distance that each norm causes when it alone is converted; norms that are not reached are left out."""
        student = self._swap(names)
        # Batches of texts are sorted by length: the first ones would be short texts alone.
        batches, others = (part[:: -(-len(part) // _BATCHES_OF_DAMAGE)] for part in (self.batches, self.others))
        original = fit_each_alone(student, batches, self.memory_budget)
        damage = {}
        for name in names:
            stock = original.get_submodule(name)
            place_norms(original, {name: student.get_submodule(name)})
            damage[name] = measure_conversion(original, self.model, others, seed=self.seed).distance.value
            place_norms(original, {name: stock})
        return damage

    def convert_within(self, budget: float, damage: dict[str, float]) -> tuple[PreTrainedModel, CalibrationReport]:
        """The conversion of as many norms as the budget allows, without those that do the most damage."""
        order = sorted(damage, key=damage.get, reverse=True)
        best, distance, low, high, tries = None, math.inf, 0, len(order) - 1, 0
        while low <= high and (best is None or tries < _TRIES):
            left_out = (low + high) // 2 if tries else 0
            chosen = set(order[left_out:])
            student, fits = self.convert([name for name in damage if name in chosen])
            measured, tries = self.measure(student), tries + 1
            if measured.examples < 2:
                raise ValueError("One held-out example is too little to choose by: pass more data, or raise holdout.")
            found = measured.distance
            if found.high <= budget:
                best, high = (student, fits), left_out - 1
            else:
                low, distance = left_out + 1, min(distance, found.high)
        if best is None:
            raise ValueError(
                f"No norm can be converted within a budget of {budget:g}: the upper end of the distance was "
                f"{distance:.3g} at best, so raise the budget or pass more data."
            )
        return best

    def distill(self, student, steps: int, learning_rate: float | None) -> tuple[PreTrainedModel, float, float]:
        """The better one of the model and that after a distillation, and the distance of both."""
        before = self.measure(student).distance.value
        if learning_rate is None:
            tried = {rate: self._distilled(student, -(-steps // 10), rate)[1] for rate in _LEARNING_RATES}
            learning_rate = min(tried, key=tried.get)
            logger.info(f"Distances by learning rate: {tried}; {learning_rate} is taken.")
        trained, after = self._distilled(student, steps, learning_rate)
        return (trained if after < before else student), before, after

    def _distilled(self, student, steps: int, learning_rate: float) -> tuple[PreTrainedModel, float]:
        """A copy of the model after a distillation, and its distance."""
        trained = copy.deepcopy(student)
        options = {"steps": steps, "learning_rate": learning_rate, "linears": self.linears, "seed": self.seed}
        distill(trained, self.model, self.batches, **options)
        return trained, self.measure(trained).distance.value

    def _swap(self, names: Iterable[str]) -> PreTrainedModel:
        student, names = copy.deepcopy(self.model), set(names)
        sites = [site for site in find_norms(student) if site.name in names]
        place_new_norms(student, make_norms(student, self.config, sites, to_be_fitted=True))
        return student


def _check_arguments(config: NormSwapConfig, distill_steps: int, budget: float | None, holdout: float) -> None:
    if get_norm(config.norm) is LayerNorm:
        raise ValueError("A conversion to LayerNorm has nothing to fit: pass another norm, such as norm='batchnorm'.")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout={holdout} is not a share of the data: pass a number between 0 and 1.")
    if distill_steps < 0:
        raise ValueError(f"distill_steps={distill_steps} is no number of steps: pass 0 or more.")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget={budget} is no distance to allow: pass a number above 0, such as 0.003.")


def _score(score, model) -> dict[str, float]:
    if score is None:
        return {}
    try:
        metrics = score(model)
    finally:
        model.eval()
    if not isinstance(metrics, Mapping):
        raise ValueError(f"score returned a {type(metrics).__name__}: return a dictionary of metrics by name.")
    return {name: float(value) for name, value in metrics.items()}


def _refuse_constant(found: Mapping[str, tuple[float, int]], purpose: str) -> None:
    """Raises `ValueError` where all tokens that reach a norm are the same, so that there is nothing to explain."""
    for name, (r2, tokens) in found.items():
        if not math.isfinite(r2):
            raise ValueError(
                f"The {tokens} real tokens to {purpose} {name} on have no variance: pass a few hundred examples."
            )


def _report(config, sites, fits, measured: Measurement, damage, budget, distillation) -> ConversionReport:
    _refuse_constant({name: (r2, tokens) for name, (r2, _, tokens) in measured.norms.items()}, "measure")
    norms = [
        ConvertedNorm(fit.name, r2, error, fit.r2, tokens)
        for fit in fits
        for r2, error, tokens in [measured.norms[fit.name]]
    ]
    converted = {fit.name for fit in fits}
    return ConversionReport(
        norm=config.norm,
        norms=norms,
        kept=[site.name for site in sites if site.name not in converted],
        examples=measured.examples,
        **measured.figures,
        budget=budget,
        damage=damage,
        distillation=None if distillation is None else tuple(distillation),
        distilled=distillation is not None and distillation[1] < distillation[0],
    )
