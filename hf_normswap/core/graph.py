"""The dataflow of one forward of a model: which module reads what, and what is added to what.

The forward runs on a copy of the modules in which each weight is a tensor of ones that takes no memory, and linear
layers return zeros without computing them. So the graph of a model of any size, on any device or on none, takes a
fraction of a second and no memory, and what computes on the way to a shape or a mask still has real values.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from hf_normswap.modeling.model_norms import HOOKS, is_norm
from hf_normswap.modeling.padding_mask import padding_mask


# Each token keeps its channels, in their order, as long as the last dimension is the one that it was.
PASSED = frozenset(
    "_reshape_alias _to_copy _unsafe_view alias chunk clone contiguous detach expand expand_as gather index "
    "index_select lift_fresh native_dropout permute reshape select slice split split_with_sizes squeeze t to "
    "transpose unsafe_view unsqueeze view view_as".split()
)
# Layers that multiply by a weight. Nothing else makes new channels of those that it reads.
ATTENTION = "_scaled_dot_product"
# They read the shape of a tensor, and nothing of what is in it.
SHAPE_ALONE = frozenset("empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like".split())
_GROUPED = "_grouped_mm"
LINEAR, CONVOLUTION, EMBEDDING, NORM = "linear", "convolution", "embedding", "norm"
WEIGHTED = frozenset({LINEAR, CONVOLUTION, "mm", "addmm", _GROUPED})
ADDITION = frozenset({"add", "add_"})
SCALING = frozenset({"mul", "mul_", "div", "div_"})


@dataclass(frozen=True)
class Node:
    """One step of the forward: the call of a layer, or an operation of PyTorch between layers.

    Attributes:
        index (`int`): its place in the forward.
        op (`str`): `"linear"`, `"norm"`, `"embedding"`, `"convolution"`, `"input"`, `"parameter"`, `"buffer"`, or the
            name of an operation of PyTorch.
        name (`str`): of the layer, of the parameter or of the argument; else of the module that runs the operation.
        inputs (tuple of `int`): the nodes whose outputs it reads, in the order of the arguments.
        shape (tuple of `int`): of the output.
        keeps_channels (`bool`): whether the last dimension of the output is that of the first input.
    """

    index: int
    op: str
    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...] = ()
    keeps_channels: bool = True


@dataclass
class Graph:
    """The nodes of a forward. What follows from them is computed here, once for each question.

    Attributes:
        nodes (list of [`Node`]): in the order of the forward.
        outputs (dict of `str` to `int`): name of each output of the model, and the node that made it.
    """

    nodes: list[Node] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self._ancestors: list[int] = []  # of each node, itself included: a set as the bits of a number
        self._users: list[list[int]] = []

    def append(self, op: str, name: str, inputs: tuple[int, ...], shape=(), keeps_channels: bool = True) -> int:
        """Add a node; returns its index."""
        index = len(self.nodes)
        self.nodes.append(Node(index, op, name, inputs, tuple(shape), keeps_channels))
        ancestors = 1 << index
        for source in set(inputs):
            ancestors |= self._ancestors[source]
            self._users[source].append(index)
        self._ancestors.append(ancestors)
        self._users.append([])
        return index

    def depends(self, node: int, on: int) -> bool:
        """Whether a node reads, at first hand or not, what the node `on` made."""
        return bool(self._ancestors[node] >> on & 1)

    def ancestors(self, node: int) -> Iterator[Node]:
        """Every node that a node depends on, the last one first; the node itself is one of them."""
        bits = self._ancestors[node]
        while bits:
            index = bits.bit_length() - 1
            bits ^= 1 << index
            yield self.nodes[index]

    def users(self, node: int) -> list[Node]:
        """The nodes that read the output of a node."""
        return [self.nodes[index] for index in self._users[node]]

    def source(self, node: int) -> int:
        """The node whose output comes to `node` through views, casts and selections alone."""
        while self._passes(self.nodes[node]):
            node = self.nodes[node].inputs[0]
        return node

    def readers(self, node: int) -> list[Node]:
        """What reads the output of a node, through views, casts and selections; a dead end is not among them."""
        found: list[Node] = []
        for user in self.users(node):
            if self._passes(user) and user.inputs[0] == node:
                found += self.readers(user.index)
            else:
                found.append(user)
        return found

    def passed(self, node: int) -> set[int]:
        """A node, and the nodes that hand its output on through views, casts and selections."""
        found = {node}
        for user in self.users(node):
            if self._passes(user) and user.inputs[0] == node:
                found |= self.passed(user.index)
        return found

    @staticmethod
    def _passes(node: Node) -> bool:
        return node.op in PASSED and node.keeps_channels and bool(node.inputs)


def record_graph(model: nn.Module, forward: Callable, inputs: dict) -> Graph:
    """The graph of `model(**inputs)` in evaluation mode. The model is not called, a copy of its modules is.

    Args:
        model (`torch.nn.Module`): on any device, in any dtype; its weights may be on the meta device.
        forward (callable): the forward of its class, or of a base class.
        inputs (`dict`): arguments of the forward, on the CPU.

    Raises:
        Exception: what the forward of the copy raises.
    """
    shadow, stand_ins = _copy_modules(model)
    recorder = _Recorder(shadow, stand_ins, inputs)
    for name, module in shadow.named_modules():
        kind = _kind_of(module)
        if kind is not None:
            module.forward = recorder.layer(kind, name, module)
    with _no_side_effects(), recorder:
        output = forward(shadow, **inputs)
    recorder.finish(output)
    return recorder.graph


def _kind_of(module: nn.Module) -> str | None:
    if is_norm(module):
        return NORM
    if isinstance(module, nn.Linear | Conv1D):
        return LINEAR
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    return CONVOLUTION if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None


@contextlib.contextmanager
def _no_side_effects():
    """No gradients, no autocast, no padding, the CPU as the device of new tensors, and the random state as it was."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        with padding_mask(None):  # the copy has no hooks that tell it
            yield


