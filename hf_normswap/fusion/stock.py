"""Converted models for stock transformers: a LayerNorm or RMSNorm of a huge eps is a fixed map."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from hf_normswap.core.files import atomic_directory
from hf_normswap.core.model_state import PLAIN, check_swapped, obstacle_of_linear, outside_modes, share_config
from hf_normswap.core.norm_sites import NormSite, find_norms
from hf_normswap.core.residual_stream import ResidualStream
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.model_norms import EPS_NAMES, has_hooks
from hf_normswap.modeling.modeling_normswap import NormSwapMixin
from hf_normswap.modeling.replace import add_bias
from hf_normswap.swap import restore_norm

from .equivalence import compare_outputs, rounding_of


# Its root is a power of 2, and a gain times that has the digits that it had. A variance of 1e5 adds 5e-8 of an output.
_EPS = 2.0**40
_GAIN = 2.0**20
# Of configurations such as those of Llama, which give all linear layers of a sublayer biases.
_BIAS_FLAGS = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class StockReport:
    """What [`save_stock`] wrote.

    Attributes:
        path (`pathlib.Path`): the folder.
        norms (`int`): the norms that are a fixed map now.
        eps (`float`): the eps of all of them, in the configuration.
        error (`float`): `‖Δ‖₂ / ‖logits‖₂` of the loaded folder against the model, for random tokens.
    """

    path: Path
    norms: int
    eps: float
    error: float


@outside_modes
@torch.no_grad()
def save_stock(model: PreTrainedModel, folder: str | os.PathLike) -> StockReport:
    """Write a converted model as a checkpoint that transformers alone loads, without this package and its code.

    Norms that are affine in evaluation are written as the model's own: a LayerNorm with a huge eps ε returns
    `(x − mean(x)) / √ε · g + b`, and an RMSNorm `x / √ε · g`. Runtimes that know the architecture take the folder as
    they take any other. Nothing is folded, and the statistics of each token are still computed, to no effect.

    A LayerNorm subtracts the mean over the channels, and so must the norm that replaces it: swap to `"batchnorm"` or
    `"rbn"` with the option `center_tokens=True`. An RMSNorm has no shift. The linear layers behind it take the shift,
    if the class gives them biases, as those of Llama; swap to `"pnv"` with `bias=False` elsewhere.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            swapped and in evaluation mode, in float32, float64 or bfloat16; all norms that share the eps of the
            configuration have to be swapped.
        folder (`str` or `os.PathLike`): new or empty.

    Returns:
        [`StockReport`]

    Raises:
        ValueError: when a norm needs statistics of each token or has no place for its gain or shift, the
            configuration has no eps for it, a LayerNorm would subtract a mean that the norm does not, or the loaded
            folder does not compute what the model does. Nothing is written then.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_normswap import NormSwapConfig, save_stock, swap_norm
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9)).eval()
    >>> model = swap_norm(model, NormSwapConfig("pnv", bias=False), where="all")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_stock(model, folder).norms
    3

    ```
    """
    check_swapped(model)
    if model.dtype == torch.float16:
        raise ValueError("The gains of these norms would leave the range of float16: call model.float() first.")
    stream = ResidualStream(model)
    sites = find_norms(model)
    norms = {site.name: site for site in sites if isinstance(site.module, Norm)}
    maps = {name: _map_of(site) for name, site in norms.items()}
    trial = restore_norm(copy.deepcopy(model))
    family = type(trial).__name__
    if isinstance(trial, NormSwapMixin):
        raise ValueError(f"{family} has blocks in another placement, which stock models have not: save it as it is.")
    shifted = [
        name for name, (_, shift) in maps.items() if not norms[name].module.stock.has_shift and (shift != 0).any()
    ]
    config = copy.deepcopy(trial.config)
    for part in _configs_of(config):
        for name, value in vars(part).items():
            if _is_eps(name, value):
                setattr(part, name, _EPS)
            if shifted and name in _BIAS_FLAGS and value is False:
                setattr(part, name, True)
    built = _build(type(trial), config)
    for site in sites:
        is_changed = _EPS in [getattr(built.get_submodule(site.name), name, None) for name in EPS_NAMES]
        if site.name in norms and not is_changed:
            raise ValueError(
                f"{site.name} of every {family} has an eps that its configuration does not hold, and no checkpoint "
                "can make it a fixed map: save the model with save_pretrained."
            )
        if site.name not in norms and is_changed:
            raise ValueError(f"{site.name} shares its eps with the norms and was not swapped: swap it too.")
    share_config(trial, config)
    for name, module in built.named_modules():
        mine = trial.get_submodule(name)
        if getattr(module, "bias", None) is not None and getattr(mine, "bias", module) is None:
            add_bias(mine)
    for name, (gain, shift) in maps.items():
        if name in shifted:
            _place_shift(trial, stream, norms[name], gain, shift)
            shift = None
        _write(trial, name, norms[name], gain, shift)
    with atomic_directory(Path(folder)) as draft:
        trial.save_pretrained(draft)
        loaded = type(trial).from_pretrained(draft, dtype=model.dtype).to(model.device).eval()
        error = compare_outputs(model, loaded)
        limit = rounding_of(model, error)
        if not error <= limit:
            plain = [name for name, site in norms.items() if not _is_centered(site.module)]
            subtracts = any(norms[name].module.stock.kind == "layernorm" for name in plain)
            cure = "swap with the option center_tokens=True" if subtracts else "save it with save_pretrained"
            raise ValueError(
                f"The outputs would change by {error:.1e}, more than the {limit:.0e} of rounding: {cure}."
            )
    return StockReport(Path(folder), len(norms), _EPS, error)


def _map_of(site: NormSite) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and shift of a norm, in float64."""
    norm = site.module
    if has_hooks(norm):
        raise ValueError(f"{site.name} has hooks, which would go with it: remove them first.")
    affine = norm.map_of_statistics() if _is_centered(norm) else norm.affine_map()
    if affine is None:
        raise ValueError(
            f"{site.name}, a {norm.norm_name} ({norm.extra_repr()}), {norm.obstacle_to_affine()}: "
            "save a model of batchnorm, rbn, pnv, or powernorm with group_scaling=False."
        )
    if norm.stock.kind == "layernorm" and site.placement == "post" and not _is_centered(norm):
        raise ValueError(
            f"{site.name} stands behind a residual sum whose mean over the channels a LayerNorm would subtract: swap "
            "to batchnorm or rbn with the option center_tokens=True."
        )
    if "weight" not in norm.replaced._parameters:
        raise ValueError(f"{site.name} has no gain in the stock class: save the model with save_pretrained.")
    return tuple(value.double() for value in affine)


def _is_centered(norm: Norm) -> bool:
    """Whether a norm subtracts the mean of each token, as the LayerNorm that it replaced."""
    return getattr(norm, "center_tokens", False) and norm.stock.kind == "layernorm"


def _write(model: PreTrainedModel, name: str, site: NormSite, gain: torch.Tensor, shift: torch.Tensor | None) -> None:
    norm = model.get_submodule(name)
    norm.weight.copy_(gain * _GAIN - site.module.stock.offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(torch.zeros_like(gain) if shift is None else shift)


def _place_shift(
    model: PreTrainedModel, stream: ResidualStream, site: NormSite, gain: torch.Tensor, shift: torch.Tensor
) -> None:
    """Let the linear layers behind a norm without shift add one; before a head, those in front of the final norm."""
    reading = stream.readers(site)
    if not reading.obstacle and not reading.sums and _have_biases(model, reading.linears):
        for name in reading.linears:
            linear = model.get_submodule(name)
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            linear.bias.copy_(linear.bias + weight.double() @ shift)
        return
    total = stream.sum_before(site) if site.sublayer == "final" else None
    writers = () if total is None else stream.writers(total).linears
    if _have_biases(model, writers[-1:]) and (gain != 0).all():
        bias = model.get_submodule(writers[-1]).bias
        bias.copy_(bias + shift / gain)
        return
    raise ValueError(
        f"{site.name} has a shift, for which neither the norm of the stock class nor the linear layers around it have "
        "a place: swap an RMSNorm to pnv with the option bias=False, or save the model with save_pretrained."
    )


def _have_biases(model: PreTrainedModel, names: tuple[str, ...]) -> bool:
    for name in names:
        if reason := obstacle_of_linear(model.get_submodule(name)):
            raise ValueError(f"{name} {reason}, and cannot take a shift: {PLAIN} first.")
    return bool(names) and all(model.get_submodule(name).bias is not None for name in names)


def _configs_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for value in inner for part in _configs_of(value))]


def _is_eps(name: str, value) -> bool:
    return isinstance(value, float) and name.endswith(("eps", "epsilon"))


def _build(cls: type, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the class, on the meta device."""
    with torch.device("meta"), no_init_weights(), torch.random.fork_rng(devices=[]):
        return cls(copy.deepcopy(config))
