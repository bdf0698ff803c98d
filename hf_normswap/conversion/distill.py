"""Train a converted model against the original one: unlabelled text takes away most of what a calibration leaves."""

import functools
from collections.abc import Container, Iterable

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_normswap.core.data import complete_batches, make_batches, predicted_tokens
from hf_normswap.core.model_state import check_swapped, outside_modes, run_model
from hf_normswap.core.norm_sites import find_norms
from hf_normswap.modeling.base import Norm
from hf_normswap.modeling.moments import gather_over_ranks, has_ranks, sum_over_ranks
from hf_normswap.modeling.padding_mask import current_mask

from .fitting import check_teacher, linears_of_blocks, places_of_linears
from .predictions import find_predictors


# Share of the steps in which the rate rises: the first steps of Adam are as long as it, whatever the gradient is.
_WARM_UP = 0.1


@outside_modes
@torch.enable_grad()
def distill(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Iterable,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    linears: bool = True,
    steps: int = 200,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
) -> list[float]:
    """Train the swapped norms and the linear layers of the blocks to bring `model` nearer to `teacher`, in place.

    It takes no labels. The model stays in evaluation mode: running statistics are constants, embeddings and heads too.
    A pruned or parametrized linear layer is trained in the parameters that its weight is computed from, one with an
    adapter in its own weight and in those of the adapter. The loss is the relative squared distance of the norms'
    outputs to those of the teacher's LayerNorms, summed over norms, and the Kullback–Leibler divergence of the two
    predictions (squared distance where there is one output). A norm that predictions are made of counts by these
    alone. AdamW, gradients of norm 1 at most, and a learning rate that rises over a tenth of the steps and then falls
    linearly to 0.

    On several ranks each passes its own share of the data, at least one batch; gradients are averaged.

    Args:
        model ([`~transformers.PreTrainedModel`]): swapped, best after [`calibrate`], in evaluation mode.
        teacher ([`~transformers.PreTrainedModel`]): the model with its LayerNorms, in evaluation mode.
        data, tokenizer, batch_size: as in [`calibrate`]; the more text the better.
        linears (`bool`, *optional*, defaults to `True`):
            whether to train linear layers; else gains and shifts alone, which want a larger learning rate.
        steps (`int`, *optional*, defaults to 200): optimizer steps; the data is gone through in a random order.
        learning_rate (`float`, *optional*, defaults to 1e-4): at the start; half of that of the training is good.
        seed (`int`, *optional*, defaults to 0): of the order.

    Returns:
        `list[float]`: the loss of each step.

    Raises:
        ValueError: as [`calibrate`] does, or when a linear layer has no weight to train, as a quantized one has not.
    """
    check_swapped(model)
    sites = [site for site in find_norms(model) if isinstance(site.module, Norm)]
    norms = {site.name: site.module for site in sites}
    check_teacher(teacher, norms)
    last = find_predictors(model, sites)
    if any(norm.weight.dtype.itemsize < torch.float32.itemsize for norm in norms.values()):
        raise ValueError("Steps of half precision are too coarse for a distillation: call model.float() first.")
    if linears:
        _check_trainable(places_of_linears(model))
    batches = complete_batches(teacher, make_batches(model, data, tokenizer, batch_size))
    if min(gather_over_ranks(torch.tensor(len(batches), device=model.device)).tolist()) == 0:
        raise ValueError("A process has no batch to learn from: give each of them some of the data.")
    trained = [*norms.values(), *(linears_of_blocks(model).values() if linears else ())]
    parameters = list(dict.fromkeys(parameter for module in trained for parameter in module.parameters()))
    before = [parameter.detach().clone() for parameter in parameters]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_share_of_learning_rate, steps=steps))
    world_size, silent = 1, False
    if has_ranks():
        world_size, silent = torch.distributed.get_world_size(), torch.distributed.get_rank() > 0
    generator, losses = torch.Generator().manual_seed(seed), []
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in tqdm(range(steps), "Distilling", disable=silent):
            if step % len(batches) == 0:
                order = torch.randperm(len(batches), generator=generator).tolist()
            loss = _distance(model, teacher, norms, last, batches[order[step % len(batches)]]) / world_size
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = sum_over_ranks(gradient)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            losses.append(sum_over_ranks(loss.detach()).item())
            optimizer.step()
            schedule.step()
    except BaseException:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        raise
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value)
        for parameter in parameters:
            parameter.grad = None
    return losses


def _share_of_learning_rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 - step / steps)


def _check_trainable(linears: dict[str, nn.Module]) -> None:
    """Raises `ValueError` for linear layers without weights to train, as a quantized one is."""
    for name, module in linears.items():
        parameters = list(module.parameters())
        if not parameters or not all(parameter.is_floating_point() for parameter in parameters):
            raise ValueError(
                f"{name}, a {type(module).__module__}.{type(module).__name__}, has no weight that can be trained: "
                "distill the model before it is quantized."
            )


def _distance(model, teacher, norms: dict[str, nn.Module], last: Container[str], batch: dict) -> torch.Tensor:
    """The loss of one batch; the outputs of the `last` norms count by the predictions alone."""
    ours, prediction = _observe(model, norms, batch)
    with torch.no_grad():
        theirs, wanted = _observe(teacher, norms, batch)
    relative = []
    for name, (output, mask) in ours.items():
        if name in last:
            continue
        output, original = (values if mask is None else values[mask] for values in (output, theirs[name][0]))
        relative.append((output - original).square().sum() / original.square().sum())
    # Their sum, not their mean: predictions alone teach little. In 100 steps a Marian came from 8.5 to 5.5 % too much
    # loss with the mean, to 3.9 with 40 times that; the error of MiniLM's logits from 0.149 to 0.153, or to 0.130.
    distance = torch.stack(relative).sum() if relative else 0.0
    distance = distance + _divergence(prediction, wanted, mask)
    # Masked tokens are few: alone, they teach half as much in as many steps.
    if (predicted := predicted_tokens(model, batch)) is not None and predicted.any():
        distance = distance + _divergence(prediction, wanted, predicted)
    return distance


def _observe(model, norms: dict[str, nn.Module], batch: dict) -> tuple[dict, torch.Tensor | None]:
    """Outputs and token masks of the norms by name, and the logits, if the model has a head."""
    seen = {}

    def keep(module, args, output, name):
        seen[name] = output, current_mask(args[0])

    handles = [model.get_submodule(name).register_forward_hook(functools.partial(keep, name=name)) for name in norms]
    try:
        return seen, getattr(run_model(model, batch), "logits", None)
    finally:
        for handle in handles:
            handle.remove()


def _divergence(prediction, wanted, mask) -> torch.Tensor | float:
    if prediction is None:
        return 0.0
    if prediction.dim() == 3 and mask is not None and prediction.shape[:2] == mask.shape:
        prediction, wanted = prediction[mask], wanted[mask]
    if prediction.shape[-1] == 1:
        return functional.mse_loss(prediction, wanted)
    prediction, wanted = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).flatten(0, -2)
        for logits in (prediction, wanted)
    )
    return functional.kl_div(prediction, wanted, log_target=True, reduction="batchmean")
