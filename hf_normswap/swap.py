"""Swap the norms of a live model, and put them back."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .core.example_inputs import LENGTH, ROWS
from .core.graph import NORM
from .core.model_state import (
    PLAIN,
    check_model,
    check_whole,
    obstacle_of_linear,
    outside_modes,
    refuse_computed,
    refuse_folded,
    restore_transformers_class,
    set_recorded_swap,
    share_config,
)
from .core.norm_sites import NormSite, describe, find_norms, is_causal, where_names
from .core.residual_stream import ResidualStream
from .modeling.base import BatchStatisticNorm, Norm
from .modeling.layernorm import LayerNorm
from .modeling.model_norms import norm_width
from .modeling.modeling_normswap import (
    NormSwapMixin,
    check_checkpointing,
    check_chunks,
    prepare_swapped,
    release_swapped,
)
from .modeling.norms import NormSwapConfig
from .modeling.record import read_record, recorded_swap
from .modeling.registry import get_norm
from .modeling.replace import change_class, change_linears, new_norm, new_stock_norm, place_norms, restore_linears


logger = logging.get_logger(__name__)


@outside_modes
def swap_norm(
    model: PreTrainedModel,
    norm: str | NormSwapConfig,
    *,
    where: str | Iterable[str] = "blocks",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibrate_on: Iterable | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Replace norms of a model of transformers, in place: LayerNorms and RMSNorms of any architecture.

    Gains and shifts are kept, as the parameters they are: an optimizer built before goes on working, and so do tied
    weights and hooks on the norms. The model records what was done in `model.config.norm_swap` and becomes one of a
    class such as `NormSwapBertForMaskedLM`, which saves and loads like any other.

    Norms with batch statistics compute something else than the LayerNorm they replace. In a pretrained model,
    `calibrate_on` a few hundred unlabelled texts: see [`calibrate`]. One trained from scratch needs none.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, before it is wrapped or compiled.
        norm (`str` or [`NormSwapConfig`]): name of a registered norm, in any spelling, or that with options.
        where (`str` or list of `str`, *optional*, defaults to `"blocks"`):
            which norms, all that match a name of the list: `"blocks"` (every norm of the transformer blocks), `"all"`
            (those of embedding, head and the final one too), a stack (`"encoder"`, `"decoder"`: its blocks), a
            sublayer (`"attention"`, `"cross_attention"`, `"ffn"`, `"embedding"`, `"head"`, `"final"`), or both
            (`"encoder.attention"`). Norms of queries and keys (`"query_key"`) and those beside the residual stream
            (`"other"`) are left alone unless they are named.
        filter_fn (`Callable[[nn.Module, str], bool]`, *optional*):
            given a norm and its name, says whether it is swapped; narrows `where`.
        calibrate_on (*optional*):
            texts, a data set or batches to [`calibrate`] the new norms on. PowerNorm is then without its group
            scaling, unless `norm` asks for it.
        tokenizer (*optional*): for texts of `calibrate_on`.

    Returns:
        The same model.

    Raises:
        ValueError: when the norm or an option is unknown, no norm matches, one is swapped already, the model is
            wrapped or a pair of models, a norm stands in two places, the new one does not fit, or calibration fails.
            Nothing was changed then.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import find_norms, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertForSequenceClassification(config), "powernorm")
    >>> [(site.sublayer, site.kind) for site in find_norms(model)]
    [('embedding', 'layernorm'), ('attention', 'powernorm'), ('ffn', 'powernorm')]

    ```
    """
    config = NormSwapConfig.of(norm)
    check_model(model)
    sites = select_norms(model, where, filter_fn)
    norms = make_norms(model, config, sites, to_be_fitted=calibrate_on is not None)
    norm_class = get_norm(config.norm)
    if calibrate_on is None and model.name_or_path and issubclass(norm_class, BatchStatisticNorm):
        logger.warning(
            f"The norms of a pretrained model become {config.norm} without calibration, and it loses its function: "
            "pass calibrate_on=texts and tokenizer=... (normswap calibrate), unless it is trained anew: see "
            "docs/choosing.md."
        )
    before = type(model), model.config
    place_new_norms(model, norms)
    options = norms[sites[0].name].options
    said = f" with {options}" if options else ""
    logger.info(
        f"Swapped {len(sites)} of {len(find_norms(model))} norms of {type(model).__name__} to {config.norm}{said}."
    )
    if calibrate_on is not None and norm_class is not LayerNorm:
        from .conversion.calibrate import calibrate  # is made of what stands here

        try:
            calibrate(model, calibrate_on, tokenizer=tokenizer)
        except BaseException:
            place_norms(model, {site.name: site.module for site in sites})
            change_class(model, before[0])
            share_config(model, before[1])
            release_swapped(model)
            if isinstance(model, NormSwapMixin):
                prepare_swapped(model)
            raise
    return model