def _copy_modules(model: nn.Module) -> tuple[nn.Module, dict[int, tuple[str, str]]]:
    """The modules of a model once more, without hooks and with stand-ins for their tensors, and whose those are."""
    copies: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}
    names: dict[int, tuple[str, str]] = {}

    def stand_in(tensor, name, kind):
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            new = _stand_in(tensor, is_weight=kind == "parameter")
            tensors[id(tensor)] = nn.Parameter(new, requires_grad=False) if kind == "parameter" else new
            names[id(tensors[id(tensor)])] = kind, name
        return tensors[id(tensor)]

    def copy(module, prefix):
        if id(module) in copies:
            return copies[id(module)]
        new = copies[id(module)] = type(module).__new__(type(module))
        # `forward` stands there where something has replaced the one of the class, such as an offloading hook.
        new.__dict__.update({name: value for name, value in vars(module).items() if name != "forward"})
        for hooks in HOOKS:
            if hooks in new.__dict__:
                new.__dict__[hooks] = None if hooks == "_is_full_backward_hook" else OrderedDict()
        for kind, table in (("parameter", "_parameters"), ("buffer", "_buffers")):
            new.__dict__[table] = {
                name: stand_in(tensor, f"{prefix}{name}", kind) for name, tensor in vars(module)[table].items()
            }
        new.__dict__["_modules"] = {
            name: child if child is None else copy(child, f"{prefix}{name}.")
            for name, child in module._modules.items()
        }
        new.__dict__["training"] = False
        return new

    return copy(model, ""), names


def _stand_in(tensor: torch.Tensor, is_weight: bool) -> torch.Tensor:
    if is_weight and tensor.is_floating_point():
        return torch.ones((), device="cpu").expand(tensor.shape)
    if tensor.is_meta:
        return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
    # A buffer decides on shapes and masks, as position ids do. Half of the CPU's operations know no other float.
    value = tensor.detach().to("cpu")
    return value.float() if value.is_floating_point() else value


