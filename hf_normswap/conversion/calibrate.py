"""Swap the norms of a pretrained model without losing its function: calibration, and statistics estimated afresh."""

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_normswap.core.data import complete_batches, make_batches
from hf_normswap.core.model_state import (
    PLAIN,
    check_swapped,
    obstacle_of_linear,
    outside_modes,
    refuse_computed,
    refuse_meta,
    refuse_mixture,
    refuse_offloaded,
    refuse_other_copy,
    refuse_shared,
    refuse_training,
    swapped_parts,
    unwrap,
)
from hf_normswap.core.norm_sites import NormSite, find_norms
from hf_normswap.core.residual_stream import ResidualStream
from hf_normswap.modeling.base import BatchStatisticNorm, Norm
from hf_normswap.modeling.layernorm import LayerNorm
from hf_normswap.modeling.model_norms import active_modules
from hf_normswap.modeling.moments import has_ranks
from hf_normswap.modeling.replace import new_stock_norm, place_norms

from .fitting import (
    CalibrationReport,
    Conversion,
    check_teacher,
    estimate_statistics,
    linears_of_blocks,
    places_of_linears,
)
from .predictions import find_predictors
from .sequential import ActivationStore, SequentialRunner, call_order


logger = logging.get_logger(__name__)

# Activations that stay in memory; more of them are memory-mapped.
MEMORY_BUDGET = 2**30
# Below this share of explained variance a fit is worth a warning.
LOW_R2 = 0.8


@outside_modes
@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    data: Iterable,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | None = None,
    linears: bool = True,
    batch_size: int = 32,
    memory_budget: int = MEMORY_BUDGET,
) -> CalibrationReport:
    """Fit the swapped norms of `model` to the LayerNorms that they replaced, in place and without labels.

    Norm by norm in the order of the forward, on the activations of the part that is converted already: running
    statistics become those of the norm's inputs, gain and shift the least-squares fit of the LayerNorm's output for
    the same tokens. One affine map cannot follow the scale of each token as LayerNorm does, so the linear layers of
    the blocks are corrected on the way, by ridge regression: to their original outputs for the inputs that they now
    get; the one in front of a norm to what makes the norm return the LayerNorm's output.

    A norm without a gain for each channel, such as ScaleNorm, has nothing to fit and stays as it is.

    On several ranks each passes its own share of the data; all end with the same model.

    Args:
        model ([`~transformers.PreTrainedModel`]): swapped and in evaluation mode.
        data: texts, a data set or batches, as [`make_batches`] takes them. A few hundred sentences like those that
            the model will see are enough.
        tokenizer (*optional*): for texts, and to pad a data set.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            the model with its LayerNorms. By default `model` itself with its present gains and shifts, which are those
            of the LayerNorms until it is trained or calibrated; norms that were are left as they are then.
        linears (`bool`, *optional*, defaults to `True`):
            whether to correct linear layers; else nothing changes but the norms, and less of the function is kept.
            They have to be plain ones: no adapter, no parametrization, no pruning that is not made permanent, no
            quantized weights. Zeros of a pruned weight do not stay zero.
        batch_size (`int`, *optional*, defaults to 32): rows of a batch, where `data` is not in batches.
        memory_budget (`int`, *optional*, defaults to 1 GiB):
            bytes of activations to keep in memory; what is beyond is memory-mapped.

    Returns:
        [`CalibrationReport`]: a [`NormFit`] for each norm; print it for a table. Norms that no batch reaches are not
        in it and stay as they are.

    Raises:
        ValueError: when the data is empty or has no real tokens, the model has no swapped norms, is in training mode
            or offloaded, or was calibrated or trained before and no teacher is given, a weight that has to change is
            computed or shared, or activations are not finite. The model is untouched then.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import calibrate, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertModel(config).eval(), "batchnorm")
    >>> report = calibrate(model, [{"input_ids": torch.randint(9, (4, 6))}])
    >>> [fit.name for fit in report]
    ['encoder.layer.0.attention.output.LayerNorm', 'encoder.layer.0.output.LayerNorm']

    ```
    """
    done = check_swapped(model).get("calibration", {})
    sites = {site.name: site for site in find_norms(model) if _has_fit(site.module)}
    if not sites:
        for site in find_norms(model):
            if not getattr(site.module, "has_gain", True):
                raise ValueError(
                    f"Calibration fits a gain of each channel, and {site.name}, a {site.kind}, has none: train the "
                    "model, or swap to another norm."
                )
        raise ValueError(f"This {type(model).__name__} has no norms to calibrate: call swap_norm(model, ...) first.")
    if teacher is None:
        sites = {name: site for name, site in sites.items() if site.path not in done and _is_new(site.module)}
        if not sites:
            raise ValueError(
                "The norms are calibrated already or trained, their gains are no longer those of LayerNorm: pass a "
                "copy of the model from before the swap as teacher."
            )
    corrected = linears_of_blocks(model) if linears else {}
    _check_parameters(model, sites, corrected)
    batches = make_batches(model, data, tokenizer, batch_size)
    if teacher is None:
        teacher = _with_layer_norms(model, sites)
    check_teacher(teacher, sites)
    batches = complete_batches(teacher, batches)
    modules = {**corrected, **{name: site.module for name, site in sites.items()}}
    report = CalibrationReport()
    with _conversion(model, teacher, modules, memory_budget) as store:
        order = call_order(model, batches, modules)
        student = SequentialRunner(model, batches, order, store)
        original = SequentialRunner(teacher, batches, order, store, changes=False)
        stream = ResidualStream(model)
        conversion = Conversion(student, original, find_predictors(model, sites.values()))
        feeders = {name: stream.feeder(site) for name, site in sites.items()}
        # Right before the norm: between them nothing else reads the stream.
        pairs = itertools.pairwise(itertools.chain(*order))
        feeding = {after: name for name, after in pairs if name in corrected and feeders.get(after) == name}
        for name, _ in zip(_progress(student), original, strict=True):
            if name in sites:
                report.append(conversion.fit_norm(sites[name], feeding.get(name)))
            elif name not in feeding.values():
                conversion.correct(name)
    r2 = {sites[fit.name].path: round(fit.r2, 6) for fit in report}
    model.config.norm_swap = {**model.config.norm_swap, "calibration": {**done, **r2}}
    _warn(report)
    return report