def swap_to_fit(model: PreTrainedModel, config: NormSwapConfig, where: str | Iterable[str]) -> None:
    """Swap norms as [`swap_norm`] does, with the options that are best for a calibration, which has to follow."""
    check_model(model)
    place_new_norms(model, make_norms(model, config, select_norms(model, where), to_be_fitted=True))


def make_norms(
    model: PreTrainedModel, config: NormSwapConfig, sites: Iterable[NormSite], to_be_fitted: bool
) -> dict[str, Norm]:
    """The norms of `config` for these places of `model`, by name, once it is clear that they can stand there.

    Norms that are `to_be_fitted` to the present ones get the options that make the fit best.
    """
    norm_class = get_norm(config.norm)
    sites = list(sites)
    if to_be_fitted and norm_class.linear_classes:
        raise ValueError(
            f"{norm_class.norm_name} changes linear layers of the model, which no calibration makes up for: swap to "
            "it without calibration, and train the model."
        )
    if {"sentence", "batch"} & set(norm_class.scope):
        _refuse_time_first(model, norm_class.norm_name, sites)
    if "sentence" in norm_class.scope:
        _refuse_causal(model, norm_class.norm_name, sites)
    refuse_computed({site.name: site.module for site in sites})
    # An RMSNorm has no shift, and the affine map that is nearest to it has one.
    fitted = {"bias": True, **norm_class.calibrated_options} if to_be_fitted else {}
    norms = {}
    for site in sites:
        defaults = norm_class.default_options(_config_of(model, site.name), norm_width(site.module))
        options = {**defaults, **fitted, **config.options}
        norms[site.name] = new_norm(
            site.module, NormSwapConfig(config.norm, **options), like=_weight_near(model, site.name)
        )
    linears_to_change(model, norms)
    check_chunks(model, norms)
    for module in model.modules():
        check_checkpointing(getattr(module, "_gradient_checkpointing_func", None), norms.values())
    return norms


def _refuse_causal(model: PreTrainedModel, norm: str, sites: Iterable[NormSite]) -> None:
    """Raises `ValueError` where the statistics of a sentence would show a token what comes after it."""
    for site in sites:
        if is_causal(model, site):
            raise ValueError(
                f"{site.name} stands in a causal stack, and a {norm} takes statistics of the whole sentence, which "
                "would show each token those after it: leave that stack out with where or filter_fn, or take a norm "
                "without statistics of a sentence."
            )


def _refuse_time_first(model: PreTrainedModel, norm: str, sites: Iterable[NormSite]) -> None:
    """Raises `ValueError` where norms see `(T, B, C)`, as in XLNet and FSMT: masks are those of `(B, T)`."""
    shapes = {node.name: node.shape for node in describe(model).graph.nodes if node.op == NORM}
    for site in sites:
        if len(shapes.get(site.name, ())) == 3 and shapes[site.name][:2] == (LENGTH, ROWS):
            raise ValueError(
                f"{site.name} sees the tokens of a text before the texts of a batch, so that no mask tells a {norm} "
                "which of them are padding: take a norm of single tokens, such as rmsnorm."
            )


def place_new_norms(model: PreTrainedModel, norms: dict[str, Norm]) -> None:
    """Put the norms of [`make_norms`] in their places, and record that."""
    linears = linears_to_change(model, norms)
    place_norms(model, norms)
    change_linears(model, linears)
    set_recorded_swap(model, read_record(model))


def linears_to_change(model: PreTrainedModel, norms: Mapping[str, Norm]) -> dict[str, str]:
    """The linear layers of the sublayers whose norms shall be `norms`, and the norm, where it wants other ones.

    Raises:
        ValueError: when it cannot have them.
    """
    if not any(norm.linear_classes for norm in norms.values()):
        return {}
    found = {}
    for name, site in ResidualStream(model).sites_of_linears(find_norms(model)).items():
        norm, linear = norms.get(site.name), model.get_submodule(name)
        if norm is None or not norm.linear_classes:
            continue
        obstacle = obstacle_of_linear(linear)
        if obstacle is None and type(linear) not in norm.linear_classes:
            obstacle = f"is a {type(linear).__name__}"
        if obstacle is not None:
            raise ValueError(f"{name} {obstacle}, and {norm.norm_name} cannot change it: {PLAIN} first.")
        found[name] = norm.norm_name
    return found


