"""One step of a conversion: a norm, or a linear layer between norms, made to do what it did in the original model."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_normswap.core.model_state import check_whole, refuse_training
from hf_normswap.core.norm_sites import NormSite, find_norms, format_table
from hf_normswap.core.statistics import observing
from hf_normswap.modeling.backends import promote
from hf_normswap.modeling.base import BatchStatisticNorm
from hf_normswap.modeling.moments import Moments, merge_over_ranks, sum_over_ranks
from hf_normswap.modeling.padding_mask import padding_mask

from .least_squares import AffineFit, fit_affine, fit_correction, pooled_moments
from .predictions import both, count_of_tokens, fit_to_predictions, logits_layer, tokens_of_predictions
from .sequential import SequentialRunner


# A token whose root mean square is this many times the (geometric) mean over all tokens is an attention sink, as is
# the first one in GPT-2. No affine map serves it and the others equally well. It stays in the fits all the same: left
# out, it leaves the norm so much too large that what attends to it suffers more.
SINK_RATIO = 10.0
# Tokens that decide between candidates for the other parameters of a norm. Each candidate takes a pass over them.
CANDIDATE_TOKENS = 2048


@dataclass(frozen=True)
class NormFit:
    """How well a calibrated norm reproduces the LayerNorm that it replaced.

    Attributes:
        name (`str`): path of the norm in the model.
        r2 (`float`): share of the variance of the LayerNorm's output that is explained.
        error (`float`): `‖y − LN‖₂ / ‖LN‖₂` over all tokens and channels of the fit.
        tokens (`int`): real tokens in the fit.
        sinks (`int`): attention sinks among them, tokens of ten times the usual size.
        is_last (`bool`):
            whether a linear layer makes predictions of its output, and it was fitted to these; so its R² is lower.
    """

    name: str
    r2: float
    error: float
    tokens: int
    sinks: int
    is_last: bool = False


class CalibrationReport(list[NormFit]):
    """A list of [`NormFit`], in the order of the forward, that prints as a table."""

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        names = [f"{fit.name} (fitted to the predictions)" if fit.is_last else fit.name for fit in self]
        fits = [
            (f"{fit.r2:.4f}", f"{fit.error:.4f}", fit.tokens, fit.sinks, name)
            for fit, name in zip(self, names, strict=True)
        ]
        return [("R²", "error", "tokens", "sinks", "name"), *fits]

    def __str__(self):
        return format_table(self.rows())


class Conversion:
    """Converts the model of `student` step by step, beside the original one of `teacher`.

    Args:
        student ([`SequentialRunner`]): through the model that is converted.
        teacher ([`SequentialRunner`]): through the model with its LayerNorms, at the same step.
        predictors (`dict[str, str]`, *optional*): for a norm, the linear layer that makes logits of its output.
    """

    def __init__(self, student: SequentialRunner, teacher: SequentialRunner, predictors: dict[str, str] | None = None):
        self.student, self.teacher, self.predictors = student, teacher, predictors or {}
        self.device = student.model.device
        self._counted = {
            name: tokens_of_predictions(teacher.model, teacher.batches, name, linear)
            for name, linear in self.predictors.items()
        }

    def fit_norm(self, site: NormSite, feeding: str | None = None) -> NormFit:
        """Statistics, gain and shift of a norm; `feeding` is the linear layer whose output it reads."""
        sinks = self._count_sinks(site.name)
        fit = self._fit(site)
        if feeding is not None:
            self._correct_feeding(site, feeding)
            fit = self._fit(site)
        residual, target = fit.residual.sum(), fit.target
        if site.name in self.predictors:
            self._fit_to_predictions(site, int(target.count))
            residual = self._residual(site)
        return NormFit(
            site.name,
            r2=(1 - residual / target.var.sum()).item(),
            error=(residual / target.power.sum()).sqrt().item(),
            tokens=int(target.count),
            sinks=sinks,
            is_last=site.name in self.predictors,
        )

    def correct(self, name: str) -> None:
        """Bring the outputs of a linear layer nearer to the original ones, for the inputs that it now gets."""
        linear, original = (runner.model.get_submodule(name) for runner in (self.student, self.teacher))
        self._change(name, ((x, original(t) - linear(x), mask) for x, t, mask in self._pairs(name)))

    def _correct_feeding(self, site: NormSite, name: str) -> None:
        layer_norm = self.teacher.model.get_submodule(site.name)
        # Behind the norm, where nothing else reads the stream: so the scale of the token is made up for, too.
        is_end = site.placement == "post" or site.sublayer == "final"
        affine = site.module.affine_map() if is_end else None

        def wanted(t):
            if affine is None:
                return t
            gain, shift = affine
            usable = gain.abs() > 1e-3 * gain.abs().mean()
            return torch.where(usable, (layer_norm(t) - shift) / torch.where(usable, gain, 1), t)

        pairs = zip(self.student.inputs(name), self._pairs(site.name))
        # A layer may get its tokens in one row, where the norm behind it has them row by row.
        tokens = ((_like(inputs, x), wanted(t) - x, mask) for (inputs, _), (x, t, mask) in pairs)
        change = self._change(name, tokens)
        self.student.add(site.name, (change(inputs) for inputs, _ in self.student.inputs(name)))

    def _change(self, name: str, tokens: Iterable) -> Callable:
        """Change a linear layer by a fit of `(x, residual, mask)`; returns what that adds to its outputs."""
        linear = self.student.model.get_submodule(name)
        selected = ((_select(x, mask), _select(residual, mask)) for x, residual, mask in tokens)
        weight, bias = (values.to(linear.weight.dtype) for values in fit_correction(linear, selected))
        linear.weight.add_(weight if isinstance(linear, Conv1D) else weight.T)
        if linear.bias is None:
            return lambda x: x @ weight
        linear.bias.add_(bias)
        return lambda x: x @ weight + bias

    def _fit(self, site: NormSite) -> AffineFit:
        norm = site.module
        estimate_statistics(site.name, norm, ((x, mask) for x, _, mask in self._pairs(site.name)))
        self._choose_parameters(site.name, norm)
        fit = self._fit_affine(norm, self._wanted(site.name))
        _check_finite(site.name, fit.gain, fit.shift)
        norm.weight.copy_(fit.gain)
        if norm.bias is not None:
            norm.bias.copy_(fit.shift)
        return fit

    def _fit_to_predictions(self, site: NormSite, count: int) -> None:
        norm, linear = site.module, self.predictors[site.name]
        linear = logits_layer(self.teacher.model, self.teacher.batches, site.name, linear)
        step = math.ceil(count / count_of_tokens(linear))
        tokens = [(promote(norm.weight.new_empty(0, norm.num_features)),) * 2]  # a rank may have no batch
        for x, wanted, mask in self._wanted(site.name):
            tokens.append(tuple(_select(each, mask)[::step] for each in (norm.normalize(promote(x), mask), wanted)))
        x, target = (torch.cat(parts) for parts in zip(*tokens, strict=True))
        gain, shift = fit_to_predictions(x, target, linear, norm.weight, norm.bias)
        norm.weight.copy_(gain)
        if shift is not None:
            norm.bias.copy_(shift)

    def _residual(self, site: NormSite) -> torch.Tensor:
        """Mean square of what is left, summed over channels."""
        norm = site.module
        differences = ((norm(x) - wanted, mask) for x, wanted, mask in self._wanted(site.name))
        return pooled_moments(differences, norm.num_features, self.device).power.sum()

    def _choose_parameters(self, name: str, norm: nn.Module) -> None:
        """Set the further parameters of a norm to the candidate that fits best, judged by the first batches."""
        candidates = norm.fit_candidates()
        if len(candidates) > 1:
            sample, tokens, residuals = [], 0, []
            for x, wanted, mask in self._wanted(name):
                sample.append((x, wanted, mask))
                tokens += x.numel() // x.shape[-1]
                if tokens > CANDIDATE_TOKENS:
                    break
            for candidate in candidates:
                norm.load_state_dict(candidate, strict=False)
                # A rank without a batch takes part, too: the tokens of all ranks are pooled.
                residuals.append(self._fit_affine(norm, sample).residual.sum().item())
            candidates = [candidates[residuals.index(min(residuals))]]
        for candidate in candidates:
            norm.load_state_dict(candidate, strict=False)

    def _fit_affine(self, norm: nn.Module, pairs: Iterable[tuple]) -> AffineFit:
        """Gain and shift of `norm` for tokens, what shall become of them, and masks."""
        normalized = ((norm.normalize(promote(x), mask), wanted, mask) for x, wanted, mask in pairs)
        return fit_affine(normalized, norm.num_features, self.device, norm.bias is not None)

    def _count_sinks(self, name: str) -> int:
        sizes = [(promote(x).square().mean(-1, keepdim=True).sqrt(), mask) for x, mask in self.student.inputs(name)]
        logarithms = pooled_moments(((size.clamp(min=1e-30).log(), mask) for size, mask in sizes), 1, self.device)
        limit = SINK_RATIO * logarithms.mean.exp().item()
        count = sum((_select(size, mask) > limit).sum() for size, mask in sizes)
        return int(sum_over_ranks(torch.as_tensor(count, device=self.device)))

    def _wanted(self, name: str) -> Iterator[tuple]:
        """Tokens of a norm, what its LayerNorm returns for them in the original model, and their mask."""
        layer_norm = self.teacher.model.get_submodule(name)
        for x, t, mask in self._pairs(name):
            yield x, layer_norm(t), mask

    def _pairs(self, name: str) -> Iterator[tuple]:
        """Inputs in both models, call by call, and the tokens that count."""
        pairs = zip(self.student.inputs(name), self.teacher.inputs(name))
        for ((x, mask), (t, _)), counted in zip(pairs, self._counted.get(name, itertools.repeat(None))):
            yield x, t, both(mask, counted, x)


def check_teacher(teacher, names: Iterable[str]) -> None:
    """Raises `ValueError` where `teacher` has no LayerNorm at one of `names`, or cannot be run in evaluation."""
    check_whole(teacher, role="teacher")
    refuse_training(teacher, "teacher")
    originals = {
        site.name: site.kind for site in find_norms(teacher) if not isinstance(site.module, BatchStatisticNorm)
    }
    for name in names:
        if originals.get(name) not in ("layernorm", "rmsnorm"):
            raise ValueError(f"The teacher has no LayerNorm {name}: pass a copy of the model from before the swap.")


def linears_of_blocks(model) -> dict[str, nn.Module]:
    """The linear layers of the transformer blocks by name."""
    blocks = blocks_of_norms(model)
    return {
        f"{block}.{name}": module
        for block in blocks
        for name, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def places_of_linears(model) -> dict[str, nn.Module]:
    """What stands where the blocks have their linear layers, by name: these, or what an adapter has put there."""
    places: dict[str, nn.Module] = {}
    for block in blocks_of_norms(model):
        for name, module in model.get_submodule(block).named_modules():
            is_inside = any(f"{block}.{name}".startswith(f"{place}.") for place in places)
            # In place of a layer there may be an adapter, or one with quantized weights. A router has a matrix, too.
            is_of_model = type(module).__module__.startswith("transformers.models.")
            is_linear = hasattr(module, "in_features")
            is_linear = is_linear or not is_of_model and _is_matrix(getattr(module, "weight", None))
            if is_linear and not is_inside and not isinstance(module, nn.Embedding):
                places[f"{block}.{name}"] = module
    return places


def _is_matrix(weight) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def blocks_of_norms(model) -> list[str]:
    """The transformer blocks by name."""
    return list(dict.fromkeys(site.block for site in find_norms(model) if site.block))


def estimate_statistics(name: str, norm: nn.Module, inputs: Iterable) -> None:
    """Set running statistics to those of all `(x, mask)`, of all ranks together; ν of PowerNorm stays as it is."""
    if not isinstance(norm, BatchStatisticNorm):
        return
    with observing([norm]), padding_mask(None):  # without a mask all tokens are real
        for x, mask in inputs:
            norm.forward(x, mask)
        pending = norm.pending.clone()
    moments = merge_over_ranks(Moments(pending))
    _check_finite(name, moments.packed)
    if not moments.count:
        raise ValueError(f"No real token reaches {name}: check the attention masks of the data.")
    norm.update_statistics(moments, weight=1)


def _check_finite(name: str, *values: torch.Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        raise ValueError(f"The activations that reach {name} are not finite: check the data, and the model's dtype.")


def _like(inputs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`inputs` with the tokens in the shape that those of `x` have."""
    return inputs.reshape(*x.shape[:-1], inputs.shape[-1])


def _select(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return values.flatten(0, -2) if mask is None else values[mask]