@torch.no_grad()
def fit_each_alone(model: PreTrainedModel, batches: list[dict], memory_budget: int = MEMORY_BUDGET) -> PreTrainedModel:
    """Fit each swapped norm of `model` as if it were the only one, in place, on its inputs in the original model.

    Returns:
        The original model, a copy of `model` with the norms that were replaced. Norms that no batch reaches are not
        fitted.
    """
    sites = {site.name: site for site in find_norms(model) if _has_fit(site.module)}
    original = _with_layer_norms(model, sites)
    norms = {name: original.get_submodule(name) for name in sites}
    with _conversion(original, None, {}, memory_budget) as store:
        runner = SequentialRunner(original, batches, call_order(original, batches, norms), store, changes=False)
        conversion = Conversion(runner, runner, find_predictors(model, sites.values()))
        for name in runner:
            conversion.fit_norm(sites[name])
    return original


@outside_modes
@torch.no_grad()
def reestimate_statistics(
    model: nn.Module,
    data: Iterable,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    memory_budget: int = MEMORY_BUDGET,
) -> None:
    """Set the running statistics of `model` to those of `data`, with all parameters as they are, in place.

    Norm by norm in the order of the forward, each over all its inputs as they are in evaluation. The result depends
    neither on the order of the data nor on its division into batches and over ranks ("precise" statistics, as Wu and
    Johnson, 2021, arXiv 2105.07576, call them).

    Args:
        model (`torch.nn.Module`):
            in evaluation mode: a swapped model, or any module around swapped models, such as an encoder-decoder pair
            or two towers. One in DistributedDataParallel, `torch.compile` or
            [`~torch.optim.swa_utils.AveragedModel`] is the one that these wrap.
        data: as in [`calibrate`]; for a module around swapped models it has to be batches, dictionaries of what its
            `forward` takes.
        tokenizer, batch_size, memory_budget: as in [`calibrate`].

    Raises:
        ValueError: when the data is empty or has no real tokens, the model has no norms with running statistics, is in
            training mode or offloaded, or activations are not finite. The model is untouched then.

    Example:

    ```python
    >>> import torch
    >>> from torch.optim.swa_utils import AveragedModel
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import reestimate_statistics, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> average = AveragedModel(swap_norm(BertModel(config), "batchnorm")).eval()
    >>> reestimate_statistics(average, [{"input_ids": torch.randint(9, (4, 6))}])

    ```
    """
    model = unwrap(model)
    norms = _norms_to_estimate(model)
    batches = make_batches(model, data, tokenizer, batch_size)
    batches = complete_batches(model, batches)
    with _conversion(model, None, norms, memory_budget) as store:
        runner = SequentialRunner(model, batches, call_order(model, batches, norms), store)
        for name in _progress(runner):
            estimate_statistics(name, norms[name], runner.inputs(name))


