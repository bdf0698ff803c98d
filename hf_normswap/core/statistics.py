"""The statistics of a whole model: the penalty, the discrepancy, and one update for a whole optimizer step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata

import torch
from packaging import version
from torch import nn

from hf_normswap.modeling.base import BatchStatisticNorm, GradientStatisticNorm
from hf_normswap.modeling.discrepancy import Statistics, training_inference_discrepancy
from hf_normswap.modeling.model_norms import active_modules
from hf_normswap.modeling.moments import Moments, gather_over_ranks, has_ranks, merge_moments
from hf_normswap.modeling.rbn import NO_PENALTY, RegularizedBatchNorm


def statistic_norms(model: nn.Module) -> list[BatchStatisticNorm]:
    """The norms of `model` with batch statistics, each once, in the order of the modules."""
    return [module for _, module in active_modules(model) if isinstance(module, BatchStatisticNorm)]


def refuse_lost_statistics(model: nn.Module) -> None:
    """Raises `ValueError` where training would move running statistics that the model's adapter does not save."""
    if not hasattr(model, "peft_config"):
        return
    norms = {name: norm for name, norm in active_modules(model) if isinstance(norm, BatchStatisticNorm)}
    lost = [name for name, norm in norms.items() if not norm.frozen and ".modules_to_save." not in name]
    if lost:
        raise ValueError(
            f"The adapter would not save the running statistics of {lost[0]}, which move in training: add "
            "[site.name for site in find_norms(model)] to its modules_to_save, or keep them with norm_freeze_ratio=0."
        )
    if norms and version.parse(metadata.version("peft")) < version.parse("0.21"):
        raise ValueError("PEFT before 0.21 calls a model past the hooks that bring the padding mask: upgrade it.")


def norm_penalty(model: nn.Module) -> torch.Tensor:
    """The RBN term of all training forwards since the last call, summed over layers: add it to a loss that is a mean.

    Call it before the backward of these forwards. A forward whose graph is freed by then is left out, with a warning.
    One under `torch.no_grad()` counts without a gradient: run what is not trained so, or in evaluation mode.

    Returns:
        `torch.Tensor`: a scalar with gradient; 0 for a model without RBN.

    Raises:
        RuntimeError: when there was no training forward since the last call, or its graph is freed.

    Example:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import norm_penalty, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertForSequenceClassification(config), "rbn").train()
    >>> output = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), labels=torch.tensor([0, 1]))
    >>> (output.loss + norm_penalty(model)).backward()

    ```
    """
    norms = statistic_norms(model)
    penalty = take_penalty(norms)
    if penalty is not None:
        return penalty
    if any(isinstance(norm, RegularizedBatchNorm) and norm.training for norm in norms):
        raise RuntimeError(NO_PENALTY)
    return torch.zeros((), device=next(model.parameters()).device)


def take_penalty(norms: Iterable[BatchStatisticNorm]) -> torch.Tensor | None:
    """The term of [`norm_penalty`], `None` where there is none to take."""
    regularized = [norm for norm in norms if isinstance(norm, RegularizedBatchNorm)]
    penalties = [penalty for norm in regularized for penalty in norm.take_penalties()]
    return torch.stack(penalties).sum() if penalties else None


@torch.no_grad()
def sum_discrepancies(norms: list[BatchStatisticNorm]) -> tuple[torch.Tensor, list[int]]:
    """TID of the recorded training forwards, summed over these.

    Layers of one width are taken together, without host synchronisation.

    Returns:
        The sums, of shape `(2, layers)`, of the mean TID and the variance TID of each layer; and the number of
        forwards that they are over, 0 for a layer that did not run or is frozen.
    """
    groups: dict[tuple, list[tuple[int, Statistics]]] = {}
    sums: list[torch.Tensor | int] = [0] * len(norms)
    counts = [len(norm.records) for norm in norms]
    for index, norm in enumerate(norms):
        for moments, running in norm.records:
            statistics = norm.compare(moments, running)
            has_mean = statistics.batch_mean is not None
            groups.setdefault((norm.num_features, norm.eps, has_mean), []).append((index, statistics))
    for (_, eps, _), members in groups.items():
        fields = zip(*(statistics for _, statistics in members), strict=True)
        stacked = Statistics(*(None if field[0] is None else torch.stack(field) for field in fields))
        values = torch.stack(training_inference_discrepancy(stacked, eps))
        for (index, _), value in zip(members, values.unbind(1), strict=True):
            sums[index] = sums[index] + value
    if not groups:
        return torch.zeros(2, len(norms), device=norms[0].weight.device if norms else None), counts
    absent = values.new_zeros(2)
    return torch.stack([total if count else absent for total, count in zip(sums, counts)], dim=1), counts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, and every module of it back in its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def observing(norms: Iterable[BatchStatisticNorm]) -> Iterator[None]:
    """Let `norms` see batches as in training, each process its own, and put them back as they were afterwards.

    What they saw is in [`BatchStatisticNorm.pending`](hf_normswap.BatchStatisticNorm), and nowhere else.
    """
    norms = list(norms)
    flags = "training", "frozen", "accumulating", "paused", "process_group", "records", "penalties"
    before = [{name: getattr(norm, name) for name in flags} for norm in norms]
    buffers = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        for norm in norms:
            norm.accumulating, norm.frozen, norm.paused, norm.process_group = True, False, False, None
            norm.forget_statistics()
            norm.discard_pending()
            if isinstance(norm, GradientStatisticNorm):
                norm.loss_scale.fill_(1)
            norm.train()
        yield
    finally:
        for norm, values, saved in zip(norms, before, buffers, strict=True):
            for name, value in values.items():
                setattr(norm, name, value)
            with torch.no_grad():
                for name, buffer in norm.named_buffers():
                    buffer.copy_(saved[name])


