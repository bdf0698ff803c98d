"""One norm in place of another: the same parameters, hooks, device, dtype and training flag."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .base import Norm
from .configuration_normswap import check_layer_norm_shares
from .norm_sites import find_norms
from .norms import NormSwapConfig
from .registry import get_norm


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called along with `module`."""
    return any(getattr(module, hooks) for hooks in _HOOKS if hooks.endswith("_hooks"))


def new_norm(old: nn.Module, config: NormSwapConfig, *, on_default_device: bool = False) -> Norm:
    """The norm of `config` in place of `old`: the same parameters, hooks, device, dtype and training flag.

    A model under construction makes its buffers `on_default_device`, as every module of it does: its parameters may
    have gone to the meta device meanwhile, to be loaded. Running values that are not loaded with them stay NaN:
    accelerate's `load_checkpoint_and_dispatch` leaves buffers of what goes to disk out, unless `offload_buffers=True`.
    """
    cls = get_norm(config.norm)
    options = dict(config.options)
    if cls.keeps_eps:
        options.setdefault("eps", old.eps)
    options["bias"] = options.get("bias", True) and old.bias is not None
    device = None if on_default_device else old.weight.device
    norm = cls(old.weight.shape[0], device=device, dtype=old.weight.dtype, **options)
    norm.options, norm.replaced_eps = options, old.eps
    if on_default_device and old.weight.is_meta:
        for running in getattr(norm, "running", ()):
            getattr(norm, running).fill_(torch.nan)
    return _take_over(old, norm)


def new_layer_norm(old: Norm) -> nn.LayerNorm:
    """The LayerNorm that `old` replaced."""
    unblend_norm(old)  # its hooks go over to the new one
    norm = nn.LayerNorm(old.num_features, eps=old.replaced_eps, device=old.weight.device, dtype=old.weight.dtype)
    return _take_over(old, norm)


def _take_over(old: nn.Module, new: nn.Module) -> nn.Module:
    new.weight = old.weight  # the parameter itself: an optimizer built before, and ties, go on working
    if new.bias is not None and old.bias is not None:
        new.bias = old.bias
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
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
        layer_norm = functional.layer_norm(x, (norm.num_features,), norm.weight, norm.bias, norm.replaced_eps)
        return self.share * layer_norm + (1 - self.share) * output


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
    norms = {site.path: site.module for site in find_norms(model) if isinstance(site.module, Norm)}
    if not norms or "folded" in model.config.norm_swap:
        raise ValueError(f"This {type(model).__name__} has no swapped norms: call swap_norm(model, ...) first.")
    given = share if isinstance(share, Mapping) else dict.fromkeys(norms, share)
    check_layer_norm_shares(given, norms)
    shares = {path: float(value) for path, value in {**layer_norm_shares(model), **given}.items() if value}
    if shares and any(_blend_of(norms[path]) is None for path in given):
        torch.compiler.reset()  # a compiled model does not look whether it has new hooks
    for path, norm in norms.items():
        if not shares:
            unblend_norm(norm)
        elif path in given:  # at 0 too: one hook removed after the other would compile a model as often
            blend_norm(norm, given[path])
    record = {name: value for name, value in model.config.norm_swap.items() if name != "layer_norm_share"}
    model.config.norm_swap = {**record, "layer_norm_share": shares} if shares else record


def layer_norm_shares(model: nn.Module) -> dict[str, float]:
    """λ of each norm of `model` in which LayerNorm has a share, by [`NormSite`] path."""
    blends = {site.path: _blend_of(site.module) for site in find_norms(model)}
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
