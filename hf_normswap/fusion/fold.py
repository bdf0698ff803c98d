"""Norm-free inference: norms that are affine in evaluation go into the linear layers around them."""

import copy
import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_normswap.core.model_state import PLAIN, check_swapped, obstacle_of_linear, outside_modes, share_config
from hf_normswap.core.norm_sites import ASIDE, NormSite, find_norms, format_table
from hf_normswap.core.residual_stream import Reading, ResidualStream, find_tied_head
from hf_normswap.core.statistics import statistic_norms
from hf_normswap.modeling.affine import Affine
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.model_norms import has_hooks, norm_width
from hf_normswap.modeling.modeling_normswap import prepare_swapped, release_swapped
from hf_normswap.modeling.replace import add_bias, place_norms, remove_norms, untie_head

from .equivalence import apply_if_equivalent, compare_outputs


logger = logging.get_logger(__name__)

# The largest values of a channel, in standard deviations.
_DEVIATIONS = 4


@dataclass
class FoldReport:
    """What became of each norm.

    Attributes:
        folded (list of `str`):
            paths, in the model, of the norms that are gone, or that have neither gain nor shift any more.
        kept (`dict[str, str]`): path of each norm that stays, and why.
        error (`float`): `‖Δ‖₂ / ‖logits‖₂`, before against after, on a batch of random tokens.
        float16_error (`float`, *optional*):
            the same where the folded model is cast to float16; NaN or infinite where it overflows then. `None` where
            that was not tried: it was folded for a wider dtype, or its device or an operation knows no float16.
    """

    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    error: float = math.nan
    float16_error: float | None = None

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        folded = [("yes", name, None) for name in self.folded]
        kept = [("no", name, reason) for name, reason in self.kept.items()]
        return [("folded", "norm", "kept because"), *folded, *kept]

    def reasons(self) -> str:
        """Each reason for which norms are kept, and how often."""
        return "; ".join(f"{count} × {reason}" for reason, count in Counter(self.kept.values()).items())

    def __str__(self):
        return format_table(self.rows())


@outside_modes
@torch.no_grad()
def fold_norms(
    model: PreTrainedModel,
    *,
    untie: bool = False,
    dtype: torch.dtype = torch.float16,
    affine_every: int | None = None,
) -> FoldReport:
    """Remove the swapped norms of `model`, in place, without changing what it computes.

    In evaluation BatchNorm, RBN, PN-V and PowerNorm without group scaling are `y = a ⊙ x + b`, and so is every norm
    that `normswap norms` calls affine. A norm in front of
    linear layers goes into their weights. One behind a residual sum (BERT, RoBERTa, Marian) changes the scale of the
    residual stream's channels, `x = A ⊙ s`: what reads the stream takes up A, what adds to it divides by A, and adds
    the shift. All is computed in float64.

    The folded model saves, loads and generates like any other. Hidden states between its layers have other
    scales than before. An [`Affine`] stays where a norm cannot go: where hidden states leave the model, before a
    LayerNorm that was not swapped, in front of a head that shares its weights with the embeddings, at a gain of 0,
    where A would leave the range of `dtype`, and behind a cross-attention that is left out without an encoder. So the
    folded model can be cast to float16 and to bfloat16 later. The report says how far its outputs move in float16.

    Args:
        model ([`~transformers.PreTrainedModel`]): swapped and in evaluation mode.
        untie (`bool`, *optional*, defaults to `False`):
            whether a head that shares its weights with the embeddings gets weights of its own, so that the norm in
            front of it can go too.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`):
            the narrowest dtype that the folded model will run in. With `torch.float32`, which has the range of
            bfloat16, fewer norms stay as [`Affine`], and a cast to float16 may overflow.
        affine_every (`int`, *optional*):
            in a post-norm model, every N-th norm stays as an [`Affine`], which evens out the scales of the stream.
            This is for a graph in 8 bits, where 4 keeps most of the accuracy. By default no norm stays for this.

    Returns:
        [`FoldReport`]: what was folded, what was kept and why; print it for a table.

    Raises:
        ValueError: when a swapped norm is not affine in evaluation, has hooks or adapters on it or around it, nothing
            can be folded, the model is in training mode, `dtype` is no floating point dtype, `affine_every` is less
            than 1, or the outputs for random tokens would change by more than rounding does (1e-5 in float32, or four
            times what rounding costs the model itself). The model is untouched then.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import find_norms, fold_norms, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertForSequenceClassification(config).eval(), "batchnorm", where="all")
    >>> len(fold_norms(model).folded), len(find_norms(model))
    (3, 0)

    ```
    """
    if not dtype.is_floating_point:
        raise ValueError(f"No model runs in {_name(dtype)}: pass a dtype such as torch.float16 or torch.float32.")
    if affine_every is not None and affine_every < 1:
        raise ValueError(f"One norm in {affine_every} cannot stay: pass a positive affine_every, or None.")
    check_swapped(model)
    _check_norms(model)
    plan = _Plan(model, untie, min(dtype, model.dtype, key=lambda each: torch.finfo(each).max), affine_every)
    if not plan.report.folded:
        reasons = plan.report.reasons() or "none is of this package"
        raise ValueError(f"No norm can be folded ({reasons}): swap more of them first.")
    if unseen := [norm for norm in statistic_norms(model) if norm.num_batches_tracked == 0]:
        logger.warning(
            f"The running statistics of {len(unseen)} norms are those of a new norm, and are folded as they are: "
            "calibrate the model, or train it, before."
        )
    half = _error_in_half(model, plan) if plan.dtype == torch.float16 else None
    plan.report.error = apply_if_equivalent(model, plan.apply)
    plan.report.float16_error = half
    if half is not None and not math.isfinite(half):
        logger.warning("In float16 the folded model overflows on random tokens: run it in bfloat16 or float32.")
    return plan.report


