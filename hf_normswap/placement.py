"""Pre-LN and Post-LN: norms in front of the sublayers, or behind their residual sums."""

from transformers import PreTrainedModel
from transformers.utils import logging

from .core.model_state import check_model, restore_transformers_class, set_recorded_swap
from .core.norm_sites import NormSite, find_norms
from .modeling.block_placement import place_blocks
from .modeling.configuration_normswap import PLACEMENTS, STOCK_PLACEMENTS, family_of, placement_of
from .modeling.record import recorded_swap


logger = logging.get_logger(__name__)


def set_norm_placement(model: PreTrainedModel, placement: str, *, drop_final: bool = False) -> PreTrainedModel:
    """Move the norms of the blocks of a BERT, RoBERTa, Marian or GPT-2 model, in place.

    Post, as in BERT, RoBERTa and Marian, is `x ← N(x + F(x))`. Pre, as in GPT-2, is `x ← x + F(N(x))`, with a final
    norm behind the last block of each stack (Xiong et al., 2020, arXiv 2002.04745). Every norm, swapped or not, keeps
    its name, its parameters and its statistics. The final norm is a LayerNorm with gain 1 and shift 0, which
    `swap_norm(model, norm, where="final")` swaps; its parameters are new to an optimizer built before. The placement
    is recorded in `model.config.norm_swap`, saved and loaded.

    A pretrained model computes something else in the other placement, and has to be trained anew.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, before it is wrapped or compiled.
        placement (`str`): `"pre"` or `"post"`.
        drop_final (`bool`, *optional*, defaults to `False`):
            whether a final norm whose gain is not 1 or whose shift is not 0 may be lost, as post has none.

    Returns:
        The same model.

    Raises:
        ValueError: when the placement is unknown, a trained final norm would be lost, or the model is wrapped,
            offloaded, folded or of another family. Nothing was changed then.

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
    if placement_of(model.config) == placement:
        return model
    lost = {site.path for site in find_norms(model) if site.sublayer == "final"} if placement == "post" else set()
    trained = [site.name for site in find_norms(model) if site.path in lost and not _is_fresh(site)]
    if trained and not drop_final:
        raise ValueError(
            f"{trained[0]} has a gain that is not 1 or a shift that is not 0, and a post-norm model has no final "
            "norm: pass drop_final=True to lose it."
        )
    if model.name_or_path:
        logger.warning(
            f"A pretrained model with its norms moved to {placement} computes something else: train it anew."
        )
    place_blocks(model, placement)
    record = _without(recorded_swap(model), lost)
    if placement != STOCK_PLACEMENTS[family_of(model.config.model_type)]:
        set_recorded_swap(model, {**record, "placement": placement})
    elif record["norms"]:
        set_recorded_swap(model, {name: value for name, value in record.items() if name != "placement"})
    else:
        restore_transformers_class(model)
    return model


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
