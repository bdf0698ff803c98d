"""
A training loop by hand: GLUE with swapped norms under Accelerate, without the Trainer.

    python -m recipes.accelerate_loop --task_name sst2 --norm rbn --model_name_or_path google-bert/bert-base-uncased
    accelerate launch --num_processes 4 -m recipes.accelerate_loop --task_name sst2 --norm rbn ...

Five lines concern norms, and each says why. The model, the tokenizer and `result.json` are in the output folder in the
end. `recipes.glue` does the same with the Trainer, and logs, checkpoints and resumes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_scheduler

from hf_normswap import (
    PowerNorm,
    accumulate_norm_statistics,
    find_norms,
    norm_penalty,
    set_norm_process_group,
    update_norm_statistics,
)
from hf_normswap.metrics import GlueMetric
from hf_normswap.reporting.results import write_result
from recipes.common import ModelArguments, describe_run, one_sentence_errors, parse_arguments
from recipes.glue import DataArguments, load_task, tokenize
from recipes.loading import load_swapped


@dataclass
class LoopArguments:
    output_dir: str = field(default="outputs/accelerate_loop", metadata={"help": "Folder for model and result."})
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples of a forward, on each device."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forwards of an optimizer step."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Largest learning rate."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps in which it rises."})
    norm_warmup_ratio: float = field(
        default=0.1, metadata={"help": "Share of the steps in which PowerNorm uses the statistics of the batch."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where there is a GPU."})


def train(model, data, collator, args, accelerator):
    """Trains `model` in place; returns the losses of the steps, of this process."""
    set_seed(args.seed)
    loader = DataLoader(data, args.per_device_train_batch_size, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    steps = args.max_steps * accelerator.num_processes  # accelerate advances a schedule once for every process
    schedule = get_scheduler("linear", optimizer, round(args.warmup_ratio * steps), steps)
    wrapped, loader, optimizer, schedule = accelerator.prepare(model, loader, optimizer, schedule)
    wrapped.train()
    set_norm_process_group(model)  # the batch is that of all processes together
    accumulate_norm_statistics(model)  # running statistics stay as they are within a step
    for site in find_norms(model):
        if isinstance(site.module, PowerNorm):
            done = site.module.num_batches_tracked.item()  # updates of earlier trainings, and of a calibration
            site.module.warmup_steps = done + round(args.norm_warmup_ratio * args.max_steps)
    losses, parts = [], []
    progress = tqdm(total=args.max_steps, desc="Training", disable=not accelerator.is_main_process)
    while len(losses) < args.max_steps:
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch).loss
                accelerator.backward(loss + norm_penalty(model))  # RBN's term, 0 without it
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            parts.append(loss.detach())
            if accelerator.sync_gradients:
                update_norm_statistics(model)  # and are updated once, by all its forwards and processes
                losses.append(torch.stack(parts).mean().item())
                parts = []
                progress.update()
                if len(losses) == args.max_steps:
                    break
    set_norm_process_group(model, synchronized=False)
    accumulate_norm_statistics(model, False)
    return losses


@torch.inference_mode()
def evaluate(model, data, collator, task, accelerator):
    """Scores over the whole split, whatever the number of processes."""
    loader = accelerator.prepare(DataLoader(data, 64, collate_fn=collator))
    model.eval()
    metric = GlueMetric(task or "sst2")  # accuracy
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        predictions = logits.squeeze(-1) if task == "stsb" else logits.argmax(-1)
        predictions, labels = accelerator.gather_for_metrics((predictions, labels))
        metric.add_batch(predictions=predictions.cpu(), references=labels.cpu())
    return metric.compute()


def main(argv=None):
    with one_sentence_errors():
        model_args, data_args, args, explicit_args = parse_arguments(
            (ModelArguments, DataArguments, LoopArguments), argv
        )
        if data_args.task_name == "mnli":
            raise ValueError("This loop scores one split, and MNLI has two: run python -m recipes.glue.")
        for option in ("progressive", "early_stopping", "convert", "reestimate"):
            if getattr(model_args, option):
                raise ValueError(f"This loop has no {option}: run python -m recipes.glue.")
        accelerator = Accelerator(
            cpu=args.use_cpu,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
            # DDP would write the statistics of the first process over those of all others.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        set_seed(args.seed)
        data, head = load_task(data_args)
        texts = data["train"].select_columns(data_args.columns)
        tokenizer, model = load_swapped(AutoModelForSequenceClassification, model_args, texts, **head)
        model.config.pad_token_id = tokenizer.pad_token_id
        with accelerator.main_process_first():
            data = tokenize(data, tokenizer, data_args).rename_column("label", "labels")

    collator = DataCollatorWithPadding(tokenizer)
    losses = train(model, data["train"], collator, args, accelerator)
    metrics = {
        prefix + name: value
        for prefix, split in data_args.scored_splits.items()
        for name, value in evaluate(model, data[split], collator, data_args.task_name, accelerator).items()
    }
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        run = describe_run(model, model_args.model_name_or_path, args.seed, accelerator.num_processes)
        result = {"task": data_args.task, **run, "metrics": metrics, "arguments": explicit_args, "history": history}
        write_result(result, Path(args.output_dir, "result.json"))
        print(metrics)


if __name__ == "__main__":
    main()