def _error_in_half(model: PreTrainedModel, plan: "_Plan") -> float | None:
    """How far the outputs are from those of `model` when it is folded, and then cast to float16."""
    trial = copy.deepcopy(model)
    plan.apply(trial)
    try:
        return compare_outputs(model, trial.half())
    except RuntimeError:  # an operation without float16 on this device
        return None


class _Plan:
    """What folding changes in `model`, computed without changing it; weights and maps are float64."""

    def __init__(self, model: PreTrainedModel, untie: bool, dtype: torch.dtype, affine_every: int | None = None):
        self.model, self.report, self.dtype, self.affine_every = model, FoldReport(), dtype, affine_every
        self.weights: dict[str, torch.Tensor] = {}  # (out, in) of linear layers, and whole embedding tables
        self.biases: dict[str, torch.Tensor] = {}
        self.affines: dict[str, tuple] = {}
        self.stream = ResidualStream(model)
        self.sites = sorted(find_norms(model), key=self.stream.order)
        tied = [name] if (name := find_tied_head(model)) else []
        untie = untie and any(isinstance(site.module, Norm) for site in self.sites[-1:])  # the one before the head
        self.untied, self.tied = (tied, []) if untie else ([], tied)
        chains = self._find_chains()
        inside = {site.name for chain in chains for site in chain}
        for chain in chains:
            self._fold_chain(chain)
        for site in self.sites:
            if site.name not in inside:
                self._fold_alone(site)
        self._check_range()

    def apply(self, model: PreTrainedModel) -> None:
        """Do it to `model`, the one that the plan was made for or a copy."""
        biased = [name for name in self.biases if model.get_submodule(name).bias is None]
        for name in self.untied:
            untie_head(model, name)
        for name in biased:
            add_bias(model.get_submodule(name))
        for name, weight in self.weights.items():
            module = model.get_submodule(name)
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
        for name, bias in self.biases.items():
            model.get_submodule(name).bias.copy_(bias)
        place_norms(model, {name: self._affine(model, name) for name in self.affines})
        remove_norms(model, self.report.folded)

        paths = {site.name: site.path for site in self.sites}
        gone, kept = ([paths[name] for name in names] for names in (self.report.folded, self.affines))
        norms = [{"norm": "affine", "options": {}, "modules": kept}] if kept else []
        lists = {"folded": gone, "biases": biased, "untied": self.untied}
        config = copy.deepcopy(model.config)
        config.norm_swap |= {"norms": norms, **{name: values for name, values in lists.items() if values}}
        config.norm_swap.pop("calibration", None)  # R² of norms that are gone
        share_config(model, config)
        release_swapped(model)
        prepare_swapped(model)

    def _find_chains(self) -> list[list[NormSite]]:
        """Norms behind residual sums, each list along one stream: the next norm reads a sum with the one before it."""
        chains: list[list[NormSite]] = []
        for site in self.sites:
            if site.placement != "post":
                continue
            before = self.stream.site_of_stream(self.stream.sum_before(site), self.sites)
            chain = next((chain for chain in chains if before is chain[-1]), None)
            if chain is None:
                chain = [] if before is None else [before]
                chains.append(chain)
            chain.append(site)
        return chains

    def _fold_alone(self, site: NormSite) -> None:
        """Fold a norm whose output is no stream of a post-norm model."""
        affine = self._map(site)
        if affine is None:
            return
        if not self.stream.is_reached(site):
            return self._keep(site, *affine, "the forward does not reach it")
        if site.calls > 1:
            return self._keep(site, *affine, f"it is called {site.calls} times")
        reading = self.stream.readers(site)
        if site.placement == "sandwich":
            return self._fold_into_writer(site, affine)
        if reading.sums:
            return self._fold_into_tables(site, affine)
        if reason := self._obstacle(reading):
            return self._keep(site, *affine, reason)
        self._scale_inputs(reading.linears, *affine)
        self.report.folded.append(site.name)

    def _fold_into_tables(self, site: NormSite, affine: tuple) -> None:
        """Fold the norm of the embeddings, whose output is the residual stream."""
        if not (tables := self._tables(site)):
            return self._keep(site, *affine, "the embeddings in front of it are needed as they are")
        self._scale_tables(tables, affine[0])
        self._shift_stream(site, affine[1])
        self.report.folded.append(site.name)

    def _fold_into_writer(self, site: NormSite, affine: tuple) -> None:
        """Fold a norm at the end of a sublayer into the linear layer in front of it."""
        writing = self.stream.writers_before(site)
        gain, shift = affine
        if writing.obstacle or len(writing.linears) != 1:
            return self._keep(site, gain, shift, writing.obstacle or "no linear layer stands right in front of it")
        self._scale_outputs(writing.linears[0], 1 / gain)
        self._add_bias(writing.linears[0], shift)
        self.report.folded.append(site.name)

    def _fold_chain(self, sites: list[NormSite]) -> None:
        """Fold the norms of the residual stream `x = scale ⊙ s`, where s is what the folded model computes."""
        maps = [self._map(site) for site in sites]
        scale = torch.ones(norm_width(sites[0].module), dtype=torch.float64)
        folded_in_a_row = 0
        for index, site in enumerate(sites):
            if index:
                self._scale_inputs(self.stream.readers_before(site).linears, scale)
                for writer in self.stream.writers(self.stream.sum_before(site)).linears:
                    self._scale_outputs(writer, scale)
            if maps[index] is None:
                continue
            gain, shift = maps[index]
            if self._is_optional(site):
                self._keep(site, gain, shift / scale, "without an encoder it is left out")  # the scale stays
                continue
            rest = zip(sites[index + 1 :], maps[index + 1 :], strict=True)
            following = [(other, affine) for other, affine in rest if affine is None or not self._is_optional(other)]
            scale = gain * scale
            as_it_is = self._reason_for_x(site, sites[index + 1 :], following)
            reason, tables = as_it_is or self._misfit(scale), self._tables(site)
            reason = reason or self._reason_for_shift(site)
            folded_in_a_row += 1
            if not reason and folded_in_a_row == self.affine_every:
                reason = f"one norm in {self.affine_every} evens out the scales of the stream"
            if reason or tables:
                folded_in_a_row = 0
                new = torch.ones_like(scale) if as_it_is else self._even(site, following)
                if tables:
                    self._scale_tables(tables, scale / new)
                else:
                    self._keep(site, scale / new, shift / new, reason)
                scale = new
            if tables or not reason:
                self._shift_stream(site, shift / scale)
                self.report.folded.append(site.name)
        if not self._obstacle(reading := self.stream.readers(sites[-1])) and not reading.sums:
            self._scale_inputs(reading.linears, scale)

    def _reason_for_x(self, site: NormSite, rest: list[NormSite], following: list[tuple]) -> str | None:
        """Why x itself is needed behind a norm of the stream that has these norms, and maps, `following` it."""
        reading = self.stream.readers(site)
        if not rest:
            return self._obstacle(reading)
        if reading.obstacle or len(reading.sums) != 1:
            return reading.obstacle or "several residual sums read it"
        if obstacle := self.stream.writers(self.stream.sum_before(rest[0])).obstacle:
            return obstacle
        if not following:
            return self._obstacle(self.stream.readers(rest[-1]))
        return "the LayerNorm after the next sublayer stays" if following[0][1] is None else None

    def _reason_for_shift(self, site: NormSite) -> str | None:
        """Why nothing can be added to the stream in front of a norm."""
        total = self.stream.sum_before(site)
        if total is None:
            return None if self._table_of_shift(site) else "the embeddings in front of it are needed as they are"
        writing = self.stream.writers(total)
        return writing.obstacle or (None if writing.linears else "no linear layer writes to it")

    def _is_optional(self, site: NormSite) -> bool:
        """Whether the sublayer runs only where the decoder is given the output of an encoder."""
        return site.sublayer == "cross_attention" and not self.model.config.is_encoder_decoder

    def _map(self, site: NormSite) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not isinstance(site.module, Norm):
            self.report.kept[site.name] = "it was not swapped"
            return None
        gain, shift = (value.to("cpu", torch.float64) for value in site.module.affine_map())
        if not (gain.isfinite().all() and shift.isfinite().all()):
            raise ValueError(f"{site.name} has statistics or gains that are not finite: calibrate or train it first.")
        return gain, shift

    def _keep(self, site: NormSite, gain: torch.Tensor, shift: torch.Tensor, reason: str) -> None:
        self.affines[site.name] = gain, shift
        self.report.kept[site.name] = reason

    def _obstacle(self, reading: Reading) -> str | None:
        """Why what `reading` reads has to stay as it is."""
        if reading.obstacle or not reading.linears:
            return reading.obstacle or "hidden states leave the model here"
        tied = [name for name in reading.linears if name in self.tied]
        return f"{tied[0]} shares its weights with the embeddings" if tied else None

    def _misfit(self, scale: torch.Tensor) -> str | None:
        """Why `scale` cannot be that of the stream."""
        if zeros := (scale == 0).sum().item():
            return f"{zeros} of its gains are 0"
        low, high = _range_of(self.dtype)
        slack = 1 + 1e-9  # of rounding: a scale may have been chosen at an end of the range
        if ((scale.abs() * slack < low) | (scale.abs() > high * slack)).any():
            return f"the stream would leave the range of {_name(self.dtype)} without it"
        return None

    def _even(self, site: NormSite, following: list[tuple]) -> torch.Tensor:
        """A scale, free to choose, with which the channels come out as even as the range of the dtype allows.

        Even channels lose least where one scale of 8 bits serves all of them (SmoothQuant, arXiv 2211.10438).
        """
        low, high = _range_of(self.dtype)
        even = self._even_scale(site)
        product = smallest = largest = torch.ones_like(even)
        logarithms = [even.log()]
        for other, affine in following[: self.affine_every and self.affine_every - 1]:
            if affine is None or (affine[0] == 0).any():
                break
            product = product * affine[0].abs()
            bounds = torch.minimum(smallest, product), torch.maximum(largest, product)
            if (bounds[1] / bounds[0] > high / low).any():
                break
            smallest, largest = bounds
            logarithms.append(self._even_scale(other).log() - product.log())
        return torch.stack(logarithms).mean(0).exp().clamp(low / smallest, high / largest)

    def _even_scale(self, site: NormSite) -> torch.Tensor:
        """The scale of the stream behind a norm that makes its channels, and the weights that read them, even.

        A norm with statistics tells how large its outputs are; those of an affine map count as equally large.
        """
        norm, size = site.module, torch.ones(norm_width(site.module), dtype=torch.float64)
        if not isinstance(norm, Affine):
            size = _DEVIATIONS * norm.weight.to("cpu", torch.float64).abs()
            size = size if norm.bias is None else size + norm.bias.to("cpu", torch.float64).abs()
        weights = [self._linear(name)[0].abs().amax(0) for name in self.stream.readers(site).linears]
        weight = torch.stack(weights).amax(0) if weights else torch.ones_like(size)
        return (_positive(size) / _positive(weight)).sqrt()

    def _tables(self, site: NormSite) -> list[str]:
        """The embedding tables in front of a norm, if there are some and nothing else needs them as they are."""
        tables = self._plain_tables(site)
        return tables if not self.tied and len(tables) == len(self.stream.writers_before(site).tables) else []

    def _plain_tables(self, site: NormSite) -> list[str]:
        """The embedding tables in front of a norm that do no more than look up, and have their weights alone."""
        writing = self.stream.writers_before(site)
        if site.sublayer != "embedding" or writing.obstacle or writing.linears:
            return []
        shared = self.model.get_output_embeddings()
        modules = {name: self.model.get_submodule(name) for name in writing.tables}
        return [
            name
            for name, table in modules.items()
            if type(table) is nn.Embedding
            and not has_hooks(table)
            and not (self.tied and shared is not None and table.weight is shared.weight)
        ]

    def _table_of_shift(self, site: NormSite) -> str | None:
        """The smallest table in front of a norm: each token reads one of its rows."""
        names = self._plain_tables(site)
        return min(names, key=lambda name: self.model.get_submodule(name).num_embeddings, default=None)

    def _scale_tables(self, names: list[str], gain: torch.Tensor) -> None:
        for name in names:
            self.weights[name] = self.model.get_submodule(name).weight.to("cpu", torch.float64) * gain

    def _shift_stream(self, site: NormSite, shift: torch.Tensor) -> None:
        """Add `shift` to every token where the norm was: with the sublayer's output, or with the smallest table."""
        total = self.stream.sum_before(site)
        if total is not None:
            return self._add_bias(self.stream.writers(total).linears[-1], shift)
        name = self._table_of_shift(site)
        table = self.model.get_submodule(name).weight.to("cpu", torch.float64)
        self.weights[name] = self.weights.get(name, table) + shift

    def _add_bias(self, name: str, shift: torch.Tensor) -> None:
        _, bias = self._linear(name)
        if bias is not None or (shift != 0).any():
            self.biases[name] = shift if bias is None else bias + shift

    def _scale_inputs(self, names: tuple[str, ...], gain: torch.Tensor, shift: torch.Tensor | None = None) -> None:
        for name in names:
            weight, bias = self._linear(name)
            if shift is not None and (bias is not None or (shift != 0).any()):
                self.biases[name] = (0 if bias is None else bias) + weight @ shift
            self.weights[name] = weight * gain

    def _scale_outputs(self, name: str, scale: torch.Tensor) -> None:
        weight, bias = self._linear(name)
        self.weights[name] = weight / scale[:, None]
        if bias is not None:
            self.biases[name] = bias / scale

    def _linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = self.model.get_submodule(name)
        if reason := obstacle_of_linear(module):
            raise ValueError(f"{name} {reason}, which folding would not see: {PLAIN} first.")
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        bias = None if module.bias is None else module.bias.to("cpu", torch.float64)
        return self.weights.get(name, weight.to("cpu", torch.float64)), self.biases.get(name, bias)

    def _affine(self, model: PreTrainedModel, name: str) -> Affine:
        old = model.get_submodule(name)
        new = Affine(old.num_features, device=old.weight.device, dtype=old.weight.dtype)
        new.stock, vars(new)["replaced"] = old.stock, old.replaced
        for parameter, value in zip((new.weight, new.bias), self.affines[name], strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(old.weight.requires_grad)
        return new.train(old.training)

    def _check_range(self) -> None:
        values = [(name, value) for table in (self.weights, self.biases) for name, value in table.items()]
        values += [(name, value) for name, pair in self.affines.items() for value in pair]
        for name, value in values:
            dtype = self.model.get_submodule(name).weight.dtype
            if not value.to(dtype).isfinite().all():
                raise ValueError(
                    f"Folded, {name} would leave the range of {_name(dtype)}: use a wider dtype, as in model.float()."
                )


def _check_norms(model: PreTrainedModel) -> None:
    sites = {site.name: site.module for site in find_norms(model)}
    for name, norm in model.named_modules():
        if not isinstance(norm, Norm):
            continue
        if name not in sites:
            raise ValueError(
                f"The forward does not call the norm {name}, as one of an adapter that is out of use: merge the "
                "adapter into the model, or remove it, first."
            )
        if norm.affine_map() is None:
            raise ValueError(
                f"{name}, a {norm.norm_name} ({norm.extra_repr()}), {norm.obstacle_to_affine()}: fold a "
                "model of batchnorm or rbn without center_tokens, pnv, or powernorm with group_scaling=False."
            )
        if has_hooks(norm):
            raise ValueError(f"{name} has hooks, which would go with it: remove them first.")


def _positive(sizes: torch.Tensor) -> torch.Tensor:
    """Sizes of channels; those below a thousandth of the mean are raised to it."""
    return sizes.clamp(min=sizes.mean().item() / 1000 or 1.0)


def _range_of(dtype: torch.dtype) -> tuple[float, float]:
    """Scales by which weights of a usual size can be multiplied and divided without loss."""
    info = torch.finfo(dtype)
    return info.tiny**0.5, info.max**0.5


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Rehearsal(_Plan):
    """A plan that reads no weight and computes nothing: which norms could go if all of them were affine."""

    def _map(self, site: NormSite) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not isinstance(site.module, Norm) and site.sublayer in ASIDE:
            self.report.kept[site.name] = "it is not swapped unless it is named"
            return None
        ones = torch.ones(norm_width(site.module), dtype=torch.float64)
        return ones, ones

    def _even_scale(self, site: NormSite) -> torch.Tensor:
        return torch.ones(norm_width(site.module), dtype=torch.float64)

    def _scale_tables(self, names: list[str], gain: torch.Tensor) -> None:
        pass

    def _shift_stream(self, site: NormSite, shift: torch.Tensor) -> None:
        pass

    def _add_bias(self, name: str, shift: torch.Tensor) -> None:
        self._check(name)

    def _scale_inputs(self, names: tuple[str, ...], gain: torch.Tensor, shift: torch.Tensor | None = None) -> None:
        for name in names:
            self._check(name)

    def _scale_outputs(self, name: str, scale: torch.Tensor) -> None:
        self._check(name)

    def _check(self, name: str) -> None:
        if reason := obstacle_of_linear(self.model.get_submodule(name)):
            raise ValueError(f"{name} {reason}")


def rehearse_folding(model: PreTrainedModel) -> dict[str, str | None]:
    """Why each norm of a model, swapped or not, would stay when the model is swapped and folded; `None` if it can go.

    Raises:
        ValueError: when the model could not be folded at all, with the reason.
    """
    plan = _Rehearsal(model, untie=False, dtype=torch.float16)
    return {site.name: plan.report.kept.get(site.name) for site in plan.sites}