def _norms_to_estimate(model) -> dict[str, BatchStatisticNorm]:
    """The norms with running statistics by name, once it is clear that all of them can be estimated afresh."""
    parts = swapped_parts(model) if isinstance(model, nn.Module) else {}
    if set(parts) <= {""}:
        check_swapped(model)
    else:
        for check in (refuse_other_copy, refuse_offloaded, refuse_meta, refuse_training):
            check(model)
        for part in parts.values():
            refuse_mixture(part)
    norms = {name: norm for name, norm in active_modules(model) if isinstance(norm, BatchStatisticNorm)}
    if not norms:
        raise ValueError(f"No norm of this {type(model).__name__} has running statistics: there are none to estimate.")
    return norms


def _check_parameters(model, sites: dict[str, NormSite], linears: dict[str, nn.Module]) -> None:
    """Raises `ValueError` where what calibration writes would not be what the model computes with."""
    refuse_computed({name: site.module for name, site in sites.items()})
    if linears:
        for name, module in {**linears, **places_of_linears(model)}.items():
            if reason := obstacle_of_linear(module):
                raise ValueError(f"{name} {reason}, and cannot be corrected: {PLAIN} first, or pass linears=False.")
    refuse_shared(model, [*sites, *linears])


def _has_fit(norm: nn.Module) -> bool:
    return isinstance(norm, Norm) and not isinstance(norm, LayerNorm) and norm.has_gain


def _is_new(norm: Norm) -> bool:
    return not isinstance(norm, BatchStatisticNorm) or norm.num_batches_tracked.item() == 0


def _with_layer_norms(model, sites: dict) -> PreTrainedModel:
    teacher = copy.deepcopy(model)
    place_norms(teacher, {name: new_stock_norm(teacher.get_submodule(name)) for name in sites})
    return teacher


def _progress(runner: SequentialRunner) -> Iterator[str]:
    silent = has_ranks() and torch.distributed.get_rank() > 0
    return iter(tqdm(runner, "Converting", total=sum(map(len, runner.order)), disable=silent))


@contextmanager
def _conversion(model, teacher, modules: dict[str, nn.Module], memory_budget: int) -> Iterator[ActivationStore]:
    """A store for the runners; on an error `modules` are put back as they were."""
    states = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    parts = [*model.modules(), *(teacher.modules() if teacher is not None else ())]
    configs = {id(part.config): part.config for part in parts if isinstance(part, PreTrainedModel)}.values()
    configs = [config for config in configs if hasattr(config, "use_cache")]
    use_cache = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False  # blocks run more than once: their keys and values would pile up
        with ActivationStore(memory_budget) as store:
            yield store
    except BaseException:
        for name, module in modules.items():
            module.load_state_dict(states[name])
        raise
    finally:
        for config, value in zip(configs, use_cache, strict=True):
            config.use_cache = value


def _warn(report: CalibrationReport) -> None:
    poor = [fit for fit in report if fit.r2 < LOW_R2 and not fit.is_last]
    if poor:
        worst = min(poor, key=lambda fit: fit.r2)
        sinks = f", {worst.sinks} of its {worst.tokens} tokens are attention sinks" if worst.sinks else ""
        logger.warning(
            f"{len(poor)} of {len(report)} norms follow their LayerNorm badly, worst of all {worst.name} (R² "
            f"{worst.r2:.2f}{sinks}): fine-tune the model, or leave these norms out with filter_fn."
        )
