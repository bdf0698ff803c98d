"""Stock norms without gain and shift: these go into the linear layers that read them."""

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_normswap.core.graph import CONVOLUTION, EMBEDDING, LINEAR, NORM
from hf_normswap.core.model_state import (
    check_whole,
    obstacle_of_linear,
    outside_modes,
    refuse_computed,
    refuse_training,
    swapped_parts,
)
from hf_normswap.core.norm_sites import NormSite, find_norms
from hf_normswap.core.residual_stream import ResidualStream, find_tied_head
from hf_normswap.modeling.model_norms import has_hooks, read_norm

from .equivalence import apply_if_equivalent
from .fold import FoldReport
from .untying import obstacle_of_untying
from .untying import untie as untie_model


@outside_modes
@torch.no_grad()
def fold_gains(model: PreTrainedModel, *, untie: bool = False) -> FoldReport:
    """Move gain and shift of the norms of a stock model into the linear layers behind them, in place.

    A norm returns `g ⊙ x̂ + b`. Where linear layers alone read it, they become `W · diag(g)`, their biases get `W · b`
    more, and the norm has the gain 1 and the shift 0. Where one of them has no bias, the norm keeps the shift `b / g`.
    All is computed in float64. The model computes what it did, and its class and configuration stay: it saves, and
    loads without this package.

    A norm is kept as it is where anything but linear layers reads it: a residual sum (post-norm), experts, another
    norm, or a head that shares its weights with the embeddings. Hidden states behind a folded norm have other scales.

    Args:
        model ([`~transformers.PreTrainedModel`]): any model with its own norms, in evaluation mode.
        untie (`bool`, *optional*, defaults to `False`):
            whether a head that shares its weights with the embeddings gets weights of its own, so that the norm in
            front of it can be folded too. The configuration then says `tie_word_embeddings=False`.

    Returns:
        [`FoldReport`]: what was folded, what was kept and why; print it for a table.

    Raises:
        ValueError: when norms are swapped, none can be folded, the model is in training mode, its forward cannot be
            followed, or its outputs for random inputs would change by more than rounding does. The model is untouched
            then.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_normswap import fold_gains
    >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=9)).eval()
    >>> _ = model.model.norm.weight.data.uniform_(0.5, 1.5)
    >>> report = fold_gains(model)
    >>> report.folded, model.model.norm.weight.tolist() == 8 * [1.0]
    (['model.norm'], True)

    ```
    """
    check_whole(model)
    refuse_training(model)
    if swapped_parts(model):
        raise ValueError(
            f"The norms of this {type(model).__name__} are swapped: call fold_norms(model), which is for those, or "
            "restore_norm(model) first."
        )
    plan = _Plan(model, untie)
    if not plan.report.folded:
        raise ValueError(
            f"No gain of this {type(model).__name__} can be folded ({plan.report.reasons()}): use the model as it is."
        )
    plan.report.error = apply_if_equivalent(model, plan.apply)
    return plan.report


class _Plan:
    """What folding changes in `model`, computed in float64 without changing it."""

    def __init__(self, model: PreTrainedModel, untie: bool):
        self.model, self.report = model, FoldReport()
        self.values: dict[str, torch.Tensor] = {}  # of parameters, by name
        self.stream = ResidualStream(model)
        nodes = self.stream.graph.nodes
        self.called = {node.name for node in nodes if node.op in (LINEAR, EMBEDDING, CONVOLUTION, NORM)}
        self.read = {node.name for node in nodes if node.op == "parameter"}  # by the forward itself, outside of layers
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.may_untie, self.tied, self.unties = untie, find_tied_head(model), False
        sites = find_norms(model)
        refuse_computed({site.name: site.module for site in sites})
        for site in sites:
            if reason := self._reason_to_keep(site) or self._fold(site):
                self.report.kept[site.name] = reason
            else:
                self.report.folded.append(site.name)

    def apply(self, model: PreTrainedModel) -> None:
        """Do it to `model`, the one that the plan was made for or a copy."""
        if self.unties:
            untie_model(model)
        for name, value in self.values.items():
            parameter = model.get_parameter(name)
            parameter.copy_(value.to(parameter.device))

    def _reason_to_keep(self, site: NormSite) -> str | None:
        """Why something else would see a change of a norm's gain and shift."""
        if site.calls > 1:
            return f"it is called {site.calls} times"
        if has_hooks(site.module):
            return "it has hooks"
        reading = self.stream.readers(site)
        if reading.sums:
            return "a residual sum reads it"
        if reading.obstacle or not reading.linears:
            return reading.obstacle or "nothing reads it"
        if shared := self._shared(site.name):
            return shared
        for name in reading.linears:
            if reason := obstacle_of_linear(self.model.get_submodule(name)):
                return f"{name} {reason}"
            if name == self.tied:
                if not self.may_untie:
                    return f"{name} shares its weights with the embeddings"
                if reason := obstacle_of_untying(self.model, name):
                    return reason
            elif shared := self._shared(name):
                return shared
        idle = self.stream.idle_linears(site.block) if site.block else []
        return f"{idle[0]}, which its forward can leave out, may read it too" if idle else None

    def _shared(self, name: str) -> str | None:
        """Where else the forward reads the parameters of a layer."""
        for parameter in self.model.get_submodule(name).parameters(recurse=False):
            for other in self.names[id(parameter)]:
                layer = other.rpartition(".")[0]
                if layer != name and layer in self.called:
                    return f"{name} shares its weights with {layer}"
                if other in self.read:
                    return f"more than {name} reads its weights"
        return None

    def _fold(self, site: NormSite) -> str | None:
        """Plan the new parameters of a norm and its readers; returns why that cannot be."""
        norm, stock = site.module, read_norm(site.module)
        gain, shift = (self._value(site.name, key) for key in ("weight", "bias"))
        gain = torch.ones(()).double() if gain is None else gain + stock.offset
        shift = torch.zeros_like(gain) if shift is None else shift
        readers = self.stream.readers(site).linears
        values: dict[str, torch.Tensor] = {}
        bare = [name for name in readers if self.model.get_submodule(name).bias is None]
        kept = torch.zeros_like(shift)
        if bare and (shift != 0).any():
            if zeros := ((gain == 0) & (shift != 0)).sum().item():
                return f"{zeros} of its gains are 0, and {bare[0]} has no bias for its shift"
            kept = torch.where(shift == 0, 0.0, shift / gain)
        if (gain == 1).all() and (shift == kept).all():
            return "it has no gain and no shift to fold"
        for name in readers:
            transposed = isinstance(self.model.get_submodule(name), Conv1D)
            weight, bias = (self._value(name, key) for key in ("weight", "bias"))
            weight = weight.T if transposed else weight
            if not bare:
                values[f"{name}.bias"] = bias + weight @ shift
            values[f"{name}.weight"] = (weight * gain).T if transposed else weight * gain
        if getattr(norm, "weight", None) is not None:
            values[f"{site.name}.weight"] = torch.ones_like(gain) - stock.offset
        if getattr(norm, "bias", None) is not None:
            values[f"{site.name}.bias"] = kept
        for name, value in values.items():
            dtype = self.model.get_parameter(name).dtype
            if not value.to(dtype).isfinite().all():
                return f"{name} would leave the range of {str(dtype).removeprefix('torch.')}"
        self.values |= values
        self.unties |= self.tied in readers
        return None

    def _value(self, name: str, key: str) -> torch.Tensor | None:
        value = getattr(self.model.get_submodule(name), key, None)
        return None if value is None else value.to("cpu", torch.float64)