def accumulate_norm_statistics(model: nn.Module, accumulating: bool = True) -> None:
    """Accumulate the statistics of the forwards of an optimizer step, and keep the running values as they are.

    Every forward adds to what the next [`update_norm_statistics`] takes in at once: the
    micro-batches of gradient accumulation then count as the one batch that they are.
    """
    for norm in statistic_norms(model):
        norm.accumulating = accumulating
        norm.discard_pending()


@contextmanager
def pause_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Keep forwards out of the statistics: for a second forward in a step, on perturbed inputs or weights.

    Inside, norms in training mode normalise as in any training forward. Running statistics, those that are pooled for
    the next update, PowerNorm's statistic of the gradient and the logged TID stay as they are. [`norm_penalty`] counts
    these forwards too; where it is not called before their backward, that brings no warning.

    Args:
        model (`torch.nn.Module`): with swapped norms, or one of them.

    Example:

    A step of sharpness-aware minimisation (SAM), whose gradient is taken at perturbed weights:

    ```python
    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from hf_normswap import norm_penalty, pause_norm_statistics, swap_norm
    >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    >>> model = swap_norm(BertForSequenceClassification(config), "rbn").train()
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "labels": torch.tensor([0, 1])}
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> (model(**batch).loss + norm_penalty(model)).backward()
    >>> weights = [weight for weight in model.parameters() if weight.grad is not None]
    >>> length = torch.stack([weight.grad.norm() for weight in weights]).norm()
    >>> steps = [0.05 * weight.grad / length for weight in weights]
    >>> with torch.no_grad():
    ...     for weight, step in zip(weights, steps):
    ...         weight += step
    >>> optimizer.zero_grad()
    >>> with pause_norm_statistics(model):
    ...     (model(**batch).loss + norm_penalty(model)).backward()
    >>> with torch.no_grad():
    ...     for weight, step in zip(weights, steps):
    ...         weight -= step
    >>> optimizer.step()

    ```
    """
    norms = statistic_norms(model)
    before = [norm.paused for norm in norms]
    for norm in norms:
        norm.paused = True
    try:
        yield
    finally:
        for norm, paused in zip(norms, before, strict=True):
            norm.paused = paused


def freeze_norm_statistics(model: nn.Module, frozen: bool = True) -> None:
    """Keep running statistics as they are, and normalise with them in training too.

    Norms with batch statistics then are one affine map per channel, with a gain and a shift to train: what a
    calibrated model computes does not depend on the batch, and training goes on from its function.

    Raises:
        ValueError: when a norm has no running statistics yet, only those of a new one.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap import BatchNorm, freeze_norm_statistics
    >>> norm = BatchNorm(4)
    >>> output = norm(torch.randn(8, 4))
    >>> freeze_norm_statistics(norm)
    >>> norm.train().training
    False

    ```
    """
    norms = statistic_norms(model)
    # Not every norm runs: cross-attention that is given no encoder does not.
    if frozen and norms and not any(norm.num_batches_tracked for norm in norms):
        raise ValueError("The norms have no statistics to keep yet: calibrate the model, or train it, first.")
    for norm in norms:
        norm.frozen = frozen
        norm.train(model.training)


def set_norm_process_group(model: nn.Module, process_group=None, synchronized: bool = True) -> None:
    """Let norms normalise with the statistics of all ranks together, as one process would.

    Each then takes part in one collective in a training forward and in one in its backward: every rank has to run the
    same training forwards. PowerNorm needs that for its warm-up alone: afterwards it normalises with statistics from
    before the batch. Call it on every rank, before training; [`NormSwapTrainer`] does, and ends it for PowerNorm with
    the warm-up.

    Args:
        model (`torch.nn.Module`): with swapped norms, or one of them.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            the ranks to take together, for example those of one node; all of them by default.
        synchronized (`bool`, *optional*, defaults to `True`): whether to do so; else each rank is on its own again.
    """
    if synchronized and has_ranks():
        group = process_group or torch.distributed.group.WORLD
    else:
        group = None
    for norm in statistic_norms(model):
        norm.process_group = group


@torch.no_grad()
def update_norm_statistics(model: nn.Module) -> None:
    """Update the running statistics of all layers with what was pooled since the last call, over all ranks.

    It takes one collective for the whole model, and none where [`set_norm_process_group`] has pooled the statistics of
    all ranks already. Call it once per optimizer step, on every rank, after [`accumulate_norm_statistics`];
    [`NormSwapTrainer`] does both.
    """
    norms = statistic_norms(model)
    if not norms:
        return
    gradient_norms = [norm for norm in norms if isinstance(norm, GradientStatisticNorm)]
    packed = [norm.pending for norm in norms] + [norm.pending_gradient for norm in gradient_norms]
    everywhere = not gradient_norms and has_ranks()
    everywhere = everywhere and all(norm.process_group is torch.distributed.group.WORLD for norm in norms)
    pending = torch.cat(packed)
    gathered = pending.unsqueeze(0) if everywhere else gather_over_ranks(pending)
    parts = gathered.split([pending.numel() for pending in packed], dim=1)
    # ν first: its step size belongs to the number of updates from before this one.
    for norm, part in zip(gradient_norms, parts[len(norms) :], strict=True):
        norm.update_gradient_statistic(part.sum(0))
    for norm, part in zip(norms, parts[: len(norms)], strict=True):
        norm.update_statistics(merge_moments(Moments(part)))
        norm.discard_pending()
