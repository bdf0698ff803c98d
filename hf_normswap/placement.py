"""Where the norms of the blocks stand: Post-LN, Pre-LN, DeepNorm, sub-LN, Peri-LN and rSkip-LN."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .core.model_state import (
    check_model,
    obstacle_of_linear,
    outside_modes,
    refuse_meta,
    restore_transformers_class,
    set_recorded_swap,
)
from .core.norm_sites import NormSite, find_norms
from .modeling.block_placement import FAMILIES, added_norms, branch_scales, linear_of, parts_of, place_blocks
from .modeling.configuration_normswap import PLACEMENTS, SCALED_PLACEMENTS, STOCK_PLACEMENTS, family_of, placement_of
from .modeling.model_norms import path_of
from .modeling.record import changed_linears, recorded_swap


logger = logging.get_logger(__name__)


@outside_modes
def set_norm_placement(
    model: PreTrainedModel, placement: str, *, drop_final: bool = False, scale_weights: bool = False
) -> PreTrainedModel:
    """Move the norms of the blocks of a BERT, RoBERTa, ELECTRA, Marian, BART or GPT-2 model, in place.

    With a sublayer F and norms N, the stream `x` becomes:

    | `placement` | | final norm | source |
    |---|---|---|---|
    | `"post"` | `N(x + F(x))`, as in all of them but GPT-2 | no | Vaswani et al., 2017 |
    | `"pre"` | `x + F(N(x))`, as in GPT-2 | yes | Xiong et al., 2020, arXiv 2002.04745 |
    | `"deep"` | `N(α·x + F(x))` | no | DeepNorm, arXiv 2203.00555 |
    | `"sub"` | `x + F(N(x))`, with a further norm in front of the last linear layer of F | yes | Magneto, 2210.06423 |
    | `"peri"` | `x + N(F(N(x)))` | yes | Peri-LN, arXiv 2502.02732 |
    | `"rskip"` | `N(x + N(x + F(x)))` | no | rSkip-LN, arXiv 2105.07205 |

    XLM-RoBERTa, CamemBERT and ERNIE have the blocks of RoBERTa, and are taken, too.

    α follows from the number of blocks, as in the paper. Every norm, swapped or not, keeps its name, its parameters
    and its statistics. A norm that a placement has besides is a LayerNorm with gain 1 and shift 0, which [`swap_norm`]
    swaps as any other (the final one with `where="final"`); its parameters are new to an optimizer built before. It
    goes away in a placement without it. The placement is recorded in `model.config.norm_swap`, saved and loaded.

    A pretrained model computes something else in another placement, and has to be trained anew.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, before it is wrapped or compiled.
        placement (`str`): `"post"`, `"pre"`, `"deep"`, `"sub"`, `"peri"` or `"rskip"`.
        drop_final (`bool`, *optional*, defaults to `False`):
            whether a final norm, or another one that the new placement has not, may be lost where its gain is not 1
            or its shift is not 0.
        scale_weights (`bool`, *optional*, defaults to `False`):
            whether to multiply weights by the factor of the initialisation that belongs to `"deep"` (β of DeepNorm)
            or `"sub"` (γ of Magneto): those of the values, of the output of each attention, and of both layers of
            each feed-forward network. It is meant for a new model, once, and is refused for a pretrained one, whose
            weights are no initial ones. The papers start from `torch.nn.init.xavier_normal_`, transformers from a
            fixed standard deviation.

    Returns:
        The same model.

    Raises:
        ValueError: when the placement is unknown or has no factor for weights, a trained norm would be lost, or the
            model is wrapped, offloaded, folded or of another family. Nothing was changed then.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import find_norms, set_norm_placement
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = set_norm_placement(BertModel(config), "pre")
    >>> [(site.sublayer, site.placement) for site in find_norms(model)]
    [('embedding', None), ('attention', 'pre'), ('ffn', 'pre'), ('final', None)]

    ```
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is one of {', '.join(PLACEMENTS)}, not {placement!r}.")
    check_model(model)
    if family_of(model.config.model_type or "") not in STOCK_PLACEMENTS:
        raise ValueError(
            f"The norms of {', '.join(STOCK_PLACEMENTS)} models can be moved, not those of a {type(model).__name__}: "
            "pass a model of these families."
        )
    if scale_weights:
        _check_scaling(model, placement)
    before = placement_of(model.config)
    if before != placement:
        _move_norms(model, before, placement, drop_final)
    if scale_weights:
        _scale_weights(model, placement)
    return model


def _move_norms(model: PreTrainedModel, before: str, placement: str, drop: bool) -> None:
    lost = {path_of(model, name) for name in added_norms(model, before).keys() - added_norms(model, placement).keys()}
    trained = [site.name for site in find_norms(model) if site.path in lost and not _is_fresh(site)]
    if trained and not drop:
        raise ValueError(
            f"{trained[0]} has a gain that is not 1 or a shift that is not 0, and the placement {placement} has no "
            "norm there: pass drop_final=True to lose it."
        )
    if model.name_or_path:
        logger.warning(
            f"A pretrained model with its norms moved to {placement} computes something else: train it anew."
        )
    place_blocks(model, placement)
    record = _without(recorded_swap(model), lost)
    if linears := changed_linears(model):
        record["linears"] = linears  # one that gets a norm in front of it has another path
    if placement != STOCK_PLACEMENTS[family_of(model.config.model_type)]:
        set_recorded_swap(model, {**record, "placement": placement})
    elif record["norms"]:
        set_recorded_swap(model, {name: value for name, value in record.items() if name != "placement"})
    else:
        restore_transformers_class(model)


def _check_scaling(model: PreTrainedModel, placement: str) -> None:
    if placement not in SCALED_PLACEMENTS:
        raise ValueError(f"scale_weights is for the placements deep and sub, not for {placement}: leave it out.")
    if model.name_or_path:
        raise ValueError(
            "scale_weights is for the initial weights of a new model, and this one is pretrained: leave it out, or "
            "build a new model from the configuration."
        )
    refuse_meta(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (obstacle := obstacle_of_linear(module)):
            raise ValueError(
                f"{name} {obstacle}, and its weight cannot be scaled: scale the weights of a plain model."
            )


@torch.no_grad()
def _scale_weights(model: PreTrainedModel, placement: str) -> None:
    """Multiply initial weights by the factor of a placement."""
    family, width = FAMILIES[family_of(model.config.model_type)], model.config.hidden_size
    scales = {module: scale for block, _, scale in branch_scales(model, placement) for module in block.modules()}
    for linears in (family.last_linears, family.other_linears):
        for module, part in parts_of(model, linears):
            weight = linear_of(module, linears[part]).weight
            # GPT-2 has queries, keys and values in one layer, the values last.
            (weight[:, -width:] if linears[part] == "c_attn" else weight).mul_(scales[module])


def _without(record: dict, paths: set[str]) -> dict:
    """A record of a swap without what it says of `paths`."""
    norms = [{**entry, "modules": [p for p in entry["modules"] if p not in paths]} for entry in record["norms"]]
    of_paths = {
        name: {path: value for path, value in record[name].items() if path not in paths}
        for name in ("calibration", "layer_norm_share")
        if name in record
    }
    return {**record, **of_paths, "norms": [entry for entry in norms if entry["modules"]]}


def _is_fresh(site: NormSite) -> bool:
    norm = site.module
    if norm.weight.is_meta:  # nothing is lost: weights come later
        return True
    return bool((norm.weight == 1).all()) and (norm.bias is None or not norm.bias.any())
