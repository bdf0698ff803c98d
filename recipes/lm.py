"""
Trains a language model with swapped norms, from scratch or further: GPT-2, or BERT and RoBERTa on masked words.

    python -m recipes.lm recipes/configs/lm/ptb-gpt2.yaml --norm rbn
    python -m recipes.lm --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 --norm rbn \\
        --model_name_or_path openai-community/gpt2

Lines of text are joined, an end of text behind each, and cut into blocks of equal length: there is no padding. Without
--model_name_or_path a model of --model_type is trained from scratch, with a tokenizer trained on the same text.
Options are those of the dataclasses below and of `transformers.TrainingArguments`, in a YAML file, in the shell or in
both. The output folder then holds the model, the tokenizer and `result.json`, with loss and perplexity in evaluation
mode.
"""

import functools
import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    default_data_collator,
)

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments
from recipes.common import (
    FamilyArguments,
    make_callbacks,
    one_sentence_errors,
    parse_and_seed,
    show_penalty_weights,
    train_and_record,
)
from recipes.loading import check_length, load_splits, load_swapped, make_swapped


CAUSAL = ("gpt2", "normswap_gpt2")


@dataclass
class DataArguments:
    dataset_name: str = field(metadata={"help": "Data set of the Hub, or a local folder laid out like one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column of texts."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a training example."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that BERT and RoBERTa guess."})
    test_split: str | None = field(default=None, metadata={"help": "A split to score in the end too, such as test."})


def pack(data, tokenizer, data_args, is_causal):
    """Blocks of `block_size` tokens; what is left at the end of a split is dropped."""
    size, end = data_args.block_size, tokenizer.eos_token_id or tokenizer.sep_token_id

    def encode(rows):
        texts = [text for text in rows[data_args.text_column] if text and not text.isspace()]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        return {"input_ids": [[*row, end] for row in ids]}

    def cut(rows):
        tokens = list(chain.from_iterable(rows["input_ids"]))
        blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, **({"labels": blocks} if is_causal else {})}

    columns = data["train"].column_names
    lines = data.map(encode, batched=True, remove_columns=columns, desc="Tokenizing")
    blocks = lines.map(cut, batched=True, batch_size=None, desc="Packing")
    for split, rows in blocks.items():
        if len(rows) == 0:
            raise ValueError(f"The split {split!r} has less than one block of {size} tokens: lower block_size.")
    return blocks


def mask(rows, tokenizer, data_args, seed):
    """The same masks for every model."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability, seed=seed)
    collator.create_rng()  # transformers 5.17 takes seed 0 for none

    def apply(batch):
        return {name: values.tolist() for name, values in collator([{"input_ids": ids} for ids in batch]).items()}

    return rows.map(apply, input_columns="input_ids", batched=True, desc="Masking")


class MaskingTrainer(NormSwapTrainer):
    """
    Masks words right before a step, in the order of the steps. Batches are fetched ahead of time, and a collator would
    draw other masks in a resumed run.
    """

    def __init__(self, *args, masking, **kwargs):
        super().__init__(*args, **kwargs)
        self.masking = masking

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self.masking([{"input_ids": ids} for ids in inputs["input_ids"].cpu()])
        return super().training_step(model, inputs, num_items_in_batch)


def sum_losses(logits, labels, is_causal):
    """The losses of all tokens that are predicted, and how many these are, for each row."""
    if is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return torch.stack([losses.sum(1), (labels != -100).sum(1)], dim=1)


def score_losses(evaluated):
    """Mean loss over tokens, and perplexity."""
    total, count = evaluated.predictions.astype("float64").sum(0)
    return {"loss": total / count, "perplexity": math.exp(min(total / count, 700))}


def main(argv=None):
    with one_sentence_errors():
        groups = (FamilyArguments, DataArguments, NormSwapTrainingArguments)
        model_args, data_args, training_args, explicit_args, checkpoint = parse_and_seed(groups, argv)
        splits = ["train", "validation", *filter(None, [data_args.test_split])]
        data = load_splits(
            data_args.dataset_name, data_args.dataset_config_name, splits, [data_args.text_column]
        ).select_columns(data_args.text_column)
        if model_args.model_type:
            auto_class = AutoModelForCausalLM if model_args.model_type in CAUSAL else AutoModelForMaskedLM
            tokenizer, model = make_swapped(
                auto_class, model_args, data["train"], data_args.block_size, template="$A </s>"
            )
        else:
            config = AutoConfig.from_pretrained(model_args.model_name_or_path)
            auto_class = AutoModelForCausalLM if config.model_type in CAUSAL else AutoModelForMaskedLM
            tokenizer, model = load_swapped(auto_class, model_args, data["train"])
            check_length(data_args.block_size, tokenizer)
        is_causal = model.config.model_type in CAUSAL
        with training_args.main_process_first(desc="tokenizing"):
            blocks = pack(data, tokenizer, data_args, is_causal)
            if not is_causal:
                for split in splits[1:]:
                    blocks[split] = mask(blocks[split], tokenizer, data_args, training_args.seed)
        make_trainer = NormSwapTrainer
        if not is_causal:
            masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability)
            make_trainer = functools.partial(MaskingTrainer, masking=masking)
        trainer = make_trainer(
            model,
            training_args,
            train_dataset=blocks["train"],
            eval_dataset=blocks["validation"],
            processing_class=tokenizer,
            data_collator=default_data_collator,
            preprocess_logits_for_metrics=lambda logits, labels: sum_losses(logits, labels, is_causal),
            compute_metrics=score_losses,
            callbacks=make_callbacks(model_args),
        )
        show_penalty_weights(trainer, data_args.block_size * training_args.per_device_train_batch_size)

    def score():
        metrics = {}
        for split, prefix in zip(splits[1:], ("", "test_")):
            scores = trainer.predict(blocks[split], metric_key_prefix=split).metrics
            metrics |= {prefix + name: scores[f"{split}_{name}"] for name in ("loss", "perplexity")}
        return metrics

    task = Path(data_args.dataset_name).name
    train_and_record(trainer, task, model_args, data_args, blocks, explicit_args, score, checkpoint)


if __name__ == "__main__":
    main()