class _Recorder(TorchDispatchMode):
    """Notes what every operation reads and makes, by the identity of tensors."""

    def __init__(self, model: nn.Module, stand_ins: dict[int, tuple[str, str]], inputs: dict):
        super().__init__()
        self.graph = Graph()
        self._made = WeakTensorKeyDictionary()  # tensor → node; activations are freed as in any forward
        self._inside = 0  # of how many layers that are one node each
        self._running = [""]
        self._names = stand_ins
        self._modules = {id(module): name for name, module in model.named_modules()}
        for name, value in inputs.items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    self._note(leaf, self.graph.append("input", name, (), leaf.shape))

    def __enter__(self):
        enter = nn.modules.module.register_module_forward_pre_hook(self._enter)
        leave = nn.modules.module.register_module_forward_hook(self._leave)
        self._handles = enter, leave
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def _enter(self, module, args):
        if (name := self._modules.get(id(module))) is not None:
            self._running.append(name)

    def _leave(self, module, args, output):
        if id(module) in self._modules:
            self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        output = (
            _zeros_of(name, args) if name == _GROUPED or name.startswith(ATTENTION) else func(*args, **(kwargs or {}))
        )
        if not self._inside:
            self._record(name, args, kwargs or {}, output)
        return output

    def layer(self, kind: str, name: str, module: nn.Module) -> Callable:
        """A forward of `module` that is one node."""
        forward = type(module).forward

        def run(*args, **kwargs):
            self._inside += 1
            try:
                if kind == LINEAR and args and args[0].is_floating_point():
                    width = module.nf if isinstance(module, Conv1D) else module.out_features
                    output = args[0].new_zeros(*args[0].shape[:-1], width)
                else:
                    output = forward(module, *args, **kwargs)
            finally:
                self._inside -= 1
            self._record(kind, args, kwargs, output, name)
            return output

        return run

    def finish(self, output) -> None:
        """Note what the model returns."""
        named = output.items() if hasattr(output, "items") else [("output", output)]
        for name, value in named:
            for index, leaf in enumerate(pytree.tree_leaves(value)):
                if isinstance(leaf, torch.Tensor) and leaf in self._made:
                    self.graph.outputs[f"{name}.{index}" if index else name] = self._made[leaf]

    def _record(self, op, args, kwargs, output, name=None) -> None:
        leaves = pytree.tree_leaves((args, kwargs)) if op not in SHAPE_ALONE else ()
        sources = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        inputs = tuple(index for leaf in sources if (index := self._node_of(leaf)) is not None)
        for leaf in pytree.tree_leaves(output):
            if not isinstance(leaf, torch.Tensor):
                continue
            keeps = bool(sources) and _keeps_channels(op, sources[0], leaf, args)
            index = self.graph.append(op, self._running[-1] if name is None else name, inputs, leaf.shape, keeps)
            self._note(leaf, index)

    def _node_of(self, tensor) -> int | None:
        """The node that made a tensor; a parameter gets its own at its first use, a constant has none."""
        if tensor not in self._made and id(tensor) in self._names:
            kind, name = self._names[id(tensor)]
            self._note(tensor, self.graph.append(kind, name, (), tensor.shape))
        return self._made.get(tensor)

    def _note(self, tensor, index: int) -> None:
        self._made[tensor] = index


def _zeros_of(name: str, args: tuple):
    """The output of an operation that is not computed: one checks strides, which stand-ins lack, the other is slow."""
    if name == _GROUPED:
        return args[0].new_zeros(args[0].shape[0], args[1].shape[-1])
    query, _, value = args[:3]
    return query.new_zeros(*query.shape[:-1], value.shape[-1]), query.new_zeros(())


def _keeps_channels(op: str, source: torch.Tensor, output: torch.Tensor, args: tuple) -> bool:
    """Whether the last dimension of an output has the channels of the last one of its source, all and in order."""
    if not source.dim() or not output.dim() or source.shape[-1] != output.shape[-1]:
        return False
    last = source.dim() - 1
    if op == "transpose":
        return last not in (args[1] % source.dim(), args[2] % source.dim())
    if op == "permute":
        return args[1][-1] % source.dim() == last
    if op == "t":
        return source.dim() < 2
    return True
