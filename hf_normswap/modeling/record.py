"""`norm_swap` in a configuration: read off the modules of a model, and applied to the modules of a new one."""

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .base import Norm
from .configuration_normswap import FORMAT_VERSION, NORMS_IN_FRONT, layer_norm_eps, placement_of
from .linears import ChangedLinear
from .model_norms import WRAPPED, active_modules, is_norm, path_of, read_norm, swapped_norms
from .norms import NormSwapConfig
from .registry import get_norm
from .replace import add_bias, layer_norm_shares, new_norm, pass_through, remove_norms, untie_head


logger = logging.get_logger(__name__)


def recorded_swap(model: PreTrainedModel) -> dict:
    """What the configuration of a model says of its swap; of none, where it is not swapped."""
    return getattr(model.config, "norm_swap", None) or {"format_version": FORMAT_VERSION, "norms": []}


def read_record(model: PreTrainedModel) -> dict:
    """The `norm_swap` of `model` as its modules are now.

    Blocks may have been stacked, dropped or exchanged, norms replaced and options changed since the swap. What modules
    do not show (R² of calibrations, the placement, heads that this model has not) is what the configuration says.
    """
    record, norms = recorded_swap(model), []
    parts = {_part(path_of(model, name)) for name, _ in model.named_modules()}
    found = [
        (norm.norm_name, options_of(norm, layer_norm_eps(model.config)), path)
        for path, norm in swapped_norms(model).items()
    ]
    found += [
        (entry["norm"], recorded_options(entry), path)
        for entry in record["norms"]
        for path in entry["modules"]
        if _part(path) not in parts
    ]
    for norm, options, path in found:
        entry = next((entry for entry in norms if (entry["norm"], entry["options"]) == (norm, options)), None)
        if entry is None:
            entry = {"norm": norm, "options": options, "modules": []}
            norms.append(entry)
        entry["modules"].append(path)
    paths = {path for _, _, path in found}
    r2 = {path: value for path, value in record.get("calibration", {}).items() if path in paths}
    folded = [*_find_folded(model), *(path for path in record.get("folded", []) if _part(path) not in parts)]
    others = {path: norm for path, norm in record.get("linears", {}).items() if _part(path) not in parts}
    read = {
        "calibration": r2,
        "folded": folded,
        "layer_norm_share": layer_norm_shares(model),
        "linears": {**changed_linears(model), **others},
    }
    kept = {name: value for name, value in record.items() if name not in read}
    return {**kept, "norms": norms, **{name: value for name, value in read.items() if value}}


def changed_linears(model: PreTrainedModel) -> dict[str, str]:
    """The linear layers that have changed in the place of a norm, by path, and the registered name of the norm."""
    return {
        path_of(model, name): module.stands_for
        for name, module in active_modules(model)
        if isinstance(module, ChangedLinear)
    }


def linears_of_record(model: PreTrainedModel, record: dict) -> dict[str, str]:
    """The linear layers that a configuration's `norm_swap` has changed, by name, and the name of the norm.

    Raises:
        ValueError: when one is missing from a part that the model has, or is none.
    """
    modules = {path_of(model, name): (name, module) for name, module in active_modules(model)}
    parts, found = {_part(path) for path in modules}, {}
    for path, norm in record.get("linears", {}).items():
        name, module = modules.get(path, (None, None))
        if module is None and _part(path) not in parts:
            continue
        if type(module) not in get_norm(norm).linear_classes:
            raise ValueError(
                f"norm_swap in the configuration lists {path!r} as changed by {norm!r}, and this "
                f"{type(model).__name__} has no such linear layer: load it with the configuration that it was saved "
                "with."
            )
        found[name] = norm
    return found


def recorded_options(entry: dict) -> dict:
    """Options of an entry of `norm_swap`, with the defaults of the time before these were always recorded."""
    return {**get_norm(entry["norm"]).earlier_defaults, **entry["options"]}


def options_of(norm: Norm, replaced_eps: float) -> dict:
    """Keyword arguments that make `norm` again in the place of a LayerNorm of `replaced_eps`.

    These are the options that it was made with, those that are not the default now, and those that the norm always
    records. An option that the norm keeps in another form than a number or a text, such as the first value of a
    parameter, is taken as it was given.
    """
    options = {}
    for name, default in type(norm).option_defaults().items():
        given = norm.options.get(name, default)
        value = norm.bias is not None if name == "bias" else getattr(norm, name, given)
        value = value if isinstance(value, bool | int | float | str) else given
        if name == "eps" and norm.keeps_eps:
            is_told = value != replaced_eps
        elif name == "bias":
            is_told = value != norm.wants_shift(norm.stock is None or norm.stock.has_shift)
        else:
            is_told = value != default or name in norm.options or name in norm.earlier_defaults
        if is_told:
            options[name] = value
    return options


def _find_folded(model: PreTrainedModel) -> list[str]:
    """Paths where a fold has left a function in place of a norm."""
    paths = [
        path_of(model, f"{name}.{attribute}".lstrip("."))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if value is pass_through
    ]
    # Without norms in front of its sublayers GPT-2 has no final norm, folded or not.
    has_final = (placement_of(model.config) or "pre") in NORMS_IN_FRONT
    return [path for path in paths if path != "transformer.ln_f" or has_final]


