"""One norm in place of another: the same parameters, hooks, device, dtype and training flag."""

import copy
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .base import Norm
from .configuration_normswap import check_layer_norm_shares
from .linears import ChangedLinear
from .model_norms import HOOKS, StockNorm, norm_width, read_norm, swapped_norms
from .norms import NormSwapConfig
from .registry import get_norm


def new_norm(
    old: nn.Module, config: NormSwapConfig, *, on_default_device: bool = False, like: torch.Tensor | None = None
) -> Norm:
    """The norm of `config` in place of `old`: the same parameters, hooks, device, dtype and training flag.

    A gain that is stored minus 1 becomes a new parameter, and a norm without gain gets one, with the device and the
    dtype of `like`. There is a shift where the old norm has one and the new one wants it, or where the option `bias`
    asks for it.

    A model under construction makes its buffers `on_default_device`, as every module of it does: its parameters may
    have gone to the meta device meanwhile, to be loaded. Running values that are not loaded with them stay NaN:
    accelerate's `load_checkpoint_and_dispatch` leaves buffers of what goes to disk out, unless `offload_buffers=True`.
    """
    cls = get_norm(config.norm)
    stock = stock_of(old)
    options = dict(config.options)
    if cls.keeps_eps:
        options.setdefault("eps", stock.eps)
    options.setdefault("bias", cls.wants_shift(getattr(old, "bias", None) is not None))
    weight = next(iter(old.parameters()), like)
    dtype = {} if weight is None else {"dtype": weight.dtype}
    device = None if on_default_device or weight is None else weight.device
    norm = cls(norm_width(old), device=device, **dtype, **options)
    norm.options, norm.stock = options, stock
    # Not by setattr, which would make it a part of the model.
    vars(norm)["replaced"] = old.replaced if isinstance(old, Norm) else _without_parameters(old)
    if on_default_device and weight is not None and weight.is_meta:
        for running in getattr(norm, "running", ()):
            getattr(norm, running).fill_(torch.nan)
    places = [name for name in ("weight", "bias") if norm._parameters.get(name) is not None]
    return _take_over(old, norm, places, 0.0 if isinstance(old, Norm) else stock.offset)


def new_stock_norm(old: Norm) -> nn.Module:
    """The norm of transformers that `old` replaced, with the gain and the shift that `old` has now."""
    unblend_norm(old)  # its hooks go over to the new one
    new = copy.copy(old.replaced)
    new._parameters = dict(new._parameters)
    places = new._parameters.keys() - (set() if old.stock.has_shift else {"bias"})
    _take_over(old, new, places, -old.stock.offset)
    if old.stock.has_shift and new.bias is None:
        new.bias = nn.Parameter(torch.zeros_like(old.weight))
    return new


def stock_of(norm: nn.Module) -> StockNorm:
    """What the norm of transformers computes that `norm` is, or that it has replaced.

    Raises:
        ValueError: when `norm` is none.
    """
    stock = norm.stock if isinstance(norm, Norm) else read_norm(norm)
    if stock is None:
        raise ValueError(f"A {type(norm).__name__} is neither a LayerNorm nor an RMSNorm, and cannot be replaced.")
    return stock


def _without_parameters(norm: nn.Module) -> nn.Module:
    """A copy that can be put back once it is given parameters: it knows its class and its settings."""
    shell = copy.copy(norm)
    shell.__dict__.pop("forward", None)
    shell._parameters = dict.fromkeys(norm._parameters)
    for hooks in HOOKS:
        setattr(shell, hooks, None if hooks == "_is_full_backward_hook" else type(getattr(norm, hooks))())
    return shell


def _take_over(old: nn.Module, new: nn.Module, places: Collection[str], offset: float) -> nn.Module:
    """Give `new` the parameters, hooks and training flag of `old`; `offset` is added to the gain."""
    for name in places:
        parameter = getattr(old, name, None)
        if parameter is None:
            continue
        if name == "weight" and isinstance(old, Norm) and not old.has_gain:
            parameter = nn.Parameter(old.channel_gain().detach() + offset)
        elif name == "weight" and offset:
            parameter = nn.Parameter(parameter.detach() + offset, requires_grad=parameter.requires_grad)
        # Else the parameter itself: an optimizer built before, and ties, go on working.
        new._parameters[name] = parameter
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    own = list(old.parameters(recurse=False))
    if own and not any(parameter.requires_grad for parameter in own):
        new.requires_grad_(False)  # a frozen norm stays frozen, whatever the new one has beside gain and shift
    return new.train(old.training)


def change_class(module: nn.Module, cls: type) -> None:
    """Make a live module one of the class `cls`, with what construction does for its class.

    transformers notes the outputs that a class of models can record, such as hidden states, when one is constructed.
    """
    module.__class__ = cls
    if isinstance(module, PreTrainedModel):
        # By the name of the class, in every version; later ones derive it from a model that is given as the key.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)


def place_norms(model: nn.Module, norms: dict[str, nn.Module]) -> None:
    """Put each norm in its place."""
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, norm)


def change_linears(model: nn.Module, norms: Mapping[str, str]) -> None:
    """Make linear layers, by name, what the norm of that registered name wants them to be in its sublayer."""
    for name, norm in norms.items():
        linear = model.get_submodule(name)
        change_class(linear, get_norm(norm).linear_classes[type(linear)])
        linear.begin()


def restore_linears(model: nn.Module) -> None:
    """Make the linear layers plain that [`change_linears`] has changed."""
    for module in model.modules():
        if isinstance(module, ChangedLinear):
            module.end()
            change_class(module, type(module).__bases__[-1])


def pass_through(x: torch.Tensor) -> torch.Tensor:
    """`x` itself: stands where a norm was."""
    return x


