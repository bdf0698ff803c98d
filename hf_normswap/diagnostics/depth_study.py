"""How the gradient at the last layer grows with the depth of a new model, for each norm and placement."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import BertConfig, BertForTokenClassification

from hf_normswap.core.norm_sites import format_table
from hf_normswap.modeling.block_placement import linear_of
from hf_normswap.modeling.configuration_normswap import NORMS_IN_FRONT, SCALED_PLACEMENTS
from hf_normswap.modeling.norms import NormSwapConfig
from hf_normswap.modeling.powernorm import PowerNorm
from hf_normswap.placement import set_norm_placement
from hf_normswap.swap import swap_norm

from .gradients import raw_gradients


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
        placements (list of `str`, *optional*): those of [`set_norm_placement`], with their factors for weights.
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
        if placement in SCALED_PLACEMENTS:
            set_norm_placement(model, placement, scale_weights=True)
        swap_norm(model, norm, where=["blocks", "final"] if placement in NORMS_IN_FRONT else "blocks")
        for module in model.modules():
            if isinstance(module, PowerNorm):
                module.warmup_steps = 1
        ids = torch.randint(_TOKENS, (16, 16))
        batch = {"input_ids": ids, "labels": torch.randint(_LABELS, ids.shape)}
    weight = linear_of(model.bert.encoder.layer[-1].output, "dense").weight
    return raw_gradients(model.train(), batch, [weight])[0].norm().item()


def _fit_line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (xs, ys))
    x = x - x.mean()
    slope = (x @ y) / (x @ x)
    residual = y - y.mean() - slope * x
    return slope.item(), ((residual @ residual) / (len(xs) - 2) / (x @ x)).sqrt().item()
