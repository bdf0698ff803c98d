"""Gradients of every layer at a point of training, and how they depend on the depth of a model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForTokenClassification, PreTrainedModel

from hf_normswap.conversion.sequential import run_model
from hf_normswap.core.model_state import check_whole, unwrap
from hf_normswap.core.residual_stream import sublayer_of
from hf_normswap.core.statistics import evaluating, norm_penalty, observing, statistic_norms
from hf_normswap.modeling.norm_sites import find_norms, format_table
from hf_normswap.modeling.norms import NormSwapConfig
from hf_normswap.modeling.powernorm import PowerNorm
from hf_normswap.placement import set_norm_placement
from hf_normswap.swap import swap_norm


@dataclass(frozen=True)
class GradientNorm:
    """The L2 norm of the gradient of a group of parameters.

    Attributes:
        stack (`str`, *optional*): `"encoder"` or `"decoder"`; `None` outside the blocks.
        layer (`int`, *optional*): index of the block; `None` outside the blocks.
        group (`str`): `"attention"`, `"cross_attention"`, `"ffn"`, `"norm"`, `"embedding"` or `"head"`.
        value (`float`): `‖∇‖₂` over all parameters of the group.
        parameters (`int`): so many numbers.
    """

    stack: str | None
    layer: int | None
    group: str
    value: float
    parameters: int


class GradientReport(list[GradientNorm]):
    """A list of [`GradientNorm`] that prints as a table."""

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        cells = [(item.stack, item.layer, item.group, f"{item.value:.4g}", item.parameters) for item in self]
        return [("stack", "layer", "group", "gradient", "parameters"), *cells]

    def __str__(self):
        return format_table(self.rows())


def gradient_norms(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> GradientReport:
    """Norms of the gradient of the loss on `batch`, block by block and sublayer by sublayer.

    The loss is that of training, with the penalty of RBN, without dropout: norms use the statistics of the batch. The
    model is as before then, with its gradients and buffers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            with a head that returns a loss, swapped or not, wrapped as in [`measure_tid`].
        batch (`dict`): inputs of the model, with labels.

    Returns:
        [`GradientReport`]: print it for a table.

    Raises:
        ValueError: when the model returns no loss for the batch, or is offloaded.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import gradient_norms
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> batch = {"input_ids": torch.randint(9, (4, 6)), "labels": torch.tensor([0, 1, 1, 0])}
    >>> report = gradient_norms(BertForSequenceClassification(config), batch)
    >>> [(item.layer, item.group) for item in report]
    [(None, 'embedding'), (None, 'norm'), (0, 'attention'), (0, 'norm'), (0, 'ffn'), (None, 'head')]

    ```
    """
    model = unwrap(model)
    check_whole(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, _gradients(model, batch, list(named.values())), strict=True))
    groups = _groups(model)
    squares: dict[tuple, list] = {}
    for name, gradient in gradients.items():
        if gradient is not None:
            entry = squares.setdefault(groups[name], [0.0, 0])
            entry[0] += gradient.double().square().sum()
            entry[1] += gradient.numel()
    return GradientReport(GradientNorm(*group, math.sqrt(square), count) for group, (square, count) in squares.items())


def _gradients(model, batch: dict, parameters: list) -> tuple:
    with evaluating(model), observing(statistic_norms(model)), torch.enable_grad():
        loss = getattr(run_model(model, batch), "loss", None)
        if loss is None:
            raise ValueError("The model returns no loss for this batch: pass a model with a head, and labels.")
        return torch.autograd.grad(loss + norm_penalty(model), parameters, allow_unused=True)


def _groups(model) -> dict[str, tuple]:
    """`(stack, layer, group)` of every parameter by its name."""
    groups = {}
    sites = find_norms(model)
    linears = {}
    for site in sites:
        if site.block:
            sublayer = sublayer_of(model, site)
            for name in (*sublayer.readers, *sublayer.source_readers, sublayer.writer):
                linears[name] = site.stack, site.layer, site.sublayer
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            site = next((site for site in sites if site.name == module_name), None)
            if site is not None:
                group = (site.stack if site.block else None), site.layer, "norm"
            elif isinstance(module, nn.Embedding):
                group = None, None, "embedding"
            else:
                group = linears.get(module_name, (None, None, "head"))
            groups[f"{module_name}.{name}".lstrip(".")] = group
    return groups


@dataclass(frozen=True)
class DepthSlope:
    """How the gradient of the last feed-forward network depends on the depth at initialisation.

    Attributes:
        norm (`str`), placement (`str`): of the blocks.
        slope (`float`): of `log ‖∂L/∂W₂‖` against `log L`, over all depths and seeds.
        error (`float`): its standard error.
        gradients (`dict[int, list[float]]`): the gradients, by depth, one for each seed.
    """

    norm: str
    placement: str
    slope: float
    error: float
    gradients: dict[int, list[float]]


class DepthStudy(list[DepthSlope]):
    """A list of [`DepthSlope`] that prints as a table."""

    def rows(self) -> list[tuple]:
        """The cells of the table, the heading first."""
        depths = list(self[0].gradients)
        heading = ("norm", "placement", "slope", *(f"L={depth}" for depth in depths))
        cells = [
            (
                item.norm,
                item.placement,
                f"{item.slope:+.2f} ± {item.error:.2f}",
                *(f"{sum(values) / len(values):.4g}" for values in item.gradients.values()),
            )
            for item in self
        ]
        return [heading, *cells]

    def __str__(self):
        return format_table(self.rows())


def study_depth(
    norms: Iterable[str | NormSwapConfig] = ("layernorm", "batchnorm", "rbn", "pnv"),
    *,
    placements: Iterable[str] = ("post", "pre"),
    depths: Iterable[int] = (2, 4, 8, 16),
    width: int = 128,
    seeds: int = 4,
) -> DepthStudy:
    """The gradient of the last feed-forward layer at initialisation, against the depth of the model.

    With LayerNorm it does not depend on the depth L in the post placement, and falls as `1/√L` in the pre placement
    (Xiong et al., 2020, arXiv 2002.04745, theorem 1): slopes 0 and −0.5 in logarithms. The conditions are those of the
    theorem: weights of the blocks drawn from `N(0, 1/width)`, feed-forward networks as wide as the model, random
    tokens and labels. PowerNorm takes part as during its warm-up, when it is PN-V: with its first running values it
    would not normalise.

    Args:
        norms (list of `str` or [`NormSwapConfig`], *optional*): norms of the blocks, and the final one.
        placements (list of `str`, *optional*): `"post"`, `"pre"` or both.
        depths (list of `int`, *optional*): numbers of blocks.
        width (`int`, *optional*, defaults to 128): channels of the model.
        seeds (`int`, *optional*, defaults to 4): models for each depth.

    Raises:
        ValueError: when there are fewer than two depths, or a norm or a placement is unknown.

    Returns:
        [`DepthStudy`]: a [`DepthSlope`] for each norm and placement; print it for a table.
    """
    norms, placements = [NormSwapConfig.of(norm) for norm in norms], list(placements)
    depths = sorted(set(depths))
    if len(depths) < 2:
        raise ValueError(f"A slope is between two depths at least, not of {depths}: give more of them.")
    cases = [(norm, placement) for norm in norms for placement in placements]
    study = DepthStudy()
    with tqdm(total=len(cases) * len(depths) * seeds, desc="Models") as progress:
        for norm, placement in cases:
            gradients = {}
            for depth in depths:
                gradients[depth] = []
                for seed in range(seeds):
                    gradients[depth].append(_last_gradient(norm, placement, depth, width, seed))
                    progress.update()
            slope, error = _fit_line(
                [math.log(depth) for depth in depths for _ in range(seeds)],
                [math.log(value) for values in gradients.values() for value in values],
            )
            study.append(DepthSlope(norm.norm, placement, slope, error, gradients))
    return study


_TOKENS, _LABELS = 200, 64


def _last_gradient(norm: NormSwapConfig, placement: str, depth: int, width: int, seed: int) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=_TOKENS,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=1,
            intermediate_size=width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=_LABELS,
        )
        model = set_norm_placement(BertForTokenClassification(config), placement)
        for weight in model.bert.encoder.layer.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=width**-0.5)
        swap_norm(model, norm, where=["blocks", "final"] if placement == "pre" else "blocks")
        for module in model.modules():
            if isinstance(module, PowerNorm):
                module.warmup_steps = 1
        ids = torch.randint(_TOKENS, (16, 16))
        batch = {"input_ids": ids, "labels": torch.randint(_LABELS, ids.shape)}
    weight = model.bert.encoder.layer[-1].output.dense.weight
    return _gradients(model.train(), batch, [weight])[0].norm().item()


def _fit_line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (xs, ys))
    x = x - x.mean()
    slope = (x @ y) / (x @ x)
    residual = y - y.mean() - slope * x
    return slope.item(), ((residual @ residual) / (len(xs) - 2) / (x @ x)).sqrt().item()
