"""Gradient accumulation, activation checkpointing and ranks change nothing that they need not change."""

import pytest
import torch
from transformers import TrainerCallback

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments, swap_norm
from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING
from tests.models import tiny_model


HEADS = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForTokenClassification",
    "marian": "MarianMTModel",
    "gpt2": "GPT2LMHeadModel",
}
FAMILIES = list(HEADS)


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "powernorm"])
def test_four_times_two_is_one_times_eight(family, norm, tmp_path):
    examples = rows(family, 16)
    whole = train(family, norm, examples, tmp_path, batch=8, accumulation=1)
    parts = train(family, norm, examples, tmp_path, batch=2, accumulation=4)
    assert_same(whole, parts)
    assert parts.logs[-1]["loss"] == pytest.approx(whole.logs[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "pnv"])
def test_four_copies_of_a_micro_batch_are_one(family, norm, tmp_path):
    once = rows(family, 2, seed=0), rows(family, 2, seed=1)
    whole = train(family, norm, [*once[0], *once[1]], tmp_path, batch=2, accumulation=1)
    copies = train(family, norm, [*once[0] * 4, *once[1] * 4], tmp_path, batch=2, accumulation=4)
    assert_same(whole, copies)
    if norm == "rbn":
        assert whole.logs[-1]["rbn_penalty"] > 0
        assert copies.logs[-1]["rbn_penalty"] == pytest.approx(whole.logs[-1]["rbn_penalty"], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm", "rbn"])
def test_checkpointing_under_the_trainer_changes_nothing(norm, reentrant, tmp_path):
    examples = rows("bert", 16)
    off = train("bert", norm, examples, tmp_path, batch=4, accumulation=2, norm_warmup_ratio=0.5)
    settings = {"use_reentrant": reentrant}
    if norm == "rbn" and reentrant:
        with pytest.raises(ValueError, match="use_reentrant"):
            train("bert", norm, examples, tmp_path, batch=4, accumulation=2, checkpointing=settings)
        return
    on = train("bert", norm, examples, tmp_path, 4, 2, checkpointing=settings, norm_warmup_ratio=0.5)
    assert_same(off, on, tolerance=1e-7)
