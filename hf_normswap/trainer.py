"""Trainers for models with swapped norms."""

import os
import shutil
from pathlib import Path

import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from .card import add_tags, card_of_model, drop_local_base
from .checkpoints import LAST_FILE, find_last_checkpoint
from .modeling.norm import Norm
from .modeling.powernorm import PowerNorm
from .modeling.ranks import has_ranks
from .modeling.rbn import RegularizedBatchNorm
from .modeling.sites import refuse_other_copy
from .progressive import ProgressiveSwapCallback, mean_layer_norm_share
from .results import load_results
from .statistics import (
    defer_norm_statistics,
    freeze_norm_statistics,
    last_discrepancy,
    norm_penalty,
    refuse_lost_statistics,
    statistic_norms,
    sync_norm_statistics,
    synchronize_norms,
)
from .tid import TidHistory, has_mean


class NormStatisticsCallback(TrainerCallback):
    """Updates running statistics once per optimizer step, from all its micro-batches and ranks."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._is_frozen, self._is_warming_up = False, True
        defer_norm_statistics(model)
        if args.norm_sync != "none":
            synchronize_norms(model, _node_group() if args.norm_sync == "node" else None)
        for module in model.modules():
            if isinstance(module, PowerNorm):
                module.warmup_steps = round(args.norm_warmup_ratio * state.max_steps)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        freeze = args.norm_freeze_ratio < 1 and state.global_step >= round(args.norm_freeze_ratio * state.max_steps)
        if freeze and not self._is_frozen:
            freeze_norm_statistics(model)
            self._is_frozen = True
        if self._is_warming_up and state.global_step >= round(args.norm_warmup_ratio * state.max_steps):
            for module in model.modules():
                if isinstance(module, PowerNorm):
                    module.process_group, module.warmup_steps = None, 0
            self._is_warming_up = False

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        sync_norm_statistics(model)


def _node_group():
    """The processes of this machine, `None` where there is but one process."""
    if not has_ranks():
        return None
    return torch.distributed.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))[0]


class _NormSwapTrainerMixin:
    def __init__(self, model=None, args=None, *more, **kwargs):
        if args is not None and args.n_gpu > 1:  # first: Trainer makes the output folder
            raise ValueError(
                "nn.DataParallel loses the statistics of every replica but the first: start one process per GPU with "
                "accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if model is not None:
            refuse_other_copy(model)
        super().__init__(model, args, *more, **kwargs)
        self.add_callback(NormStatisticsCallback())
        self._reset_norm_logs()
        self.tid_history = self._new_tid_history()

    def _reset_norm_logs(self):
        self._penalty, self._discrepancy = _Mean(), _Mean()

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:  # Trainer would take the last one, also where it is half written
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint to resume from in {self.args.output_dir}.")
        if self.args.norm_freeze_ratio > 0:
            refuse_lost_statistics(self._unwrapped())
        self.tid_history = self._new_tid_history()
        if resume_from_checkpoint and Path(resume_from_checkpoint, TidHistory.FILE).exists():
            self.tid_history = TidHistory.read(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._write_tid_history(self.args.output_dir)
            return result
        finally:
            defer_norm_statistics(self.model, False)
            synchronize_norms(self.model, synchronized=False)
            freeze_norm_statistics(self.model, False)
            self._set_loss_scale(1.0)

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

    def training_step(self, model, inputs, num_items_in_batch=None):
        scale = getattr(self.accelerator.scaler, "_scale", None)  # get_scale() would wait for the device
        if scale is not None or self.accelerator.num_processes > 1:
            self._set_loss_scale((1.0 if scale is None else scale) * self.accelerator.num_processes)
        return super().training_step(model, inputs, num_items_in_batch)

    def _set_loss_scale(self, scale) -> None:
        for norm in self._statistic_norms():
            if isinstance(norm, PowerNorm):
                norm.loss_scale.fill_(scale)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        loss, *outputs = result if return_outputs else (result,)
        norms = self._statistic_norms()
        discrepancy = last_discrepancy(norms)
        if discrepancy is not None:
            self._discrepancy.add(discrepancy)
        if any(isinstance(norm, RegularizedBatchNorm) and norm.training for norm in norms):
            penalty = norm_penalty(self._unwrapped())
            self._penalty.add(penalty.detach())
            # Not earlier: the loss may have been multiplied by the number of processes.
            loss = loss + penalty / self._accumulation_divisor(num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def _accumulation_divisor(self, num_items_in_batch) -> int:
        """What is left to divide by: `training_step` divides a loss that is a plain mean, and no other."""
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            counts_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = counts_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if is_scaled else 1

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **self._norm_logs()}
            self._reset_norm_logs()
        super().log(logs, *args, **kwargs)

    def _norm_logs(self) -> dict[str, float]:
        entries = {}
        if any(isinstance(callback, ProgressiveSwapCallback) for callback in self.callback_handler.callbacks):
            entries["layer_norm_share"] = mean_layer_norm_share(self._unwrapped())
        if self._penalty.count:
            entries["rbn_penalty"] = self._mean_over_ranks(self._penalty).item()
        if self._discrepancy.count:
            of_layers = self._mean_over_ranks(self._discrepancy)
            history = of_layers.clone()
            history[0, [not has_mean(norm) for norm in self._statistic_norms()]] = torch.nan
            self.tid_history.add(self.state.global_step, history)
            for name, layers in zip(("mean", "var"), of_layers, strict=True):
                layers = layers[~layers.isnan()]
                entries[f"tid_{name}_max"] = layers.max().item() if len(layers) else float("nan")
                entries[f"tid_{name}_avg"] = layers.mean().item()
        return entries

    def _new_tid_history(self) -> TidHistory:
        norms = {id(norm) for norm in self._statistic_norms()}
        return TidHistory([name for name, module in self._unwrapped().named_modules() if id(module) in norms])

    def _write_tid_history(self, folder) -> None:
        if self.tid_history.steps and self.args.should_save:
            self.tid_history.write(folder)

    def _mean_over_ranks(self, mean: "_Mean") -> torch.Tensor:
        return self.accelerator.reduce(mean.total / mean.count, "mean")

    def get_decay_parameter_names(self, model):
        # transformers goes by names: GPT-2's ln_1, ln_2 and ln_f are like none of its patterns.
        norm_parameters = {
            f"{name}.{parameter}"
            for name, module in model.named_modules()
            if isinstance(module, Norm)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in norm_parameters]

    def _unwrapped(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _statistic_norms(self):
        return statistic_norms(self._unwrapped())


class _Mean:
    """Of tensors on a device, without waiting for it, and without keeping each of them until the next log."""

    def __init__(self):
        self.count, self.total = 0, 0

    def add(self, value: torch.Tensor) -> None:
        self.count, self.total = self.count + 1, self.total + value


class NormSwapTrainer(_NormSwapTrainerMixin, Trainer):
    """[`~transformers.Trainer`] for models with swapped norms; takes [`NormSwapTrainingArguments`].

    - The RBN term is added to the task loss, with the same relative weight under any accumulation and on any number of
      ranks.
    - Running statistics stay as they are within an optimizer step and are updated once, from all its micro-batches and
      ranks.
    - PowerNorm is PN-V for the first `norm_warmup_ratio` of the run.
    - `rbn_penalty`, `tid_mean_max`, `tid_mean_avg`, `tid_var_max` and `tid_var_avg` stand in the logs beside `loss`:
      means over the forwards since the last entry; largest and average over layers. `tid.json`, in the output folder
      and in each checkpoint, has them layer by layer ([`TidHistory`](hf_normswap.TidHistory)).
    - Gains and shifts of norms have no weight decay, in GPT-2 either.
    """


class NormSwapSeq2SeqTrainer(_NormSwapTrainerMixin, Seq2SeqTrainer):
    """[`NormSwapTrainer`] that generates in evaluation; takes [`NormSwapSeq2SeqTrainingArguments`]."""
