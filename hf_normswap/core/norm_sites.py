"""Which module of a model is which norm: read off the graph of its forward (see graph.py), for any architecture."""

import functools
import json
import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.configuration_normswap import family_of
from hf_normswap.modeling.model_norms import (
    active_modules,
    is_norm,
    norm_width,
    path_of,
    read_norm,
    wrapped_attribute,
)
from hf_normswap.modeling.modeling_normswap import class_of_transformers, stock_class_of

from .example_inputs import example_inputs, example_source
from .graph import ADDITION, ATTENTION, NORM, WEIGHTED, Graph, Node, record_graph


STACKS = ("encoder", "decoder")
BLOCK_SUBLAYERS = ("attention", "cross_attention", "ffn")
OTHER_SUBLAYERS = ("embedding", "head", "final")
# Norms that are left alone unless they are named.
ASIDE = ("query_key", "other")
# Products of two activations: what makes a sublayer an attention.
_PRODUCTS = ("bmm", "baddbmm", "mm", "addmm")
_MIXING = "fft"
_CACHED = 64


@dataclass(frozen=True)
class NormSite:
    """One norm of a model.

    Attributes:
        name (`str`): path of the module in this model.
        path (`str`): its path in a model with a head, the same for every head of the family; what is saved.
        module (`torch.nn.Module`): the norm.
        stack (`str`): `"encoder"` or `"decoder"`.
        sublayer (`str`, *optional*):
            `"attention"`, `"cross_attention"`, `"ffn"`, `"embedding"`, `"head"` or `"final"`; `"query_key"` for a norm
            of the queries or keys of an attention, `"other"` for one beside the residual stream or between two blocks.
            `None` where the forward of the model could not be read.
        layer (`int`, *optional*):
            index of the block in its stack; `None` outside the blocks. A model of images and text counts the blocks of
            each of its parts from 0.
        placement (`str`, *optional*):
            `"post"` behind a residual sum, `"pre"` in front of a sublayer, `"sandwich"` at the end of a sublayer,
            before the sum, `"inner"` inside of one; `None` outside the blocks.
        block (`str`, *optional*): name of the transformer block that the norm is in; `None` outside the blocks.
        calls (`int`): how often one forward calls the norm.
    """

    name: str
    path: str
    module: nn.Module
    stack: str
    sublayer: str | None = None
    layer: int | None = None
    placement: str | None = None
    block: str | None = None
    calls: int = 1

    @property
    def kind(self) -> str:
        """Registered name of the norm; `"layernorm"` or `"rmsnorm"` for those of PyTorch and transformers."""
        return self.module.norm_name if isinstance(self.module, Norm) else read_norm(self.module).kind

    def is_in(self, where: str) -> bool:
        """Whether the site belongs to `where`, one of [`where_names`]."""
        stack, _, sublayer = where.rpartition(".")
        if stack:
            return self.stack == stack and self.sublayer == sublayer
        in_block = self.sublayer in BLOCK_SUBLAYERS
        return (
            (where == "all" and self.sublayer not in ASIDE)
            or where == self.sublayer
            or (where == "blocks" and in_block)
            or (where == self.stack and in_block)
        )


class NormSites(list[NormSite]):
    """A list of [`NormSite`] that prints as a table.

    Attributes:
        obstacle (`str`, *optional*): why the forward of the model could not be read, and nothing but the modules is
            known.
    """

    obstacle: str | None = None

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
    sublayers = (*BLOCK_SUBLAYERS, *OTHER_SUBLAYERS, *ASIDE)
    return ["blocks", "all", *STACKS, *sublayers, *(f"{stack}.{name}" for stack in STACKS for name in sublayers)]


def find_norms(model: nn.Module) -> NormSites:
    """Every norm of a model of transformers, of any architecture, swapped or not.

    LayerNorm and RMSNorm are found by what they compute, and their places by the graph of the model's forward, which
    runs once, without weights. Where it does not run, the sites have no sublayer, and `obstacle` says why.

    Returns:
        `NormSites`: a list of [`NormSite`] in the order of the modules; print it for a table.

    Raises:
        ValueError: when `model` is not a model of transformers, is wrapped, or comes from another copy of this code.

    Example:

    ```python
    >>> from transformers import BertConfig, BertForMaskedLM
    >>> from hf_normswap import find_norms
    >>> model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    >>> [site.sublayer for site in find_norms(model)]
    ['embedding', 'attention', 'ffn', 'head']

    ```
    """
    if not isinstance(model, PreTrainedModel):
        attribute = wrapped_attribute(model)
        cure = f"its .{attribute}" if attribute else "one"
        raise ValueError(f"Norms are found in a model of transformers, not in a {type(model).__name__}: pass {cure}.")
    modules = {name: module for name, module in active_modules(model) if is_norm(module)}
    description = describe(model)
    sites = NormSites()
    sites.obstacle = description.obstacle
    for name, module in modules.items():
        path = path_of(model, name)
        if sites.obstacle is None and path not in description.places:
            continue  # no forward calls it
        place = description.places.get(path) or _Place(stack=_stack_of(model, name))
        block = place.block and next(each for each in _elements(name) if path_of(model, each) == place.block)
        sites.append(
            NormSite(name, path, module, place.stack, place.sublayer, place.layer, place.placement, block, place.calls)
        )
    return sites


