"""Which layers read what a norm returns, and which add to the residual stream: read off the graph of the forward."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .graph import ADDITION, EMBEDDING, LINEAR, NORM, SCALING, WEIGHTED, Node
from .norm_sites import NormSite, ResidualSum, describe


# Of what a model returns, what nobody reads but who looks inside.
_ASIDE = re.compile(r"encoder_last_hidden_state|.*hidden_states|.*attentions|.*_model_output|past_key_values|.*\.\d+")


def is_result(name: str) -> bool:
    """Whether an output of a model, by its name, is what the model is for: no state between its layers."""
    return not _ASIDE.fullmatch(name)


@dataclass(frozen=True)
class Reading:
    """What reads one value of a forward.

    Attributes:
        linears (tuple of `str`): the linear layers, by name.
        sums (tuple of [`ResidualSum`]): the sums in which it is the stream.
        obstacle (`str`, *optional*): what else reads it, in words.
    """

    linears: tuple[str, ...] = ()
    sums: tuple[ResidualSum, ...] = ()
    obstacle: str | None = None


@dataclass(frozen=True)
class Writing:
    """The layers whose outputs, added up, are one value of a forward.

    Attributes:
        linears (tuple of `str`): the linear layers, by name.
        tables (tuple of `str`): the embedding tables, by name.
        obstacle (`str`, *optional*): what else there is, in words.
    """

    linears: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    obstacle: str | None = None


@dataclass(frozen=True)
class Branch:
    """The linear layers between the stream and the residual sum that adds what they compute.

    Attributes:
        linears (tuple of `str`): all of them, by name, in the order of the forward.
        ends (tuple of `str`): those that no other one of them reads.
        length (`int`): the largest number of them in a row.
        obstacle (`str`, *optional*): what else has weights there, in words.
    """

    linears: tuple[str, ...]
    ends: tuple[str, ...]
    length: int
    obstacle: str | None = None


class ResidualStream:
    """The readers and writers around the norms of one model.

    Args:
        model ([`~transformers.PreTrainedModel`]): any.

    Raises:
        ValueError: when the forward of the model could not be read.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.description = model, describe(model)
        if self.description.obstacle is not None:
            raise ValueError(
                f"The forward of this {type(model).__name__} could not be followed ({self.description.obstacle}), and "
                "its linear layers are not known: swap and train it without this step."
            )
        self.graph, self.sums = self.description.graph, self.description.sums
        self._norms: dict[str, Node] = {}
        self._calls: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == NORM:
                self._norms.setdefault(node.name, node)
            if node.op in (LINEAR, EMBEDDING):
                self._calls[node.name] = self._calls.get(node.name, 0) + 1

    def is_reached(self, site: NormSite) -> bool:
        """Whether the forward calls a norm."""
        return site.name in self._norms

    def order(self, site: NormSite) -> int:
        """Place of a norm in the forward."""
        return self._norms[site.name].index if site.name in self._norms else -1

    def readers(self, site: NormSite) -> Reading:
        """What reads the output of a norm."""
        return self._readers_of(self._norms[site.name].index)

    def readers_before(self, site: NormSite) -> Reading:
        """What reads the stream in front of the residual sum that a post-norm reads."""
        total = self.sum_before(site)
        return Reading(obstacle="it follows no residual sum") if total is None else self._readers_of(total.skip)

    def predictor(self, site: NormSite) -> str | None:
        """The linear layer that makes logits of the output of a norm, where nothing else reads this output.

        Tokens and logits may be multiplied by a number on the way, as in T5 and Cohere, and the model may add a
        constant to the logits, as Marian does.
        """
        if not self.is_reached(site) or self._is_returned(self.order(site)):
            return None
        value = self._behind_constants(self.order(site))
        reading = self._readers_of(value)
        if reading.obstacle is not None or reading.sums or len(reading.linears) != 1:
            return None
        (name,) = reading.linears
        node = next(node for node in self.graph.nodes if node.op == LINEAR and _place(node.name) == name)
        logits = self._behind_constants(node.index)
        return name if self.graph.outputs.get("logits") in self.graph.passed(logits) else None

    def _behind_constants(self, value: int) -> int:
        """A value behind multiplications by a number and sums with a parameter, where nothing else reads it."""
        while len(readers := [node for node in self.graph.readers(value) if not self.is_dead(node)]) == 1:
            (reader,) = readers
            others = [self.graph.nodes[index].op for index in reader.inputs if self.graph.source(index) != value]
            is_scaled = reader.op in SCALING and not others
            is_shifted = reader.op in ADDITION and others in (["parameter"], ["buffer"])
            if not is_scaled and not is_shifted:
                break
            value = reader.index
        return value

    def sum_before(self, site: NormSite) -> ResidualSum | None:
        """The residual sum that a norm reads."""
        read = self._read_by(site)
        return next((each for each in self.sums if each.node == read), None)

    def site_of_stream(self, total: ResidualSum, sites: list[NormSite]) -> NormSite | None:
        """The norm among `sites` whose output is the stream in a residual sum."""
        return next((site for site in sites if self.order(site) == total.skip), None)

    def writers(self, total: ResidualSum) -> Writing:
        """What a residual sum adds to the stream."""
        return self._writers_of(total.branch)

    def writers_before(self, site: NormSite) -> Writing:
        """What a norm reads, where that is no residual sum."""
        return self._writers_of(self._read_by(site))

    def branches(self) -> list[Branch]:
        """The residual branches of the model that have weights, in the order of the forward."""
        found = []
        for each in self.sums:
            nodes = self._nodes_back(
                each.branch, stop=lambda node, each=each: self.graph.depends(each.skip, node.index)
            )
            linears = [node for node in nodes if node.op == LINEAR]
            others = [node for node in nodes if node.op in WEIGHTED - {LINEAR}]
            rows: dict[int, int] = {}
            for node in linears:
                rows[node.index] = 1 + max((rows[i] for i in rows if self.graph.depends(node.index, i)), default=0)
            ends = [
                node
                for node in linears
                if not any(self.graph.depends(other.index, node.index) for other in linears if other is not node)
            ]
            if linears or others:
                obstacle = f"{in_words(others[0])} has weights of its own" if others else None
                names = (tuple(dict.fromkeys(_place(node.name) for node in some)) for some in (linears, ends))
                found.append(Branch(*names, max(rows.values(), default=0), obstacle))
        return found

    def heads(self) -> list[str]:
        """The last linear layers in front of what the model returns, where they are in no residual branch."""
        found = []
        for name in filter(is_result, self.graph.outputs):
            nodes = self._nodes_back(self.graph.outputs[name], stop=lambda node: False, past_linears=False)
            found += [_place(node.name) for node in nodes if node.op == LINEAR]
        return list(dict.fromkeys(found))

    def _nodes_back(self, start: int, stop: Callable[[Node], bool], past_linears: bool = True) -> list[Node]:
        """The nodes that a value is computed by, in order, back to residual sums and to where it says `stop`."""
        sums, found, todo = {each.node for each in self.sums}, {}, [start]
        while todo:
            node = self.graph.nodes[todo.pop()]
            if node.index in found or node.index in sums or stop(node):
                continue
            found[node.index] = node
            if past_linears or node.op != LINEAR:
                todo += node.inputs
        return [found[index] for index in sorted(found)]

    def sites_of_linears(self, sites: list[NormSite]) -> dict[str, NormSite]:
        """For each linear layer of the blocks, by name, the norm of the sublayer that it belongs to."""
        inside = [site for site in sites if site.block and self.is_reached(site)]
        found = {}
        for node in self.graph.nodes:
            if node.op != LINEAR:
                continue
            block = [site for site in inside if node.name.startswith(f"{site.block}.")]
            pre = [
                site for site in block if site.placement == "pre" and self.graph.depends(node.index, self.order(site))
            ]
            total = next((each for each in self.sums if self.graph.depends(each.branch, node.index)), None)
            others = (
                []
                if total is None
                else [site for site in block if total in (self.sum_before(site), self._sum_after(site))]
            )
            if site := max(pre, key=self.order, default=next(iter(others), None)):
                found[_place(node.name)] = site
        return found

    def _sum_after(self, site: NormSite) -> ResidualSum | None:
        """The residual sum around the sublayer that reads a pre-norm."""
        read = self._read_by(site)
        return next((each for each in self.sums if each.skip == read), None) if site.placement == "pre" else None

    def idle_linears(self, block: str) -> list[str]:
        """The linear layers in a block that this forward left out, such as an expert that no token went to."""
        modules = self.model.get_submodule(block).named_modules(prefix=block)
        linears = (name for name, module in modules if isinstance(module, nn.Linear | Conv1D))
        return [name for name in linears if name not in self._calls]

    def feeder(self, site: NormSite) -> str | None:
        """The linear layer whose output comes to a norm, alone or as the last one in a residual sum."""
        if not self.is_reached(site):
            return None
        total = self.sum_before(site)
        writing = self.writers_before(site) if total is None else self.writers(total)
        given = self.graph.nodes[self._norms[site.name].inputs[0]]
        if math.prod(given.shape[:-1]) != math.prod(self.graph.nodes[self._read_by(site)].shape[:-1]):
            return None  # it reads a part of the tokens
        return writing.linears[-1] if writing.linears and writing.obstacle is None else None

    def _read_by(self, site: NormSite) -> int:
        return self.graph.source(self._norms[site.name].inputs[0])

    def _readers_of(self, value: int) -> Reading:
        linears, sums, obstacle = [], [], None
        for node in self.graph.readers(value):
            total = next((each for each in self.sums if each.node == node.index and each.skip == value), None)
            if node.op == LINEAR:
                linears.append(_place(node.name))
                if self._calls[node.name] > 1:
                    obstacle = f"{node.name} is called {self._calls[node.name]} times"
            elif total is not None:
                sums.append(total)
            elif not self.is_dead(node):
                obstacle = f"{in_words(node)} reads it"
        if self._is_returned(value):
            obstacle = "hidden states leave the model here"
        return Reading(tuple(dict.fromkeys(linears)), tuple(sums), obstacle)

    def _is_returned(self, value: int) -> bool:
        passed, outputs = self.graph.passed(value), self.graph.outputs
        names = [name for name in outputs if is_result(name)]
        if "last_hidden_state" in outputs:  # a model without head, which hands on the states of its encoder, too
            names.append("encoder_last_hidden_state")
        return any(outputs.get(name) in passed for name in names)

    def is_dead(self, node: Node) -> bool:
        """Whether nothing that the model returns depends on a node."""
        return not any(self.graph.depends(index, node.index) for index in self.graph.outputs.values())

    def _writers_of(self, value: int) -> Writing:
        node = self.graph.nodes[self.graph.source(value)]
        if node.op in ADDITION and len(node.inputs) == 2 and node.index not in {each.node for each in self.sums}:
            first, second = (self._writers_of(index) for index in node.inputs)
            obstacle = first.obstacle or second.obstacle
            return Writing(first.linears + second.linears, first.tables + second.tables, obstacle)
        others = {user.index for user in self.graph.readers(node.index)}
        if node.op in (LINEAR, EMBEDDING):
            name = _place(node.name)
            obstacle = None
            if self._calls[node.name] > 1:
                obstacle = f"{name} is called {self._calls[node.name]} times"
            elif len(others) > 1 and not self._feeds_sums(node.index):
                obstacle = f"more than the residual stream reads {name}"
            return Writing((name,), (), obstacle) if node.op == LINEAR else Writing((), (name,), obstacle)
        return Writing(obstacle=f"{in_words(node)} writes to it")

    def _feeds_sums(self, value: int) -> bool:
        """Whether a value is itself a stream: what reads it reads the stream."""
        return any(each.skip == value for each in self.sums)


def _place(name: str) -> str:
    """The name of the layer that an adapter stands for, where it has put the layer inside itself."""
    return name.removesuffix(".base_layer")


def in_words(node: Node) -> str:
    """A node in words."""
    if node.op in ("parameter", "buffer"):
        return f"the {node.op} {node.name}"
    if node.op == "input":
        return f"the argument {node.name}"
    return f"{node.op.strip('_')} in {node.name}" if node.name else node.op


def find_tied_head(model: PreTrainedModel) -> str | None:
    """The linear layer of a language modelling head that shares its weights with an embedding table."""
    head = model.get_output_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if head is None or not any(table.weight is head.weight for table in tables):
        return None
    return next(name for name, module in model.named_modules() if module is head)
