"""Which module of which model is which norm: one declarative table, and nothing else knows a module path."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .base import Norm
from .configuration_normswap import NormSwapConfigMixin, family_of, placement_of


# model_type: prefix of the base model, and what each path (below a model with a head) is. {stack} stands for the stack
# where a model has two, {i} for the layer. In the post placement there is no final norm.
_ENCODER_LAYER = {
    "embedding": "embeddings.LayerNorm",
    "attention": "encoder.layer.{i}.attention.output.LayerNorm",
    "cross_attention": "encoder.layer.{i}.crossattention.output.LayerNorm",
    "ffn": "encoder.layer.{i}.output.LayerNorm",
    "final": "encoder.LayerNorm",
}
_SITES = {
    "bert": ("bert", _ENCODER_LAYER, {"head": "cls.predictions.transform.LayerNorm"}),
    "roberta": ("roberta", _ENCODER_LAYER, {"head": "lm_head.layer_norm"}),
    "marian": (
        "model",
        {
            "attention": "{stack}.layers.{i}.self_attn_layer_norm",
            "cross_attention": "{stack}.layers.{i}.encoder_attn_layer_norm",
            "ffn": "{stack}.layers.{i}.final_layer_norm",
            "final": "{stack}.layer_norm",
        },
        {},
    ),
    "gpt2": (
        "transformer",
        {
            "attention": "h.{i}.ln_1",
            "cross_attention": "h.{i}.ln_cross_attn",
            "ffn": "h.{i}.ln_2",
            "final": "ln_f",
        },
        {},
    ),
}

# Where the wrappers of FSDP1, of activation checkpointing and of torch.compile keep the module inside.
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# What these, and PEFT where an adapter saves a module, insert into the path of a module.
_INSERTED = re.compile(rf"\.(original_module|modules_to_save\.[^.]+|{'|'.join(WRAPPED)})(?=\.|$)")

STACKS = ("encoder", "decoder")
BLOCK_SUBLAYERS = ("attention", "cross_attention", "ffn")
OTHER_SUBLAYERS = ("embedding", "head", "final")


@dataclass(frozen=True)
class NormSite:
    """One norm of a model.

    Attributes:
        name (`str`): path of the module in this model.
        path (`str`): its path in a model with a head, the same for every head of the family; what is saved.
        module (`torch.nn.Module`): the norm.
        stack (`str`): `"encoder"` or `"decoder"`.
        sublayer (`str`): `"attention"`, `"cross_attention"`, `"ffn"`, `"embedding"`, `"head"` or `"final"`.
        layer (`int`, *optional*): index of the block; `None` outside the blocks.
        placement (`str`, *optional*): `"post"` or `"pre"`; `None` outside the blocks.
    """

    name: str
    path: str
    module: nn.Module
    stack: str
    sublayer: str
    layer: int | None
    placement: str | None

    @property
    def kind(self) -> str:
        """Registered name of the norm; `"layernorm"` for that of PyTorch."""
        return getattr(self.module, "norm_name", "layernorm")

    @property
    def block(self) -> str | None:
        """Name of the transformer block that the norm is in; `None` outside the blocks."""
        return None if self.layer is None else re.match(rf".*?\.{self.layer}(?=\.)", self.name)[0]

    def is_in(self, where: str) -> bool:
        """Whether the site belongs to `where`, one of [`where_names`]."""
        stack, _, sublayer = where.rpartition(".")
        if stack:
            return self.stack == stack and self.sublayer == sublayer
        in_block = self.sublayer in BLOCK_SUBLAYERS
        return (
            where == "all"
            or where == self.sublayer
            or (where == "blocks" and in_block)
            or (where == self.stack and in_block)
        )


class NormSites(list[NormSite]):
    """A list of [`NormSite`] that prints as a table."""

    def rows(self) -> list[tuple]:
        """Cells of the table, the first row its heading."""
        heading = ("norm", "stack", "sublayer", "layer", "placement", "name")
        return [heading, *((s.kind, s.stack, s.sublayer, s.layer, s.placement, s.name) for s in self)]

    def __str__(self):
        return format_table(self.rows())


def format_table(rows: list[tuple]) -> str:
    """Rows of cells as aligned text, the first one the heading; `None` is a dash."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def where_names() -> list[str]:
    """What `where` may name: groups, stacks, sublayers, and `stack.sublayer`."""
    pairs = [f"{stack}.{sublayer}" for stack in STACKS for sublayer in (*BLOCK_SUBLAYERS, *OTHER_SUBLAYERS)]
    return ["blocks", "all", *STACKS, *BLOCK_SUBLAYERS, *OTHER_SUBLAYERS, *pairs]


