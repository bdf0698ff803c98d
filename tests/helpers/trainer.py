"""Runs of the Trainer: their examples and arguments, and what every step left."""

import torch
from transformers import TrainerCallback

from hf_normswap import (
    NormSwapConfig,
    NormSwapTrainer,
    NormSwapTrainingArguments,
    swap_norm,
)
from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING
from tests.helpers.models import tiny_model


HEADS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "marian": "MarianMTModel",
    "gpt2": "GPT2LMHeadModel",
}


class Recorder(TrainerCallback):
    """The gradients and statistics of every optimizer step."""

    def __init__(self):
        self.gradients, self.buffers = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        saved = model.state_dict()
        self.buffers.append({name: b.clone() for name, b in model.named_buffers() if name in saved})


def rows(family, number, seed=0):
    """Examples of one length with some padding, so that a mean over examples is a mean over labels too."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(number):
        ids = torch.randint(5, 38, (9,), generator=generator)
        real = torch.arange(9) < 6 + index % 4
        example = {"input_ids": torch.where(real, ids, 1), "attention_mask": real.long()}
        if family == "bert":
            example["labels"] = ids[0] % 2
        elif family == "roberta":
            example["labels"] = torch.where(torch.arange(9) < 6, ids % 2, -100)
        elif family == "marian":
            example["labels"] = torch.where(torch.arange(7) < 5, torch.randint(5, 38, (7,), generator=generator), -100)
        else:
            example["labels"] = torch.where(torch.arange(9) < 6, ids, -100)
        examples.append(example)
    return examples


def train(family, norm, examples, tmp_path, batch, accumulation, steps=2, checkpointing=None, where="all", **options):
    torch.manual_seed(0)
    model = tiny_model(family, HEADS[family])
    swap_norm(model, norm, where=where)
    recorder = Recorder()
    args = NormSwapTrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        **{CHECKPOINTING: checkpointing is not None, f"{CHECKPOINTING}_kwargs": checkpointing},
        **{"norm_warmup_ratio": 0.0, **options},
    )
    trainer = NormSwapTrainer(model=model, args=args, train_dataset=examples, callbacks=[recorder])
    trainer.train()
    recorder.logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return recorder


def assert_same(first, second, tolerance=1e-5):
    for kind in ("gradients", "buffers"):
        for ours, theirs in zip(getattr(first, kind), getattr(second, kind), strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                scale = max(1.0, value.abs().max().item())
                torch.testing.assert_close(theirs[name], value, rtol=0, atol=tolerance * scale, msg=f"{kind} {name}")


def arguments(tmp_path, cls=NormSwapTrainingArguments, **options):
    defaults = {
        "output_dir": tmp_path,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return cls(**{**defaults, **options})


def swapped(family, norm, **options):
    torch.manual_seed(0)
    return swap_norm(tiny_model(family, HEADS[family]), NormSwapConfig(norm, **options))


def batch_of(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def make_trainer(folder, norm="rbn", **options):
    torch.manual_seed(0)
    model = swap_norm(tiny_model("bert", HEADS["bert"]), norm, where="all")
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, **options}
    return NormSwapTrainer(model, NormSwapTrainingArguments(str(folder), **settings), train_dataset=rows("bert", 16))
