"""LayerNorm as RMSNorm: where the residual stream has no mean over the channels, they are the same."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_normswap.core.graph import ADDITION, CONVOLUTION, EMBEDDING, LINEAR, NORM, PASSED, SCALING, Node
from hf_normswap.core.model_state import PLAIN, check_whole, obstacle_of_linear, outside_modes, refuse_training
from hf_normswap.core.norm_sites import BLOCK_SUBLAYERS, find_norms, where_names
from hf_normswap.core.residual_stream import ResidualStream, find_tied_head, in_words, is_result
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.model_norms import has_hooks, norm_width, read_norm
from hf_normswap.modeling.norms import NormSwapConfig
from hf_normswap.swap import swap_norm

from .equivalence import apply_if_equivalent
from .untying import obstacle_of_untying
from .untying import untie as untie_model


logger = logging.get_logger(__name__)

# They do the same to every channel. What else they read (indices, a mask) is no part of the result.
_SUMS = ADDITION | {"sub", "sub_"}
_CHOICES = frozenset({"where", "cat", "mean", "sum", "neg"})
_LINEAR_IN_THE_STREAM = PASSED | _SUMS | SCALING | _CHOICES
# They read a shape, a dtype or a device, and no values.
_VALUELESS = frozenset("empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like".split())


@outside_modes
@torch.no_grad()
def convert_to_rmsnorm(model: PreTrainedModel, *, untie: bool = False) -> PreTrainedModel:
    """Replace the LayerNorms of a pre-norm model by RMSNorm, in place, without changing what it computes.

    What is added to the residual stream loses its mean over the channels: embeddings and other parameters, and outputs
    of the linear layers and convolutions that write to it. LayerNorm subtracts that mean anyway, and the rest of it is
    RMSNorm (Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", 2023, arXiv 2305.14858). A factor of each
    channel behind a linear layer, such as that of DINOv2, goes into the layer.

    A LayerNorm outside of the residual stream, such as one in a head, stays where what it reads cannot lose its mean.
    A warning names it. Embeddings given as `inputs_embeds` have to come from the tables of the converted model.

    Args:
        model ([`~transformers.PreTrainedModel`]): a pre-norm model with its LayerNorms, in evaluation mode.
        untie (`bool`, *optional*, defaults to `False`):
            whether a head that shares its weights with the embeddings gets weights of its own, which it needs.

    Returns:
        The same model, swapped to `"rmsnorm"`.

    Raises:
        ValueError: when the model has post-norm blocks or norms other than LayerNorm, something else than layers with
            weights writes to its residual stream, something else than LayerNorm reads it, its head shares the weights
            of the embeddings without `untie`, it is in training mode, or its outputs would change. The model is
            untouched then.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2Model
    >>> from hf_normswap import convert_to_rmsnorm, find_norms
    >>> model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).eval()
    >>> [site.kind for site in find_norms(convert_to_rmsnorm(model))]
    ['rmsnorm', 'rmsnorm', 'rmsnorm']

    ```
    """
    check_whole(model)
    refuse_training(model)
    plan = plan_conversion(model, untie)
    apply_if_equivalent(model, plan.apply)
    if plan.kept:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in plan.kept.items())
        logger.warning(f"These norms outside of the residual stream stay LayerNorm: {reasons}.")
    return model


def plan_conversion(model: PreTrainedModel, untie: bool) -> "_Plan":
    """What [`convert_to_rmsnorm`] changes in a model, whose weights may be on the meta device.

    Raises:
        ValueError: when the model cannot be converted.
    """
    sites = find_norms(model)
    if any(site.placement == "post" for site in sites):
        raise ValueError("The residual stream of a post-norm model has a mean that matters: convert a pre-norm one.")
    if any(isinstance(site.module, Norm) for site in sites):
        raise ValueError("Some norms are swapped already: call restore_norm(model) first.")
    return _Plan(model, untie)


class _Obstacle(Exception):
    """Why values of the forward cannot lose their mean, in words."""


class _Plan:
    """What loses its mean, so that norms read values without one; found without changing the model.

    Attributes:
        norms (dict of `str` to `None`): the norms that become RMSNorm, by name.
        kept (dict of `str` to `str`): the norms outside of the residual stream that do not, and why.
        writers (dict of `str` to `str`): what makes the values: layers and parameters by name, and their kind.
        factors (dict of `str` to `str`): linear layers, and the parameters that multiply their outputs.
    """

    def __init__(self, model: PreTrainedModel, untie: bool):
        self.model, self.stream = model, ResidualStream(model)
        self.graph = self.stream.graph
        self.norms: dict[str, None] = {}
        self.kept: dict[str, str] = {}
        self.writers: dict[str, str] = {}
        self.factors: dict[str, str] = {}
        self.centred: set[int] = set()  # the nodes whose values lose their mean
        self.results = {index for name, index in self.graph.outputs.items() if is_result(name)}
        self.tied, self.unties = find_tied_head(model), False
        self._width = 0  # number of channels of the values that are being followed
        self._find(untie)

    def apply(self, model: PreTrainedModel) -> None:
        """Do it to `model`, the one that the plan was made for or a copy."""
        if self.unties:
            untie_model(model)
        for name, factor in self.factors.items():
            linear, values = model.get_submodule(name), model.get_parameter(factor)
            _scale_outputs(linear, values.double())
            values.fill_(1)
        done = set()
        for name, kind in self.writers.items():
            for parameter, channels in _parameters_of(model, name, kind):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    exact = parameter.double()
                    parameter.copy_(exact - exact.mean(channels, keepdim=True))
        by_eps: dict[float, set[str]] = {}
        for name in self.norms:
            by_eps.setdefault(read_norm(model.get_submodule(name)).eps, set()).add(name)
        for eps, names in by_eps.items():
            config = NormSwapConfig("rmsnorm", eps=eps)
            swap_norm(model, config, where=where_names(), filter_fn=lambda module, name, names=names: name in names)

    def _find(self, untie: bool) -> None:
        sites, family = find_norms(self.model), f"this {type(self.model).__name__}"
        sublayers = (*BLOCK_SUBLAYERS, "final")
        streams = [site for site in sites if site.sublayer in sublayers and site.placement != "inner"]
        if not any(site.kind == "layernorm" for site in streams):
            found = "are RMSNorms already" if streams else "do not stand around a residual stream"
            raise ValueError(f"The norms of {family} {found}: convert a pre-norm model with LayerNorms.")
        if other := next((site for site in streams if site.kind != "layernorm"), None):
            raise ValueError(f"{other.name} of {family} is an RMSNorm: convert a model with LayerNorms alone.")
        try:
            for site in streams:
                self._spread(site.name)
            self._check_writers(untie)
        except _Obstacle as obstacle:
            raise ValueError(
                f"The residual stream of {family} cannot lose its mean, since {obstacle}: keep its LayerNorms."
            ) from None
        for site in sites:
            if site.name not in self.norms and site.kind == "layernorm":
                before = {name: value.copy() for name, value in vars(self).items() if isinstance(value, dict | set)}
                try:
                    self._spread(site.name)
                    self._check_writers(untie)
                except (_Obstacle, ValueError) as obstacle:
                    vars(self).update(before)
                    self.kept[site.name] = str(obstacle)

    def _spread(self, norm: str) -> None:
        """Let all that a norm reads lose its mean, and with it all that depends on that or reads it."""
        self._width = norm_width(self.model.get_submodule(norm))
        todo = self._join(norm)
        while todo:
            node = self.graph.nodes[todo.pop()]
            if node.index in self.centred:
                continue
            self.centred.add(node.index)
            if node.index in self.results:
                raise _Obstacle("it leaves the model")
            todo += self._sources(node)
            for user in self.graph.users(node.index):
                if self.stream.is_dead(user) or user.op in _VALUELESS or user.index in self.centred:
                    continue
                if user.op == NORM and user.inputs[0] == node.index:
                    todo += self._join(user.name)
                elif user.op in _LINEAR_IN_THE_STREAM:
                    todo.append(user.index)
                else:
                    raise _Obstacle(f"{in_words(user)} reads it too")

    def _join(self, norm: str) -> list[int]:
        """Take a norm among those that are replaced; returns what its calls read."""
        if read_norm(self.model.get_submodule(norm)).kind != "layernorm":
            raise _Obstacle(f"{norm}, an RMSNorm, reads it too")
        if norm_width(self.model.get_submodule(norm)) != self._width:
            raise _Obstacle(f"{norm} reads it with another number of channels")
        self.norms[norm] = None
        calls = [node for node in self.graph.nodes if node.op == NORM and node.name == norm]
        return [node.inputs[0] for node in calls if not self.stream.is_dead(node)]

    def _sources(self, node: Node) -> list[int]:
        """The values that have to lose their mean so that one does; where a layer makes it, that is a writer."""
        wide = [index for index in node.inputs if self.graph.nodes[index].shape[-1:] == (self._width,)]
        is_wide = node.shape[-1:] == (self._width,)
        if node.op in PASSED and node.inputs:
            shapes = node.shape, self.graph.nodes[node.inputs[0]].shape
            # What else moves the channels is a transposition, as behind a convolution.
            if node.keeps_channels or all(self._width in shape for shape in shapes):
                return [node.inputs[0]]
        elif node.op in _SUMS and is_wide and len(wide) == len(node.inputs) == 2:
            return wide
        elif node.op in _CHOICES and is_wide:
            others = node.inputs[1:] if node.op == "where" and len(node.inputs) == 3 else node.inputs
            if all(index in wide for index in others):
                return list(others)
        elif node.op in SCALING and is_wide and wide:
            others = [self.graph.nodes[index].shape for index in node.inputs if index not in wide]
            is_factor = node.op.startswith("mul")
            if len(wide) == 1 and all(shape[-1:] in ((), (1,)) for shape in others):
                if is_factor or wide[0] == node.inputs[0]:  # and no divisor
                    return wide
            elif len(wide) == 2 and is_factor:
                return self._take_factor(node, *wide)
        elif (node.op in (LINEAR, EMBEDDING, "parameter") and is_wide) or (
            node.op == CONVOLUTION and self._width in node.shape[1:2]
        ):
            self.writers[node.name] = node.op
            return []
        elif node.op == NORM:
            self._check_norm(node.name)
            self.writers[node.name] = node.op
            return []
        raise _Obstacle(f"{in_words(node)} writes to it")

    def _check_norm(self, name: str) -> None:
        """Raises unless the output of a norm has a mean that comes from its shift alone."""
        norm = self.model.get_submodule(name)
        if read_norm(norm).kind != "layernorm":
            raise _Obstacle(f"{name}, an RMSNorm, writes to it")
        gain = getattr(norm, "weight", None)
        if gain is not None and not (gain == gain[0]).all():
            raise _Obstacle(f"{name} writes to it, with another gain for each channel")

    def _take_factor(self, node: Node, first: int, second: int) -> list[int]:
        """Let a linear layer take up the parameter that multiplies the channels of its output, and be the writer."""
        for index, other in ((first, second), (second, first)):
            linear, factor = (self.graph.nodes[self.graph.source(each)] for each in (index, other))
            alone = all(
                [reader.index for reader in self.graph.readers(each.index) if not self.stream.is_dead(reader)]
                == [node.index]
                for each in (linear, factor)
            )
            if linear.op == LINEAR and factor.op == "parameter" and factor.shape == (self._width,) and alone:
                self.factors[linear.name] = factor.name
                self.writers[linear.name] = LINEAR
                self.centred |= self.graph.passed(linear.index)
                return []
        raise _Obstacle(f"{in_words(node)} writes to it")

    def _check_writers(self, untie: bool) -> None:
        """Raises unless the parameters of all writers can change, and nothing else uses them."""
        nodes: dict[str, list[int]] = {}
        for node in self.graph.nodes:
            if node.op in (LINEAR, EMBEDDING, CONVOLUTION, NORM, "parameter") and not self.stream.is_dead(node):
                nodes.setdefault(node.name, []).append(node.index)
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for factor in self.factors.values():
            if len(nodes[factor]) > 1 or len(names[id(self.model.get_parameter(factor))]) > 1:
                raise _Obstacle(f"{factor} multiplies the output of more than one layer")
        for writer, kind in self.writers.items():
            if kind != "parameter" and (reason := _obstacle_of(self.model.get_submodule(writer), kind)):
                raise ValueError(f"{writer} {reason}, and cannot lose the mean of its outputs: {PLAIN} first.")
            if not self.centred.issuperset(nodes[writer]):
                raise _Obstacle(f"{writer} writes to it, and elsewhere")
            if kind == LINEAR and len(nodes[writer]) > 1 and writer in self.factors:
                raise _Obstacle(f"{writer} is called {len(nodes[writer])} times")
            for parameter, _ in _parameters_of(self.model, writer, kind):
                for name in names[id(parameter)]:
                    self._check_use(writer, name, nodes, untie)

    def _check_use(self, writer: str, name: str, nodes: dict[str, list[int]], untie: bool) -> None:
        """Raises where a parameter of a writer is read by what is no writer, under this `name` of it."""
        layer = name.rpartition(".")[0]
        uses = [*nodes.get(layer, ()), *nodes.get(name, ())]
        if layer == self.tied and uses:
            if not untie:
                raise ValueError(
                    f"{layer} shares its weights with the embeddings, which have to change: pass untie=True."
                )
            if reason := obstacle_of_untying(self.model, layer):
                raise _Obstacle(reason)
            self.unties = True
        elif not self.centred.issuperset(uses):
            raise _Obstacle(f"{writer} shares its weights with {layer}")


def _obstacle_of(module: nn.Module, kind: str) -> str | None:
    """Why a layer would not return other values, in the way that is expected, with other parameters."""
    if kind == LINEAR:
        return obstacle_of_linear(module)
    if has_hooks(module):
        return "has hooks"
    is_plain = all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    return None if is_plain and "weight" in module._parameters else "has a weight that is computed"


def _parameters_of(model: PreTrainedModel, name: str, kind: str) -> Iterable[tuple[nn.Parameter, int]]:
    """The parameters of a writer, and in which dimension each has the channels of the stream."""
    if kind == "parameter":
        yield model.get_parameter(name), -1
        return
    module = model.get_submodule(name)
    if kind != NORM:
        # Of a table and of a Conv1D it is the last dimension.
        yield module.weight, -1 if kind == EMBEDDING or isinstance(module, Conv1D) else 0
    if getattr(module, "bias", None) is not None:
        yield module.bias, -1


def _scale_outputs(linear: nn.Module, factor: torch.Tensor) -> None:
    weight = linear.weight.double()
    linear.weight.copy_(weight * factor if isinstance(linear, Conv1D) else weight * factor[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() * factor)