def find_norms(model: nn.Module) -> NormSites:
    """Every norm of a BERT, RoBERTa, Marian or GPT-2 model of transformers, with any head, swapped or not.

    Returns:
        `NormSites`: a list of [`NormSite`] in the order of the modules; print it for a table.

    Raises:
        ValueError: when the model is of another family, wrapped, or loaded with another copy of this code.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> from hf_normswap import find_norms
    >>> model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    >>> [site.sublayer for site in find_norms(model)]
    ['embedding', 'attention', 'ffn', 'head']

    ```
    """
    family = _family_in_table(model)
    placement = placement_of(model.config)
    one_stack = "decoder" if family == "gpt2" or getattr(model.config, "is_decoder", False) else "encoder"
    sites = NormSites()
    for name, module in active_modules(model):
        if not isinstance(module, nn.LayerNorm | Norm):
            continue
        path = path_of(model, name)
        for sublayer, pattern in _patterns(family):
            if match := pattern.fullmatch(path):
                found = match.groupdict()
                layer = int(found["i"]) if "i" in found else None
                where = placement if sublayer in BLOCK_SUBLAYERS else None
                sites.append(NormSite(name, path, module, found.get("stack", one_stack), sublayer, layer, where))
    return sites


def path_of(model: nn.Module, name: str) -> str:
    """The path in a model with a head of the module `name` of `model`, which may have none."""
    prefix = _SITES[_family_in_table(model)][0]
    return _INSERTED.sub("", name if hasattr(model, prefix) else f"{prefix}.{name}")


def active_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as `named_modules()` gives them, without those that an adapter of PEFT has put out of use.

    For each module of its `modules_to_save` it keeps the original beside a copy, and calls one of the two.

    Raises:
        ValueError: when a module is of another copy of this code.
    """
    idle = set()
    for name, module in model.named_modules():
        if module in idle:
            continue
        _check_copy(module)
        yield name, module
        copies = module._modules.get("modules_to_save")
        if isinstance(copies, nn.ModuleDict):
            names = [] if module.disable_adapters else module.active_adapters
            used = next((copies[name] for name in names if name in copies), module.original_module)
            for other in (module.original_module, *copies.values()):
                idle.update(() if other is used else other.modules())


def refuse_other_copy(model: nn.Module) -> None:
    """Raises `ValueError` where a module of `model` is of another copy of this code."""
    for module in model.modules():
        _check_copy(module)


def _check_copy(module: nn.Module) -> None:
    """Raises `ValueError` for a norm or a model of another copy of this code, such as that beside its weights.

    No function would know the norms for what they are, and all would take the model for one without them.
    """
    is_norm = hasattr(type(module), "norm_name") and not isinstance(module, Norm)
    config = module.config if isinstance(module, PreTrainedModel) else None
    is_swapped = (getattr(config, "model_type", None) or "").startswith("normswap_")
    if is_norm or (is_swapped and not isinstance(config, NormSwapConfigMixin)):
        source = type(module if is_norm else config).__module__.rpartition(".")[0]
        raise ValueError(
            f"The model was made by another copy of this code ({source}): import hf_normswap first, and load the "
            "model again."
        )


def wrapped_attribute(model: nn.Module) -> str | None:
    """Name of the one module that a wrapper such as DistributedDataParallel or `torch.compile` is around."""
    names = ("_orig_mod", "module")
    return next((name for name in names if isinstance(getattr(model, name, None), nn.Module)), None)


def is_site(model: nn.Module, path: str) -> bool:
    """Whether some model of the family of `model` can have a norm at `path`."""
    return any(pattern.fullmatch(path) for _, pattern in _patterns(_family_in_table(model)))


def _family_in_table(model: nn.Module) -> str:
    # What wraps a model may pass its configuration through, and has other module names.
    config = model.config if isinstance(model, PreTrainedModel) else None
    family = family_of(getattr(config, "model_type", "") or "")
    if family not in _SITES:
        kind, attribute = f"a {family} model" if family else type(model).__name__, wrapped_attribute(model)
        cure = f"its .{attribute}" if attribute and not family else "a model of these families"
        raise ValueError(f"Norms are known for {', '.join(_SITES)}, not for {kind}: pass {cure}.")
    return family


@functools.cache
def _patterns(family: str) -> list[tuple]:
    prefix, inside, beside = _SITES[family]
    paths = {**{sublayer: f"{prefix}.{path}" for sublayer, path in inside.items()}, **beside}
    return [(sublayer, _pattern(path)) for sublayer, path in paths.items()]


def _pattern(path: str) -> re.Pattern:
    path = re.escape(path).replace(r"\{stack\}", "(?P<stack>encoder|decoder)").replace(r"\{i\}", r"(?P<i>\d+)")
    return re.compile(path)