def check_record(model: PreTrainedModel, record: dict) -> None:
    """Raises `ValueError` unless a model that is built from the configuration has a place for every norm of `record`.

    It is built on the meta device, which takes no memory.
    """
    config = copy.deepcopy(model.config)
    config.norm_swap = {name: record[name] for name in ("format_version", "placement") if name in record}
    config.norm_swap["norms"] = []
    try:
        with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
            built = type(model)(config)
    except TypeError:  # a class of the user that takes further arguments
        return
    ours, theirs = _places(model) | dict.fromkeys(record.get("folded", [])), _places(built)
    for path in {**ours, **theirs}:
        mine, other = ours.get(path, "missing"), theirs.get(path, "missing")
        if mine is not None and mine != other:
            norm = swapped_norms(model).get(path)
            if norm is not None and norm.stock is None and other == "missing":
                raise ValueError(
                    f"{path} is a {norm.norm_name} where a {type(model).__name__} has no norm, and it would be lost: "
                    "save a model without it."
                )
            raise ValueError(
                f"This {type(model).__name__} would not load as it is, since {path} is {mine}, and {other} in a model "
                "of its configuration: give the configuration the number of blocks that the model has, and all blocks "
                "the same placement of norms."
            )


def _places(model: PreTrainedModel) -> dict[str, str]:
    """Every norm by its path, with the class of the block that it is in."""
    places = {}
    for name, module in active_modules(model):
        if is_norm(module):
            block = re.match(r"(.*\.\d+)\.", name)  # an element of a list of modules
            where = f"in {_describe(model.get_submodule(block[1]))}" if block else "there"
            places[path_of(model, name)] = where
    return places


def _describe(block: nn.Module) -> str:
    while wrapped := [block._modules[name] for name in WRAPPED if name in block._modules]:
        (block,) = wrapped
    cls = next(cls for cls in type(block).__mro__ if not cls.__name__.startswith("FSDP"))  # fully_shard adds them
    placement = next((part.placement for part in block.modules() if "placement" in vars(part)), None)
    return f"a {cls.__module__}.{cls.__name__}" + (f" ({placement})" if placement else "")


def norms_of_record(model: PreTrainedModel, record: dict) -> dict[str, Norm]:
    """New norms by module name, for what a configuration's `norm_swap` lists.

    A checkpoint of one head opens in another: parts that this model has not, such as another head, are left out.

    Raises:
        ValueError: when a listed module is missing from a part that the model has, or is no norm.
    """
    norms = {}
    for entry in record.get("norms", []):
        config = NormSwapConfig(entry["norm"], **recorded_options(entry))
        found = _find_recorded(model, entry["modules"])
        norms |= {name: new_norm(module, config, on_default_device=True) for name, module in found.items()}
    return norms


def _find_recorded(model: PreTrainedModel, paths: list[str]) -> dict[str, nn.Module]:
    """The modules of `paths` by their names in this model."""
    modules = {path_of(model, name): (name, module) for name, module in active_modules(model)}
    parts = {_part(path) for path in modules}
    for path in paths:
        if read_norm(modules[path][1]) is None if path in modules else _is_foreign(model, path, parts):
            raise ValueError(
                f"norm_swap in the configuration lists {path!r}, which is no norm of this family: remove it."
            )
        if path not in modules and _part(path) in parts:
            raise ValueError(
                f"The configuration swaps {path!r}, which this {type(model).__name__} does not have: "
                "load it with the number of layers that it was saved with."
            )
    return dict(modules[path] for path in paths if path in modules)


def _is_foreign(model: PreTrainedModel, path: str, parts: set[str]) -> bool:
    """Whether no model of the family can have a norm at a path that this one lacks.

    Another head may have one. Blocks are in the part that all have in common, which may lack one of two stacks.
    """
    first, *rest = path.split(".")
    if not rest or not all(part.isidentifier() or part.isdigit() for part in (first, *rest)):
        return True
    if first != model.base_model_prefix:
        return any(part.isdigit() for part in rest)
    return _part(path) not in parts and rest[0] not in ("encoder", "decoder")


def _part(path: str) -> str:
    return ".".join(path.split(".")[:2])


def fold_as_recorded(model: PreTrainedModel, record: dict) -> None:
    """Make a new model what a configuration's `norm_swap` says of folding; a head that it does not name stays."""
    gone = list(_find_recorded(model, record.get("folded", [])))
    # The last norm of the model, or of each of its two stacks.
    names = [name for name, module in active_modules(model) if is_norm(module)]
    ends = {name.split(".")[0] if model.config.is_encoder_decoder else "": name for name in names}.values()
    if model.base_model is model and not set(ends).isdisjoint(gone):
        logger.warning(
            "This checkpoint was folded with a head, and the hidden states that it returns without one are in "
            "coordinates of their own: fold the model without head instead to use them."
        )
    remove_norms(model, gone)
    modules = dict(model.named_modules())
    for name in modules.keys() & {*record.get("untied", []), *record.get("biases", [])}:
        if not isinstance(modules[name], nn.Linear):
            raise ValueError(
                f"norm_swap in the configuration lists {name!r} as a head, which is no linear layer: remove it."
            )
    for name in modules.keys() & set(record.get("untied", [])):
        untie_head(model, name)
    for name in modules.keys() & set(record.get("biases", [])):
        add_bias(modules[name])