@dataclass(frozen=True)
class _Place:
    """What the graph says of one norm."""

    stack: str
    sublayer: str | None = None
    layer: int | None = None
    placement: str | None = None
    block: str | None = None
    calls: int = 0


@dataclass(frozen=True)
class ResidualSum:
    """A sum `skip + branch` of the residual stream, by the nodes of the graph.

    Attributes:
        node (`int`): the sum.
        skip (`int`): what made the stream before it.
        branch (`int`): what made the other term.
    """

    node: int
    skip: int
    branch: int


@dataclass
class Description:
    """What the graph of a model's forward says. It holds names alone and serves every model of the same structure.

    Attributes:
        graph ([`Graph`]): empty where the forward does not run.
        sums (list of [`ResidualSum`]): in the order of the forward.
        places (dict of `str` to `_Place`): what is known of each norm, by its path.
        obstacle (`str`, *optional*): why the forward does not run.
    """

    graph: Graph = field(default_factory=Graph)
    sums: list[ResidualSum] = field(default_factory=list)
    places: dict[str, _Place] = field(default_factory=dict)
    obstacle: str | None = None


_DESCRIPTIONS: dict[tuple, Description] = {}


def describe(model: PreTrainedModel) -> Description:
    """The [`Description`] of a model; read once for all models of one structure."""
    key = _structure_of(model)
    if key not in _DESCRIPTIONS:
        while len(_DESCRIPTIONS) >= _CACHED:
            del _DESCRIPTIONS[next(iter(_DESCRIPTIONS))]
        _DESCRIPTIONS[key] = _read(model)
    return _DESCRIPTIONS[key]


def _structure_of(model: PreTrainedModel) -> tuple:
    """What decides on the graph: the classes and shapes of all modules, with norms of any kind alike."""
    parts = []
    for name, module in model.named_modules():
        if is_norm(module):
            parts.append((name, norm_width(module)))
            continue
        shapes = tuple((key, None if p is None else tuple(p.shape)) for key, p in module._parameters.items())
        # Which parts of an adapter are in use, and how often a chunked layer is called.
        state = tuple(
            str(getattr(module, key, None)) for key in ("active_adapters", "disable_adapters", "merged", "placement")
        )
        parts.append(
            (name, stock_class_of(type(module)), shapes, state, getattr(module, "chunk_size_feed_forward", 0))
        )
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_STRUCTURE}
    config["model_type"] = family_of(model.config.model_type or "")
    return tuple(parts), json.dumps(config, sort_keys=True, default=str)


_NOT_STRUCTURE = ("norm_swap", "auto_map", "fusion_config", "architectures", "transformers_version", "_name_or_path")


def _read(model: PreTrainedModel) -> Description:
    """Follows the forward of a model; where a user's class has one that cannot be followed, that of its base class."""
    obstacle = None
    base = class_of_transformers(type(model))
    forwards = [type(model).forward] + ([] if base in (None, type(model)) else [base.forward])
    for forward in dict.fromkeys(forwards):
        try:
            graph = _follow(model, forward)
            if any(node.op == NORM for node in graph.nodes) or not any(map(is_norm, model.modules())):
                description = Description(graph, list(_residual_sums(graph)))
                description.places = _Reader(model, description).places()
                return description
        except Exception as error:  # whatever a forward that nobody knows may raise
            obstacle = obstacle or f"{type(error).__name__}: {_first_sentence(error)}"
    return Description(obstacle=obstacle or "its forward calls no norm")


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return re.split(r"(?<=[^.])[.!?](?:\s|$)", lines[0])[0][:300]


def _follow(model: PreTrainedModel, forward) -> Graph:
    with torch.device("cpu"):  # whatever the user's default device is
        inputs = example_inputs(model, forward)
        graph = record_graph(model, forward, inputs)
        if _leaves_norms_out(model, graph) and (source := example_source(model, forward)):
            graph = record_graph(model, forward, inputs | source)
    return graph


def _leaves_norms_out(model: PreTrainedModel, graph: Graph) -> bool:
    reached = {node.name for node in graph.nodes if node.op == NORM}
    return any(is_norm(module) and name not in reached for name, module in model.named_modules())


