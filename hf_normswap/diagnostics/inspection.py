"""What can be done with the norms of a model, before anything is touched: an audit of any architecture."""

import copy
import inspect
import re
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_normswap.conversion.fitting import linears_of_blocks, places_of_linears
from hf_normswap.core.model_state import PLAIN, check_model, obstacle_of_linear, refuse_computed, refuse_shared
from hf_normswap.core.norm_sites import ASIDE, NormSite, describe, find_norms, format_table
from hf_normswap.core.residual_stream import ResidualStream
from hf_normswap.fusion.fold import rehearse_folding
from hf_normswap.fusion.rmsnorm import plan_conversion
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.configuration_normswap import STOCK_PLACEMENTS, family_of
from hf_normswap.modeling.model_norms import active_modules, is_norm, norm_width, read_norm

from .tid import TidReport


_NORMS_OF_TORCH = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)
_MASKS = ("attention_mask", "decoder_attention_mask")
_FUNCTIONAL = ("native_layer_norm", "native_group_norm", "_fused_rms_norm")
_OF_ONE = ("layer", "name")
_VERBS = {"swap": "swapped", "calibrate": "calibrated", "fold": "folded"}


@dataclass(frozen=True)
class NormAudit:
    """What is known of one norm. Where something cannot be done with it, a sentence says why; `None` means it can.

    Attributes:
        norm (`str`): registered name of the norm; `"layernorm"` or `"rmsnorm"` for those of PyTorch and transformers.
        stack, sublayer, layer, placement, block, name: as in [`NormSite`].
        width (`int`): number of channels.
        calls (`int`): how often one forward calls it; 0 where the forward could not be followed.
        swap (`str`, *optional*): why [`swap_norm`] would not replace it under `where="all"`.
        calibrate (`str`, *optional*): why [`calibrate`] would not fit it after a swap.
        fold (`str`, *optional*): why [`fold_norms`] would not remove it after a swap of all norms.
        batches, sigma_min, sigma_median, sigma_max, r2, tid_mean, tid_variance (*optional*):
            of a swapped norm: updates of its running statistics, running standard deviation over channels, R² of its
            calibration, training–inference discrepancy.
    """

    norm: str
    stack: str
    sublayer: str | None
    layer: int | None
    placement: str | None
    width: int | None
    calls: int
    swap: str | None
    calibrate: str | None
    fold: str | None
    batches: int | None
    sigma_min: float | None
    sigma_median: float | None
    sigma_max: float | None
    r2: float | None
    tid_mean: float | None
    tid_variance: float | None
    name: str
    block: str | None = None


