"""Trainers for models with swapped norms."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_normswap.core.statistics import (
    accumulate_norm_statistics,
    freeze_norm_statistics,
    refuse_lost_statistics,
    set_norm_process_group,
    statistic_norms,
    sum_discrepancies,
    take_penalty,
    update_norm_statistics,
)
from hf_normswap.diagnostics.tid import TidHistory, has_mean
from hf_normswap.modeling.base import BatchStatisticNorm, GradientStatisticNorm, Norm
from hf_normswap.modeling.linears import ChangedLinear
from hf_normswap.modeling.model_norms import refuse_other_copy
from hf_normswap.modeling.moments import has_ranks
from hf_normswap.modeling.powernorm import PowerNorm
from hf_normswap.modeling.rbn import RegularizedBatchNorm
from hf_normswap.reporting.card import add_tags, card_of_model, drop_local_base
from hf_normswap.reporting.results import load_results

from .checkpoints import LAST_FILE, find_last_checkpoint
from .progressive import ProgressiveSwapCallback, mean_layer_norm_share
from .training_args import NormSwapSeq2SeqTrainingArguments, NormSwapTrainingArguments


class _NormLogs:
    """Sums of the TID and of the penalty since the last log entry, on the device: nothing waits for them."""

    def reset(self, layers: int) -> None:
        self.discrepancy, self.forwards = 0, [0] * layers  # of the layers, and how many forwards these were
        self.penalty, self.backwards = 0, 0

    def take_records(self, norms: list[BatchStatisticNorm]) -> torch.Tensor | None:
        """Take the records of `norms`: add up their TID, and return their penalty, if there is one."""
        if any(norm.records for norm in norms):
            discrepancy, forwards = sum_discrepancies(norms)
            self.discrepancy = self.discrepancy + discrepancy
            self.forwards = [ours + theirs for ours, theirs in zip(self.forwards, forwards, strict=True)]
        penalty = take_penalty(norms)
        for norm in norms:
            norm.forget_statistics()
        return penalty

    def add_penalty(self, penalty: torch.Tensor) -> None:
        """Add the penalty of one backward."""
        self.penalty, self.backwards = self.penalty + penalty, self.backwards + 1

    def means(self, device: torch.device, reduce: Callable) -> tuple[torch.Tensor, float | None]:
        """The mean TID of each layer, of shape `(2, layers)`, NaN for one that never ran; and the mean penalty.

        `reduce` adds up a tensor over all ranks: a layer may have run on some of them only.
        """
        layers = len(self.forwards)
        sums = (torch.zeros(2, layers, device=device) + self.discrepancy).flatten()
        penalty = torch.zeros(1, device=device) + self.penalty
        counts = torch.tensor([*self.forwards, self.backwards], device=device)
        sums, penalty, counts = reduce(torch.cat([sums, penalty, counts])).split([2 * layers, 1, layers + 1])
        return sums.view(2, layers) / counts[:-1], (penalty / counts[-1:]).item() if counts[-1] else None


class NormStatisticsCallback(TrainerCallback):
    """Updates running statistics once per optimizer step, from all its micro-batches and ranks."""

    def __init__(self, logs: _NormLogs):
        self._logs = logs
        self.frozen: list[BatchStatisticNorm] = []  # by the training, not by the user

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._is_frozen, self._is_warming_up = False, True
        accumulate_norm_statistics(model)
        if args.norm_sync != "none":
            set_norm_process_group(model, _node_group() if args.norm_sync == "node" else None)
        for norm in statistic_norms(model):
            norm.forget_statistics()  # of forwards before the training
        left = _warmup_steps(args, state) - state.global_step
        for norm in _power_norms(model):
            # Updates of earlier runs, and of a calibration, are in num_batches_tracked too.
            norm.warmup_steps = norm.num_batches_tracked.item() + left if left > 0 else 0

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        freeze = args.norm_freeze_ratio < 1 and state.global_step >= round(args.norm_freeze_ratio * state.max_steps)
        if freeze and not self._is_frozen:
            self.frozen = [norm for norm in statistic_norms(model) if not norm.frozen]
            freeze_norm_statistics(model)
            self._is_frozen = True
        if self._is_warming_up and state.global_step >= _warmup_steps(args, state):
            for norm in _power_norms(model):
                norm.process_group, norm.warmup_steps = None, 0
            self._is_warming_up = False
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None or args.world_size > 1:
            _set_loss_scale(model, _scale_of(scaler) * args.world_size)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norms = statistic_norms(model)
        if any(isinstance(norm, RegularizedBatchNorm) and norm.owes_penalty for norm in norms):
            raise RuntimeError(
                "The gradient of this step lacks RBN's penalty of a training forward: pass its loss to "
                "self.accelerator.backward, not to loss.backward(), or run it under torch.no_grad() if it is not "
                "trained."
            )
        self._logs.take_records(norms)  # of forwards whose loss took another way

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        update_norm_statistics(model)


def _warmup_steps(args, state) -> int:
    return round(args.norm_warmup_ratio * state.max_steps)


def _scale_of(scaler) -> torch.Tensor | float:
    """What fp16 multiplies the loss by, without waiting for the device."""
    if scaler is None:
        return 1.0
    scale = getattr(scaler, "_scale", None)
    return scaler.get_scale() if scale is None else scale  # before the first step it is a number still


def _set_loss_scale(model: nn.Module, scale: torch.Tensor | float) -> None:
    for norm in statistic_norms(model):
        if isinstance(norm, GradientStatisticNorm):
            norm.loss_scale.fill_(scale)


def _power_norms(model: nn.Module) -> list[PowerNorm]:
    return [norm for norm in statistic_norms(model) if isinstance(norm, PowerNorm)]


def _node_group():
    """The processes of this machine, `None` where there is but one process."""
    if not has_ranks():
        return None
    return torch.distributed.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))[0]


class _NormSwapTrainerMixin:
    _arguments: type[TrainingArguments]

    def __init__(self, model=None, args=None, *more, **kwargs):
        if args is None:
            args = self._arguments()
        if not hasattr(args, "norm_freeze_ratio"):
            raise ValueError(f"A {type(args).__name__} says nothing of norms: pass {self._arguments.__name__}.")
        if args.n_gpu > 1:  # first: Trainer makes the output folder
            raise ValueError(
                "nn.DataParallel loses the statistics of every replica but the first: start one process per GPU with "
                "accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if model is not None:
            refuse_other_copy(model)
        super().__init__(model, args, *more, **kwargs)
        self._norm_logs = _NormLogs()
        self._statistics = NormStatisticsCallback(self._norm_logs)
        self.add_callback(self._statistics)
        self._begin_norm_logs()

    @contextmanager
    def _adding_penalties(self) -> Iterator[None]:
        """Add the penalty in accelerator.backward: every loss of a training passes it, whoever computes the loss."""
        accelerator = self.accelerator
        if "backward" in vars(accelerator):  # inside of train() already
            yield
            return
        accelerator.backward = functools.partial(self._backward, accelerator.backward)
        try:
            yield
        finally:
            del accelerator.backward

    def _backward(self, backward, loss, **kwargs):
        penalty = self._norm_logs.take_records(self._statistic_norms())
        if penalty is not None:
            self._norm_logs.add_penalty(penalty.detach())
            # The loss is that of one micro-batch of a mean; outside of train() there is but one.
            penalty = penalty / getattr(self, "current_gradient_accumulation_steps", 1)
            self._penalty_of_step = self._penalty_of_step + penalty.detach()
            loss = loss + penalty
        backward(loss, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._penalty_of_step = 0
        with self._adding_penalties():
            loss = super().training_step(model, inputs, num_items_in_batch)
        return loss + self._penalty_of_step  # as it is logged

    def train(self, resume_from_checkpoint=None, trial=None, *args, **kwargs):
        if resume_from_checkpoint is True:  # Trainer would take the last one, also where it is half written
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint to resume from in {self.args.output_dir}.")
        try:
            result = super().train(resume_from_checkpoint, trial, *args, **kwargs)
            self._write_tid_history(self._get_output_dir(trial))
            return result
        finally:
            if self.model is not None:  # where model_init failed after an earlier trial
                self._leave_training()

    def _inner_training_loop(self, *args, resume_from_checkpoint=None, **kwargs):
        # The model of this run exists only now: model_init makes one for each.
        if self.args.norm_freeze_ratio > 0:
            refuse_lost_statistics(self._unwrapped())
        self._begin_norm_logs(resume_from_checkpoint)
        with self._adding_penalties():
            return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _begin_norm_logs(self, resume_from_checkpoint=None) -> None:
        norms = {id(norm) for norm in self._statistic_norms()}
        self._norm_logs.reset(len(norms))
        self._penalty_of_step = 0
        if resume_from_checkpoint and Path(resume_from_checkpoint, TidHistory.FILE).exists():
            self.tid_history = TidHistory.read(resume_from_checkpoint)
        else:
            names = [name for name, module in self._unwrapped().named_modules() if id(module) in norms]
            self.tid_history = TidHistory(names)

    def _leave_training(self) -> None:
        accumulate_norm_statistics(self.model, False)
        set_norm_process_group(self.model, synchronized=False)
        for norm in self._statistics.frozen:
            freeze_norm_statistics(norm, False)
            norm.train(self.model.training)
        self._statistics.frozen = []
        _set_loss_scale(self.model, 1.0)
        for norm in self._statistic_norms():
            norm.forget_statistics()  # of a step that was interrupted

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            Path(folder, LAST_FILE).unlink(missing_ok=True)  # of an earlier run: this checkpoint is not whole yet
        try:
            self._write_tid_history(folder)
            super()._save_checkpoint(model, trial)
        except Exception as error:  # Python, torch and safetensors each have another one for a full disk
            whole = find_last_checkpoint(folder.parent)
            if whole == str(folder):  # it was written, and something else failed
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            cure = f"mend that, and resume from {whole}" if whole else "mend that, and start again"
            raise OSError(f"{folder} could not be written ({error}): {cure}.") from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_renamed(self, folder) -> bool:
        """Load a checkpoint whose weights have other names than in the model; whether this is such a one.

        transformers saves ViT and others under the names of earlier versions. Its Trainer compares names, finds none,
        and would go on with the weights that the model had before.
        """
        model = self._unwrapped()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(model, "peft_config"):
            return False
        if not isinstance(model, PreTrainedModel) or not get_model_conversion_mapping(model, add_legacy=False):
            return False
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
        return True

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # What comes next is LAST_FILE, and the removal of older checkpoints: each rank has written its part before.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        token, self.args.hub_token = self.args.hub_token, None  # it would go into training_args.bin, and to the Hub
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def create_model_card(self, *args, tags=None, license=None, **kwargs):
        """Write the card of this package; the results are those that a recipe left in the output folder."""
        if not self.is_world_process_zero():
            return
        model, folder = self._unwrapped(), Path(self.args.output_dir)
        if getattr(model.config, "norm_swap", None) is None or hasattr(model, "peft_config"):
            super().create_model_card(*args, tags=tags, license=license, **kwargs)
            drop_local_base(folder / "README.md")
            return
        result = folder / "result.json"
        results = load_results(result) if result.exists() else ()
        # `hub_model_id` is that of a push, and `None` before one, whatever the arguments ask for.
        card = card_of_model(model, self.hub_model_id, results, license=license, folder=folder)
        add_tags(card, tags)
        card.save(folder / "README.md")

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **self._norm_entries()}
        super().log(logs, *args, **kwargs)

    def _norm_entries(self) -> dict[str, float]:
        entries = {}
        if any(isinstance(callback, ProgressiveSwapCallback) for callback in self.callback_handler.callbacks):
            entries["layer_norm_share"] = mean_layer_norm_share(self._unwrapped())
        norms = self._statistic_norms()
        if not norms:
            return entries
        discrepancy, penalty = self._norm_logs.means(norms[0].weight.device, self.accelerator.reduce)
        self._norm_logs.reset(len(norms))
        if penalty is not None:
            entries["rbn_penalty"] = penalty
        if not discrepancy.isnan().all():
            history = discrepancy.clone()
            history[0, [not has_mean(norm) for norm in norms]] = torch.nan
            self.tid_history.add(self.state.global_step, history)
            for name, layers in zip(("mean", "var"), discrepancy, strict=True):
                layers = layers[~layers.isnan()]
                entries[f"tid_{name}_max"] = layers.max().item() if len(layers) else float("nan")
                entries[f"tid_{name}_avg"] = layers.mean().item()
        return entries

    def _write_tid_history(self, folder) -> None:
        if self.tid_history.steps and self.args.should_save:
            self.tid_history.write(folder)

    def get_decay_parameter_names(self, model):
        # transformers goes by names: GPT-2's ln_1, ln_2 and ln_f are like none of its patterns.
        norm_parameters = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            for parameter, _ in module.named_parameters(recurse=False)
            if isinstance(module, Norm) or (isinstance(module, ChangedLinear) and parameter not in ("weight", "bias"))
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in norm_parameters]

    def _unwrapped(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _statistic_norms(self):
        return [] if self.model is None else statistic_norms(self.model)  # a search takes the model of a trial away


class NormSwapTrainer(_NormSwapTrainerMixin, Trainer):
    """[`~transformers.Trainer`] for models with swapped norms; takes [`NormSwapTrainingArguments`].

    - The RBN term of every training forward is added to the loss, whoever computes it, with the same relative weight
      under any accumulation and on any number of ranks. An override of `training_step` has to pass its loss to
      `self.accelerator.backward`.
    - Running statistics stay as they are within an optimizer step and are updated once, from all its micro-batches and
      ranks.
    - PowerNorm is PN-V for the first `norm_warmup_ratio` of each run.
    - `rbn_penalty`, `tid_mean_max`, `tid_mean_avg`, `tid_var_max` and `tid_var_avg` stand in the logs beside `loss`.
      The first is the mean, over the backwards since the last entry, of what was added to the loss. The others are the
      largest and the average over layers of means over the training forwards in which a layer ran. `tid.json`, in the
      output folder and in each checkpoint, has them layer by layer ([`TidHistory`](hf_normswap.TidHistory)).
    - Gains and shifts of norms have no weight decay, in GPT-2 either.
    """

    _arguments = NormSwapTrainingArguments


class NormSwapSeq2SeqTrainer(_NormSwapTrainerMixin, Seq2SeqTrainer):
    """[`NormSwapTrainer`] that generates in evaluation; takes [`NormSwapSeq2SeqTrainingArguments`]."""

    _arguments = NormSwapSeq2SeqTrainingArguments