@outside_modes
def restore_norm(model: PreTrainedModel) -> PreTrainedModel:
    """Put LayerNorm back everywhere, in place: the class, configuration and eps from before the swap.

    Gains and shifts stay what they have become; running statistics are dropped. A shift or a gain that the norm from
    before has no place for is dropped with a warning. Norms in another placement stay there.

    Returns:
        The same model.

    Raises:
        ValueError: when no norm of the model is swapped.
    """
    check_whole(model, "swap, restore or move its norms", needs_weights=False)
    if not isinstance(model, NormSwapMixin):
        raise ValueError(f"This {type(model).__name__} has no swapped norms: pass a model that swap_norm returned.")
    refuse_folded(model)
    norms = [site for site in find_norms(model) if isinstance(site.module, Norm)]
    if not norms:
        raise ValueError(
            f"The norms of this {type(model).__name__} are LayerNorms already: set_norm_placement moves them."
        )
    refuse_computed({site.name: site.module for site in norms})
    _warn_of_lost_parameters(norms)
    place_norms(model, {site.name: new_stock_norm(site.module) for site in norms})
    restore_linears(model)
    record = recorded_swap(model)
    kept = {name: record[name] for name in ("format_version", "placement") if name in record}
    if "placement" in kept:
        set_recorded_swap(model, {**kept, "norms": []})
    else:
        restore_transformers_class(model)
    return model


def _warn_of_lost_parameters(sites: Iterable[NormSite]) -> None:
    """Warns of shifts and gains that the norms of transformers do not have."""
    lost = {}
    for site in sites:
        norm = site.module
        places = {*norm.replaced._parameters, *(["bias"] if norm.stock.has_shift else [])}
        for name, word, neutral in (("weight", "gain", 1), ("bias", "shift", 0)):
            value = norm._parameters.get(name)
            if name not in places and value is not None and not value.is_meta and bool((value != neutral).any()):
                lost[site.name] = word, type(norm.replaced).__name__
    if lost:
        name, (word, kind) = next(iter(lost.items()))
        logger.warning(
            f"{len(lost)} norms lose what the norm from before has no place for, such as the {word} of {name} in a "
            f"{kind}, and the model computes something else: restore a copy from before the training or calibration."
        )


def _weight_near(model: nn.Module, name: str) -> torch.Tensor | None:
    """A weight of the part of the model that a module is in: a norm without parameters has no device of its own."""
    weights = (weight for part in (*_parents(model, name), model) for weight in part.parameters())
    return next((weight for weight in weights if weight.is_floating_point()), None)


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _parents(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules of `model` around the module `name`, the innermost first, without `model` itself."""
    return [model.get_submodule(name.rsplit(".", count)[0]) for count in range(1, name.count(".") + 1)]


def _config_of(model: PreTrainedModel, name: str):
    """The configuration of the model, or of the tower of it, that the module `name` is in."""
    return next(
        (parent.config for parent in _parents(model, name) if isinstance(parent, PreTrainedModel)), model.config
    )


def select_norms(model, where, filter_fn=None) -> list[NormSite]:
    """The norms of `model` that `where` and `filter_fn` choose; raises `ValueError` where they cannot be swapped."""
    names = [where] if isinstance(where, str) else list(where)
    unknown = [name for name in names if name not in where_names()]
    if unknown:
        raise ValueError(f"where={unknown[0]!r} names no norms: choose among {', '.join(where_names())}.")
    every = find_norms(model)
    if not every:
        raise ValueError(
            f"This {type(model).__name__} has no LayerNorm or RMSNorm over the channels of its tokens: inspect_model "
            "tells what else it has."
        )
    if every.obstacle is not None and "all" not in names:
        raise ValueError(
            f"The forward of this {type(model).__name__} could not be followed ({every.obstacle}), and the places of "
            "its norms are not known: pass where='all', and filter_fn to choose among them."
        )
    sites = [site for site in every if any(site.is_in(name) for name in names)]
    if filter_fn is not None:
        sites = [site for site in sites if filter_fn(site.module, site.name)]
    if not sites:
        counts = {site.sublayer: sum(other.sublayer == site.sublayer for other in every) for site in every}
        narrowed = " and filter_fn" if filter_fn is not None else ""
        raise ValueError(
            f"No norm of this {type(model).__name__} matches where={where!r}{narrowed}: choose among its {counts}."
        )
    names_of = {site.module: site.name for site in sites}
    for name, module in model.named_modules(remove_duplicate=False):
        other = names_of.get(module, name)
        # In a block that stands in two places, the norm is exchanged in both.
        if _parent(model, other) is not _parent(model, name):
            raise ValueError(f"{other} and {name} are one norm, and would load as two: give each place its own.")
    refuse_swapped(sites)
    return sites


def refuse_swapped(sites: Iterable[NormSite]) -> None:
    """Raises `ValueError` where one of the norms is swapped already."""
    for site in sites:
        # A baseline's LayerNorm computes what the one of PyTorch does.
        if isinstance(site.module, Norm) and not isinstance(site.module, LayerNorm):
            raise ValueError(
                f"{site.name} is already swapped to {site.kind}: start from the original model, or call "
                "restore_norm(model) first."
            )
