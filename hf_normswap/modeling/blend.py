"""LayerNorm mixed into the norms that take its place, less and less of it in a progressive swap."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from .configuration import check_layer_norm_shares
from .norm import Norm
from .sites import find_norms


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
    >>> from hf_normswap.modeling.blend import layer_norm_shares, set_layer_norm_share
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