def remove_norms(model: nn.Module, names: Iterable[str]) -> None:
    """Leave no module in the places `names`."""
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        delattr(parent, child)
        setattr(parent, child, pass_through)


def untie_head(model: PreTrainedModel, name: str) -> None:
    """Give the linear layer `name` a weight of its own, a copy of the embedding table that it shared."""
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    key = f"{name}.weight"
    for table in ("_tied_weights_keys", "all_tied_weights_keys"):
        setattr(model, table, {target: source for target, source in getattr(model, table).items() if target != key})


def add_bias(linear: nn.Linear) -> None:
    """Give a linear layer that has none a bias of zeros."""
    zeros = linear.weight.new_zeros(linear.out_features)
    linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)


class LayerNormBlend:
    """Forward hook of a swapped norm: `y = λ · LayerNorm(x) + (1 − λ) · norm(x)`.

    Both have the gain and shift of the norm, and the LayerNorm the eps of the one that was replaced: parameters and
    state dict stay as they are.

    Attributes:
        share (`torch.Tensor`): λ, a scalar.
    """

    share: torch.Tensor

    def __call__(self, norm: Norm, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if not (norm.weight.is_meta and hasattr(norm, "_hf_hook")):
            return self._mix(norm, output, *args, **kwargs)
        # Offloaded by accelerate, gain and shift are there in norm.forward alone: this brings them once more.
        args, kwargs = norm._hf_hook.pre_forward(norm, *args, **kwargs)
        return norm._hf_hook.post_forward(norm, self._mix(norm, output, *args, **kwargs))

    def _mix(self, norm, output, x, mask=None):
        x = norm.select_finite(x, norm.token_mask(x, mask))
        return self.share * norm.stock.apply(x, norm.weight, norm.bias) + (1 - self.share) * output


def set_layer_norm_share(model: nn.Module, share: float | Mapping[str, float]) -> None:
    """Make the swapped norms of `model` compute `λ · LayerNorm(x) + (1 − λ) · norm(x)`.

    With λ = 1 everywhere the model is the one from before the swap; with λ = 0 everywhere, as after a swap, nothing of
    the mixture is left. `model.config.norm_swap` records the shares: a saved model loads as the mixture that it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): a model with swapped norms.
        share (`float` or mapping of `str` to `float`):
            λ between 0 and 1, of every swapped norm or by [`NormSite`] path.

    Raises:
        ValueError: when the model has no swapped norms, a path is not that of one, or λ is not between 0 and 1.

    Example:

    ```python
    >>> from transformers import BertConfig, BertModel
    >>> from hf_normswap import swap_norm
    >>> from hf_normswap.modeling.replace import layer_norm_shares, set_layer_norm_share
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertModel(config), "batchnorm", where="ffn")
    >>> set_layer_norm_share(model, 0.5)
    >>> layer_norm_shares(model)
    {'bert.encoder.layer.0.output.LayerNorm': 0.5}

    ```
    """
    norms = swapped_norms(model)
    if not norms or "folded" in model.config.norm_swap:
        raise ValueError(f"This {type(model).__name__} has no swapped norms: call swap_norm(model, ...) first.")
    given = share if isinstance(share, Mapping) else dict.fromkeys(norms, share)
    check_layer_norm_shares(given, norms)
    shares = {path: float(value) for path, value in {**layer_norm_shares(model), **given}.items() if value}
    if shares:
        _refuse_without_gain(norms)
    if shares and any(_blend_of(norms[path]) is None for path in given):
        torch.compiler.reset()  # a compiled model does not look whether it has new hooks
    for path, norm in norms.items():
        if not shares:
            unblend_norm(norm)
        elif path in given:  # at 0 too: one hook removed after the other would compile a model as often
            blend_norm(norm, given[path])
    record = {name: value for name, value in model.config.norm_swap.items() if name != "layer_norm_share"}
    model.config.norm_swap = {**record, "layer_norm_share": shares} if shares else record


def _refuse_without_gain(norms: Mapping[str, Norm]) -> None:
    for path, norm in norms.items():
        if not norm.has_gain:
            raise ValueError(
                f"LayerNorm and the norm that takes its place share the gains while they are mixed, and {path}, a "
                f"{norm.norm_name}, has none: swap to it without a mixture, or to another norm."
            )


def layer_norm_shares(model: nn.Module) -> dict[str, float]:
    """λ of each norm of `model` in which LayerNorm has a share, by [`NormSite`] path."""
    blends = {path: _blend_of(norm) for path, norm in swapped_norms(model).items()}
    shares = {path: blend.share.item() for path, blend in blends.items() if blend is not None}
    return {path: share for path, share in shares.items() if share}


def blend_norm(norm: Norm, share: float) -> None:
    """Let one norm compute the mixture; [`set_layer_norm_share`] also records it."""
    blend = _blend_of(norm)
    if blend is None:
        blend = LayerNormBlend()
        # Before all other hooks, which see what the layer returns.
        norm.register_forward_hook(blend, prepend=True, with_kwargs=True)
    # A number would be a constant of compiled models, which each λ would compile anew. A scalar on the CPU goes with
    # tensors on any device.
    blend.share = torch.tensor(share, dtype=torch.float64, device="cpu")


def unblend_norm(norm: Norm) -> None:
    """Let one norm compute what it does by itself."""
    for key in [key for key, hook in norm._forward_hooks.items() if isinstance(hook, LayerNormBlend)]:
        del norm._forward_hooks[key]
        del norm._forward_hooks_with_kwargs[key]


def _blend_of(norm: nn.Module) -> LayerNormBlend | None:
    return next((hook for hook in norm._forward_hooks.values() if isinstance(hook, LayerNormBlend)), None)
