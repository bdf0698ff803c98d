"""The last norm of a model, which a linear layer makes logits of: fitted to the predictions themselves."""

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_normswap.core.data import predicted_tokens
from hf_normswap.core.model_state import run_model
from hf_normswap.core.norm_sites import NormSite, describe
from hf_normswap.core.residual_stream import ResidualStream
from hf_normswap.modeling.backends import promote
from hf_normswap.modeling.moments import sum_over_ranks

from .least_squares import tokens_of_all_ranks
from .sequential import Reached


# Products of a token and the linear layer in one pass: 3,000 tokens of BERT-base, whose vocabulary is 30,000.
_PRODUCTS = 2**36
_FEWEST, _MOST = 1024, 4096  # tokens, whatever the size of the linear layer
_HELD_OUT = 5  # every fifth token takes no part in the fit; these tokens say when to stop
_ROUNDS, _STEPS = 8, 5
_ENOUGH = 0.98  # a round that lowers the divergence by less is the last one
_LOGITS = 2**24  # at once


def find_predictors(model: PreTrainedModel, sites: Iterable[NormSite]) -> dict[str, str]:
    """For those of the norms whose output a linear layer makes logits of, the name of this layer.

    In a model whose forward could not be followed none is known.
    """
    if describe(model).obstacle is not None:
        return {}
    stream = ResidualStream(model)
    # The output of a norm with statistics of sentences depends on other tokens, too.
    of_tokens = [site for site in sites if "sentence" not in getattr(site.module, "scope", ())]
    found = {site.name: stream.predictor(site) for site in of_tokens}
    return {name: linear for name, linear in found.items() if linear is not None}