@dataclass(frozen=True)
class InspectReport:
    """What [`inspect_model`] found; print it for a table and its notes.

    Attributes:
        model_class (`str`): name of the class of the model.
        model_type (`str`): of its configuration.
        norms (list of [`NormAudit`]): in the order of the modules.
        masks (list of `str`): the arguments of the forward that tell which tokens are padding.
        obstacles (`dict[str, str]`):
            name of a function, and why it cannot be used on the whole model; what is not in it can be used.
        left (`dict[str, str]`): what looks like a norm and is none of `norms`, by name, and why.
    """

    model_class: str
    model_type: str
    norms: list[NormAudit] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report as it is written to JSON: a row for each norm."""
        content = asdict(self)
        return {"class": content.pop("model_class"), **content}

    def heading(self) -> str:
        """Class, model type, and how many norms of which kind there are."""
        kinds = Counter(norm.norm for norm in self.norms)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no norms"
        return f"{self.model_class} ({self.model_type}): {counts}"

    def rows(self, every: bool = False) -> list[tuple]:
        """Cells of the table, the heading first; equal norms of several layers share a row unless `every` is set."""
        groups: dict[object, list[NormAudit]] = {}
        for norm in self.norms:
            cells = self._cells(norm)
            alone = every or norm.batches is not None or _star(norm) == norm.name
            key = norm.name if alone else (_star(norm), *(cells[name] for name in cells if name not in _OF_ONE))
            groups.setdefault(key, []).append(norm)
        table = []
        for norms in groups.values():
            cells = self._cells(norms[0])
            if len(norms) > 1:
                layers = [norm.layer for norm in norms if norm.layer is not None]
                cells |= {"layer": _ranges(layers) if layers else None, "name": _star(norms[0])}
            table.append(cells)
        columns = [name for name in (table or [{}])[0] if any(cells[name] is not None for cells in table)]
        return [tuple(columns), *(tuple(cells[name] for name in columns) for cells in table)]

    def notes(self) -> list[str]:
        """What the table leaves out, a line each."""
        lines = []
        for verb, action in _VERBS.items():
            if verb in self.obstacles:
                lines.append(f"{verb}: no, {self.obstacles[verb]}")
                continue
            reasons: dict[str, list[str]] = {}
            for norm in self.norms:
                if (reason := getattr(norm, verb)) is not None and (verb == "swap" or norm.swap is None):
                    reasons.setdefault(_without_numbers(reason), []).append(_star(norm))
            lines += [f"not {action}: {', '.join(dict.fromkeys(names))}: {why}" for why, names in reasons.items()]
        for verb in ("convert_to_rmsnorm", "set_norm_placement"):
            lines.append(f"{verb}: no, {self.obstacles[verb]}" if verb in self.obstacles else f"{verb}: yes")
        lines.append(f"padding is known from: {', '.join(self.masks) or 'no argument, every token counts'}")
        left: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            left.setdefault(reason, []).append(name)
        for reason, names in left.items():
            shown = list(dict.fromkeys(map(_without_numbers, names)))
            lines.append(f"not taken: {', '.join(shown)}: {reason}")
        if "where" in self.obstacles:
            lines.insert(0, f"where: {self.obstacles['where']}")
        return lines

    def _cells(self, norm: NormAudit) -> dict:
        """The cells of a row by column."""
        cells = {
            name: f"{v:.4g}" if isinstance(v, float) else v for name, v in asdict(norm).items() if name != "block"
        }
        cells["calls"] = norm.calls if norm.calls > 1 else None
        for verb in _VERBS:
            is_free = getattr(norm, verb) is None and verb not in self.obstacles
            cells[verb] = "yes" if is_free else "no"
        if norm.sublayer in ASIDE and "swap" not in self.obstacles:
            cells |= {"swap": "if named", "calibrate": None, "fold": None} if norm.swap else {}
        return cells

    def __str__(self):
        table = [format_table(self.rows())] if self.norms else []
        return "\n\n".join([self.heading(), *table, "\n".join(self.notes())])


def inspect_model(model: PreTrainedModel, *, tid: TidReport | None = None) -> InspectReport:
    """Say which norms a model has, where they stand, and what can be done with them. The model is not changed.

    The model may be on the meta device, without weights: the forward is followed without them.

    Args:
        model ([`~transformers.PreTrainedModel`]): of any architecture, swapped or not.
        tid ([`TidReport`], *optional*): of the same model, to be shown with its norms.

    Returns:
        [`InspectReport`]: print it for a table and notes.

    Raises:
        ValueError: when `model` is not a model of transformers, or is wrapped.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_normswap import inspect_model
    >>> with torch.device("meta"):  # 7 billion parameters that take no memory
    ...     model = LlamaForCausalLM(LlamaConfig())
    >>> report = inspect_model(model)
    >>> report.heading()
    'LlamaForCausalLM (llama): 65 rmsnorm'
    >>> [row[3] for row in report.rows()]
    ['layer', '0-31', '0-31', None]

    ```
    """
    sites = find_norms(model)
    obstacles = _obstacles(model, sites)
    folding = {}
    if "fold" not in obstacles:
        try:
            folding = rehearse_folding(model)
        except ValueError as error:
            obstacles["fold"] = f"{error}: {PLAIN} first"
    tids = {each.name: each for each in tid or ()}
    norms = [_audit(model, site, folding, tids.get(site.name)) for site in sites]
    names = list(inspect.signature(type(model).forward).parameters)
    return InspectReport(
        type(model).__name__,
        family_of(model.config.model_type or ""),
        norms,
        [name for name in _MASKS if name in names],
        obstacles,
        _left(model, sites),
    )


def _audit(model: PreTrainedModel, site: NormSite, folding: dict[str, str | None], tid) -> NormAudit:
    norm = site.module
    fits = (getattr(model.config, "norm_swap", None) or {}).get("calibration") or {}
    batches = getattr(norm, "num_batches_tracked", None)
    squared = getattr(norm, "running_var", getattr(norm, "running_power", None))
    scales = None if squared is None or squared.is_meta else squared.sqrt()
    return NormAudit(
        norm=site.kind,
        stack=site.stack,
        sublayer=site.sublayer,
        layer=site.layer,
        placement=site.placement,
        width=norm_width(norm),
        calls=site.calls,
        swap=_swap_obstacle(site),
        calibrate=_calibrate_obstacle(model, site),
        fold=folding.get(site.name),
        batches=None if batches is None or batches.is_meta else int(batches),
        sigma_min=None if scales is None else scales.min().item(),
        sigma_median=None if scales is None else scales.median().item(),
        sigma_max=None if scales is None else scales.max().item(),
        r2=fits.get(site.path),
        tid_mean=tid and tid.mean,
        tid_variance=tid and tid.variance,
        name=site.name,
        block=site.block,
    )


def _obstacles(model: PreTrainedModel, sites) -> dict[str, str]:
    """Why functions cannot be used on the whole of a model."""
    found = {}
    if sites.obstacle is not None:
        found["where"] = f"only 'all', the forward could not be followed ({sites.obstacle})"
    try:
        check_model(model)
    except ValueError as error:
        found["swap"] = _clause(error)
    if getattr(model.config, "quantization_config", None) is not None:
        found["calibrate"] = found["fold"] = "its weights are quantized: load it without quantization"
    try:
        ResidualStream(model)
    except ValueError as error:
        found |= {"calibrate": _clause(error), "fold": _clause(error)}
    for name, module in (linears_of_blocks(model) | places_of_linears(model)).items():
        if reason := obstacle_of_linear(module):
            found.setdefault("calibrate", f"{name} {reason}: {PLAIN} first, or pass linears=False")
    try:
        plan_conversion(model, untie=True)
    except ValueError as error:
        found["convert_to_rmsnorm"] = _clause(error)
    family = family_of(model.config.model_type or "")
    if family not in STOCK_PLACEMENTS:
        found["set_norm_placement"] = f"it moves the norms of {', '.join(STOCK_PLACEMENTS)} models"
    return found


def _swap_obstacle(site: NormSite) -> str | None:
    if isinstance(site.module, Norm):
        return None
    try:
        refuse_computed({site.name: site.module})
    except ValueError:
        return f"its gain or its shift is computed: {PLAIN} first"
    return f"left alone unless where names {site.sublayer!r}" if site.sublayer in ASIDE else None


def _calibrate_obstacle(model: PreTrainedModel, site: NormSite) -> str | None:
    if site.calls > 1:
        return f"it is called {site.calls} times"
    try:
        refuse_shared(model, [site.name])
    except ValueError:
        return "it shares its weights with another layer"
    return _swap_obstacle(site)


def _left(model: PreTrainedModel, sites) -> dict[str, str]:
    """What looks like a norm and is no site, and why."""
    found = {site.name for site in sites}
    left = {}
    for name, module in active_modules(model):
        looks = isinstance(module, _NORMS_OF_TORCH) or type(module).__name__.endswith("Norm")
        if name not in found and looks and not any(module.children()):
            left[name] = f"{type(module).__name__} {_reason(module)}"
    for node in describe(model).graph.nodes:
        if node.op in _FUNCTIONAL and node.name not in left:
            left[node.name or type(model).__name__] = f"calls {node.op}, a function and no module"
    return left


def _reason(module: nn.Module) -> str:
    if is_norm(module):
        return "is not called by the forward"
    if type(module).__name__.startswith("_"):
        return "normalises a weight"
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "normalises channels over the batch or over positions already"
    if isinstance(module, nn.GroupNorm | nn.LocalResponseNorm):
        return "normalises groups of channels over positions"
    if norm_width(module) is None:
        return "has a gain of several dimensions, or parts"
    if _runs_on_the_second_dimension(module):
        return "normalises over the second dimension, channels first"
    if _is_affine(module):
        return "has a gain and a shift, and no statistic"
    return "computes neither LayerNorm nor RMSNorm over the last dimension"


@torch.no_grad()
def _runs_on_the_second_dimension(module: nn.Module) -> bool:
    """Whether a module computes LayerNorm or RMSNorm where its channels come second, as in an image."""
    if getattr(module, "data_format", None) == "channels_first":
        return True
    last = copy.copy(module)
    last.forward = lambda x: type(module).forward(last, x.transpose(1, -1)).transpose(1, -1)
    return read_norm(last) is not None


@torch.no_grad()
def _is_affine(module: nn.Module) -> bool:
    """Whether a module of a gain and a shift does nothing but apply them."""
    trial = copy.copy(module)
    trial._parameters = {
        name: tensor if tensor is None else nn.Parameter(torch.linspace(1, 2, len(tensor), device="cpu"))
        for name, tensor in module._parameters.items()
    }
    gain, shift = (trial._parameters.get(name) for name in ("weight", "bias"))
    x = torch.linspace(-1, 3, 2 * norm_width(module), device="cpu").view(2, -1)
    try:
        y = trial(x)
    except Exception:  # it wants something else than tokens
        return False
    return torch.allclose(y, x * (1 if gain is None else gain) + (0 if shift is None else shift))


def _star(norm: NormAudit) -> str:
    """The name of a norm with a star for the number of its block, or for every number where nothing else is known."""
    if norm.block is None:
        return norm.name if norm.sublayer else _without_numbers(norm.name)
    return f"{norm.block.rpartition('.')[0]}.*{norm.name[len(norm.block) :]}"


def _without_numbers(text: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=[. ]|$)", "*", text)


def _ranges(numbers: list[int]) -> str:
    """`"0-2,5"` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _clause(error: ValueError) -> str:
    """An error as the end of a line."""
    text = str(error).removesuffix(".")
    return text[0].lower() + text[1:] if text.split()[0] in ("A", "The", "This") else text