def _residual_sums(graph: Graph):
    """Sums of two values of which one is computed, by layers with weights, from the other.

    Two branches of one value may be added one after the other, as in Cohere.
    """
    starts: dict[int, int] = {}  # of a sum: the value that its branch is computed from
    heavy = [node.index for node in graph.nodes if node.op in WEIGHTED or _is_product(graph, node)]
    for node in graph.nodes:
        if node.op not in ADDITION or len(node.inputs) != 2 or len(node.shape) < 2:
            continue
        first, second = (graph.source(index) for index in node.inputs)
        for skip, branch in ((first, second), (second, first)):
            if skip == branch or graph.nodes[skip].shape[-1:] != node.shape[-1:]:
                continue
            start = skip if graph.depends(branch, skip) else starts.get(skip)
            if start is not None and any(
                start < index <= branch and graph.depends(index, start) and graph.depends(branch, index)
                for index in heavy
            ):
                starts[node.index] = start
                yield ResidualSum(node.index, skip, branch)
                break


def _is_product(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies activations by activations, as attention does, or else mixes tokens."""
    if node.op.startswith(ATTENTION) or _MIXING in node.op:
        return True
    if node.op not in _PRODUCTS or len(node.inputs) < 2:
        return False
    return all(_reads_data(graph, index) for index in node.inputs[-2:])


def _reads_data(graph: Graph, index: int) -> bool:
    """Whether a value is computed from the inputs of the model, and is no choice among parameters."""
    if graph.nodes[graph.source(index)].op == "parameter":
        return False
    return any(node.op == "input" for node in graph.ancestors(index))


class _Reader:
    """Reads off a graph where the norms of a model stand."""

    def __init__(self, model: PreTrainedModel, description: Description):
        self.model, self.graph, self.sums = model, description.graph, description.sums
        self.products = [node for node in self.graph.nodes if _is_product(self.graph, node)]
        self.by_node = {each.node: each for each in self.sums}
        self.modules = dict(model.named_modules())
        self.blocks = self._find_blocks()
        self.of_blocks = [each for each in self.sums if self._block_of(self.graph.nodes[each.node].name)] or self.sums

    def places(self) -> dict[str, _Place]:
        calls: dict[str, list[Node]] = {}
        for node in self.graph.nodes:
            if node.op == NORM:
                calls.setdefault(node.name, []).append(node)
        found, blocks = {}, {}
        for name in self.modules:
            if name not in calls:
                continue
            stack, block = _stack_of(self.model, name), self._block_of(name)
            if block is not None:
                order = blocks.setdefault((stack, self._tower_of(block)), {})
                order.setdefault(block, len(order))
            found[name] = stack, block
        places = {}
        for name, (stack, block) in found.items():
            sublayer, placement = self._place(calls[name][0], block)
            inside = sublayer in (*BLOCK_SUBLAYERS, "query_key")
            places[path_of(self.model, name)] = _Place(
                stack,
                sublayer,
                blocks[stack, self._tower_of(block)][block] if inside and block else None,
                placement if inside else None,
                path_of(self.model, block) if inside and block else None,
                len(calls[name]),
            )
        return places

    def _place(self, norm: Node, block: str | None) -> tuple[str, str | None]:
        """Sublayer and placement of a norm."""
        graph, out = self.graph, norm.index
        read = graph.source(norm.inputs[0]) if norm.inputs else out
        if not _reads_data(graph, out):  # it normalises a table, such as that of relative positions
            return "other", None
        for each in self.sums:
            if each.skip == read and graph.depends(each.branch, out):
                return self._kind(out, each.branch), "pre"
        for each in self.sums:
            if out in self._terms(each.branch):
                return self._kind(each.skip, each.branch), "sandwich"
        if read in self.by_node and block is not None:
            return self._kind(self.by_node[read].skip, self.by_node[read].branch), "post"
        around = next((each for each in self.sums if self._is_between(each, out)), None)
        if around is not None and block is not None:
            if self._meets_product(out):
                return "query_key", "inner"
            return self._kind(around.skip, around.branch), "inner"
        if any(part.isdigit() for part in norm.name.split(".")):  # of a list of layers that are no blocks
            return "other", None
        if not any(graph.depends(out, each.node) for each in self.of_blocks):
            return "embedding", None
        if any(out in self._terms(each.skip) for each in self.of_blocks):  # between two blocks
            return "other", None
        return ("final" if read in self.by_node or self._is_of_stream(read) else "head"), None

    def _is_between(self, each: ResidualSum, node: int) -> bool:
        return self.graph.depends(each.branch, node) and self.graph.depends(node, each.skip)

    def _is_of_stream(self, read: int) -> bool:
        """Whether a value is a residual sum, or one that a norm has normalised already."""
        node = self.graph.nodes[read]
        return node.op == NORM and self.graph.source(node.inputs[0]) in self.by_node

    def _kind(self, start: int, end: int) -> str:
        """The kind of sublayer that computes `end` from `start`, the output of a norm or of the stream."""
        graph = self.graph
        products = [
            node for node in self.products if graph.depends(node.index, start) and graph.depends(end, node.index)
        ]
        if not products:
            return "ffn"
        for node in products:
            if len(node.inputs) < 2:  # as in the Fourier transform of FNet
                continue
            first, second = node.inputs[-2:] if not node.op.startswith(ATTENTION) else node.inputs[:2]
            if graph.depends(first, start) and not graph.depends(second, start):
                return "cross_attention"
        return "attention"

    def _terms(self, node: int) -> list[int]:
        """The values whose sum a value is, where it is one of scaled values."""
        node = self.graph.source(node)
        found = self.graph.nodes[node]
        if found.op in ADDITION and node not in self.by_node and len(found.inputs) == 2:
            return [term for index in found.inputs for term in self._terms(index)]
        if found.op in ("mul", "mul_") and found.inputs:
            return self._terms(found.inputs[0])
        return [node]

    def _meets_product(self, out: int) -> bool:
        """Whether a value comes to a product of an attention before any layer with weights reads it."""
        todo, seen = [out], set()
        while todo:
            for user in self.graph.users(todo.pop()):
                if user.index in seen or user.op in WEIGHTED or user.op == NORM:
                    continue
                if user in self.products:
                    return True
                seen.add(user.index)
                todo.append(user.index)
        return False

    def _find_blocks(self) -> list[str]:
        """The transformer blocks: the innermost elements of lists with an attention and its feed-forward network.

        Where no element has both, the innermost ones with a residual sum.
        """
        counts: dict[str, Counter] = {}
        for kind, indices in (("sums", self.by_node), ("products", [node.index for node in self.products])):
            for index in indices:
                for name in _elements(self.graph.nodes[index].name):
                    counts.setdefault(name, Counter())[kind] += 1
        whole = [name for name, count in counts.items() if count["products"] and count["sums"] > 1]
        blocks = [name for name in whole if not any(_is_inside(other, name) for other in whole)]
        rest = [name for name, count in counts.items() if count["sums"] and name not in blocks]
        rest = [name for name in rest if not any(_is_inside(name, b) or _is_inside(b, name) for b in blocks)]
        return [*blocks, *(name for name in rest if not any(_is_inside(other, name) for other in rest))]

    def _tower_of(self, name: str) -> nn.Module:
        """The innermost model that a module is in, such as the image tower of a model of images and text."""
        return next(part for part in reversed([*_parents(self.model, name)]) if isinstance(part, PreTrainedModel))

    def _block_of(self, name: str) -> str | None:
        """The transformer block that a module is in."""
        return next((element for element in _elements(name) if element in self.blocks), None)


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _elements(name: str) -> list[str]:
    """The elements of lists of modules that a module is in, by their names."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end, part in enumerate(parts, 1) if part.isdigit()]


def is_causal(model: PreTrainedModel, site: NormSite) -> bool:
    """Whether the attention around a norm hides later tokens, so that the norm must not see them either.

    The attention layers of transformers say so; where there are none that do, a decoder is taken for causal.
    """
    blocks = {site.block} if site.block else {s.block for s in find_norms(model) if s.block and s.stack == site.stack}
    modules = [module for block in blocks for module in model.get_submodule(block).modules()]
    said = [module.is_causal for module in modules if hasattr(module, "is_causal")]
    return any(said) if said else site.stack == "decoder"


def _stack_of(model: PreTrainedModel, name: str) -> str:
    """`"encoder"` or `"decoder"`, of a module."""
    config = model.config
    if config.is_encoder_decoder:
        for stack in STACKS:
            part = _find_stack(model, stack)
            if part is not None and any(module is part for module in _parents(model, name)):
                return stack
        return "decoder"  # the head reads the decoder
    if hasattr(config, "is_decoder") and hasattr(config, "add_cross_attention"):  # it may be either
        return "decoder" if config.is_decoder else "encoder"
    return "decoder" if _is_causal(family_of(config.model_type or "")) else "encoder"


def _find_stack(model: PreTrainedModel, stack: str) -> nn.Module | None:
    try:
        part = model.get_encoder() if stack == "encoder" else model.get_decoder()
    except (AttributeError, NotImplementedError):
        return None
    return None if part is model else part


def _parents(model: nn.Module, name: str):
    module = model
    for part in name.split("."):
        yield module
        module = getattr(module, part)


@functools.cache
def _is_causal(model_type: str) -> bool:
    """Whether transformers has a model type as a causal language model, and not as a masked one."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return model_type in causal and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