def both(mask: torch.Tensor | None, other: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor | None:
    """The tokens of `values` that are in both masks; `None` stands for all tokens."""
    if mask is None or other is None:
        mask = other if mask is None else mask
        return None if mask is None else mask.reshape(values.shape[:-1])
    return mask & other.view_as(mask)


@torch.inference_mode(False)  # which a caller may be in, and which lets nothing have a gradient
def tokens_of_predictions(model: PreTrainedModel, batches: Iterable[dict], norm: str, linear: str) -> list:
    """For each batch, which tokens of a norm's output the predictions are made of, in its shape without channels.

    The linear layer may read all tokens, or the first one, as in ViT. A masked language model predicts masked tokens.
    """
    tokens, seen = [], {}

    def stop(module, args):
        (gradient,) = torch.autograd.grad(args[0].sum(), seen["states"])
        tokens.append((gradient != 0).any(-1))
        raise Reached

    for batch in batches:
        handles = [
            model.get_submodule(norm).register_forward_hook(functools.partial(_cut, seen=seen, name="states")),
            model.get_submodule(linear).register_forward_pre_hook(stop, prepend=True),
        ]
        try:
            with torch.no_grad():
                run_model(model, batch)
        except Reached:
            pass
        else:
            raise ValueError(f"A batch does not reach {linear}, as others do: pass batches of one kind.")
        finally:
            for handle in handles:
                handle.remove()
        predicted = predicted_tokens(model, batch)
        if predicted is not None and predicted.numel() == tokens[-1].numel():
            tokens[-1] &= predicted.to(tokens[-1].device).view_as(tokens[-1])
    return tokens


@torch.inference_mode(False)
def logits_layer(model: PreTrainedModel, batches: list[dict], norm: str, linear: str) -> nn.Linear:
    """What makes logits of the output of a norm, as one linear layer in at least float32.

    That is more than the layer `linear` where the model multiplies tokens or logits by a number or adds a constant to
    them. Both are measured on one token; a rank without batches learns of them from the others.
    """
    layer, seen = model.get_submodule(linear), {}
    weight = promote(layer.weight.detach())
    weight = weight.T if isinstance(layer, Conv1D) else weight

    def keep(module, args):
        torch.set_grad_enabled(False)  # the weights may have been made in inference mode
        seen["read"] = args[0]

    measured = weight.new_zeros(2 + len(weight))  # the number of ranks with a batch, factors, and constants
    if batches:
        handles = [
            model.get_submodule(norm).register_forward_hook(functools.partial(_cut, seen=seen, name="states")),
            layer.register_forward_pre_hook(keep),
            layer.register_forward_hook(functools.partial(_cut, seen=seen, name="made")),
        ]
        try:
            with torch.no_grad():
                logits = run_model(model, batches[0]).logits.flatten(0, -2)[-1]
        finally:
            for handle in handles:
                handle.remove()
        after, place = _factor(logits, seen["made"])
        before, place = _factor(seen["read"].flatten(0, -2)[place], seen["states"])
        state = promote(seen["states"].detach().flatten(0, -2)[place])
        constant = promote(logits.detach()) - after * before * functional.linear(state, weight)
        measured = torch.cat([torch.stack([torch.ones_like(after), after * before]), constant]).to(weight)
    count, factor, *_ = measured = sum_over_ranks(measured)
    found = nn.Linear(*weight.T.shape, device="meta")
    found.weight, found.bias = nn.Parameter(weight * (factor / count)), nn.Parameter(measured[2:] / count)
    return found


def _cut(module, args, output, seen: dict, name: str) -> torch.Tensor:
    """A hook that begins a graph at the output of a module, which it keeps: what comes before needs none."""
    torch.set_grad_enabled(True)
    seen[name] = output.detach().requires_grad_()
    return seen[name]


def _factor(result: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """By how much one of the tokens `values` is multiplied on the way to `result`, and which one it is."""
    (gradient,) = torch.autograd.grad(result.sum(), values)
    gradient = promote(gradient.flatten(0, -2))
    place = int(gradient.any(-1).nonzero()[-1])
    return gradient[place, 0], place


def count_of_tokens(linear: nn.Module) -> int:
    """How many tokens a fit takes, about: a large vocabulary makes each of them expensive."""
    return min(_MOST, max(_FEWEST, _PRODUCTS // linear.weight.numel()))


@torch.inference_mode(False)
def fit_to_predictions(
    x: torch.Tensor, target: torch.Tensor, linear: nn.Module, gain: torch.Tensor, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gain and shift for which `linear(gain · x + shift)` predicts what `linear(target)` does.

    Least squares weigh all errors alike, and a few directions decide about the predictions. So this lowers the
    Kullback–Leibler divergence of the softmax by L-BFGS, from the least-squares fit on, as long as the divergence of
    tokens that are held out falls, too.

    Args:
        x (`torch.Tensor` of shape `(N, C)`): normalised tokens of this rank.
        target (`torch.Tensor` of shape `(N, C)`): what the original norm returns for them.
        linear (`torch.nn.Linear`): what makes logits of it, as [`logits_layer`] returns it.
        gain, shift (`torch.Tensor` of shape `(C,)`): those to start from; a `shift` of `None` stays away.
    """
    weight, bias = linear.weight.detach(), linear.bias.detach()
    tokens = tokens_of_all_ranks(torch.stack([promote(x), promote(target)]), dim=1)
    # In an order that neither batches nor ranks decide, so that the same tokens are held out.
    tokens = tokens[:, tokens[1, :, 0].argsort(stable=True)]
    is_held_out = torch.arange(tokens.shape[1], device=tokens.device) % _HELD_OUT == _HELD_OUT - 1
    fitted, held_out = tokens[:, ~is_held_out], tokens[:, is_held_out]
    start = [gain] if shift is None else [gain, shift]
    parameters = [value.detach().to(weight.dtype, copy=True).requires_grad_() for value in start]

    def divergence(tokens, is_fitting=False):
        """Mean over tokens; where it `is_fitting` the gradient is added to that of the parameters."""
        total = 0.0
        for x, t in zip(*(each.split(max(1, _LOGITS // len(weight))) for each in tokens), strict=True):
            with torch.no_grad():
                wanted = functional.linear(t, weight, bias).log_softmax(-1)
            y = x * parameters[0] if shift is None else torch.addcmul(parameters[1], x, parameters[0])
            found = functional.linear(y, weight, bias).log_softmax(-1)
            part = functional.kl_div(found, wanted, log_target=True, reduction="sum") / tokens.shape[1]
            if is_fitting:
                part.backward()
            total += part.detach()
        return total

    optimizer = torch.optim.LBFGS(parameters, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        return divergence(fitted, is_fitting=True)

    best, values = divergence(held_out), [value.detach().clone() for value in parameters]
    for _ in range(_ROUNDS if held_out.numel() else 0):
        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            now = divergence(held_out)
        is_slow = not now < _ENOUGH * best
        if now < best:
            best, values = now, [value.detach().clone() for value in parameters]
        if is_slow:
            break
    return values[0], None if shift is None else values[1]
