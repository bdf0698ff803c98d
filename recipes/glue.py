"""
Trains a model with swapped norms on one of the nine GLUE tasks, and scores it with the task's own metrics.
With --text_columns on any data set of texts with a column `label`, and scores its accuracy.

    python -m recipes.glue recipes/configs/glue/sst2.yaml --model_name_or_path google-bert/bert-base-uncased \\
        --norm rbn --calibrate 512 --norm_freeze_ratio 0.5
    accelerate launch -m recipes.glue --task_name mrpc --norm rbn --model_name_or_path google-bert/bert-base-uncased

Without --model_name_or_path a model of --model_type is trained from scratch, with a tokenizer trained on its texts.
Options are those of the dataclasses below and of `transformers.TrainingArguments`, in a YAML file, in the shell or in
both. The output folder then holds the model, the tokenizer and `result.json`; `normswap compare` compares results.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments
from hf_normswap.metrics import GlueMetric
from recipes.common import (
    FamilyArguments,
    SplitArguments,
    make_callbacks,
    one_sentence_errors,
    parse_and_seed,
    score_splits,
    train_and_record,
)
from recipes.loading import check_length, load_labelled, load_swapped, make_swapped


# The columns of text of each task.
TASKS = {
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
# MNLI is scored twice, on genres seen in training and on others.
MNLI_SPLITS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}


@dataclass
class DataArguments(SplitArguments):
    task_name: str | None = field(default=None, metadata={"help": "Task of GLUE.", "choices": list(TASKS)})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text of a data set that is no task of GLUE."}
    )
    dataset_name: str = field(
        default="nyu-mll/glue", metadata={"help": "Data set of the Hub, or a local folder laid out like one."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set; that of the task's name if not given."}
    )
    max_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this number of tokens."})

    def __post_init__(self):
        if (self.task_name is None) == (self.text_columns is None):
            raise ValueError("Say either task_name, of GLUE, or text_columns, of another data set.")
        super().__post_init__()
        if self.task_name == "mnli" and (self.validation_split or self.validation_share or self.test_split):
            raise ValueError(
                "MNLI is scored on its two validation splits: leave out validation_split, validation_share and "
                "test_split."
            )

    @property
    def task(self):
        """Name of the task in the results."""
        return self.task_name or Path(self.dataset_name).name

    @property
    def columns(self):
        return self.text_columns or TASKS[self.task_name]

    @property
    def scored_splits(self):
        if self.task_name == "mnli":
            return {f"{name}_": split for name, split in MNLI_SPLITS.items()}
        return super().scored_splits


def load_task(data_args):
    """Returns the splits, and what the head of the model needs to know of the labels."""
    task = data_args.task_name
    config = data_args.dataset_config_name or task
    return load_labelled(data_args, config, data_args.columns, is_regression=task == "stsb")


def tokenize(data, tokenizer, data_args):
    check_length(data_args.max_length, tokenizer)
    return data.map(
        lambda rows: tokenizer(
            *(rows[name] for name in data_args.columns), truncation=True, max_length=data_args.max_length
        ),
        batched=True,
        remove_columns=[name for name in data["train"].column_names if name != "label"],
        desc="Tokenizing",
    )


def main(argv=None):
    with one_sentence_errors():
        groups = (FamilyArguments, DataArguments, NormSwapTrainingArguments)
        model_args, data_args, training_args, explicit_args, checkpoint = parse_and_seed(groups, argv)
        task = data_args.task_name
        data, head = load_task(data_args)
        texts = data["train"].select_columns(data_args.columns)
        auto_class = AutoModelForSequenceClassification
        if model_args.model_type:
            tokenizer, model = make_swapped(auto_class, model_args, texts, data_args.max_length, **head)
        else:
            tokenizer, model = load_swapped(auto_class, model_args, texts, **head)
        model.config.pad_token_id = tokenizer.pad_token_id
        with training_args.main_process_first(desc="tokenizing"):
            data = tokenize(data, tokenizer, data_args)

        metric = GlueMetric(task or "sst2")  # accuracy

        def compute_metrics(evaluated):
            logits = evaluated.predictions
            predictions = logits.squeeze(-1) if task == "stsb" else np.argmax(logits, axis=-1)
            return metric.compute(predictions=predictions, references=evaluated.label_ids)

        scored = {prefix: data[split] for prefix, split in data_args.scored_splits.items()}
        both = {prefix.removesuffix("_"): split for prefix, split in scored.items()}
        trainer = NormSwapTrainer(
            model,
            training_args,
            train_dataset=data["train"],
            eval_dataset=both if task == "mnli" else scored[""],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics,
            callbacks=make_callbacks(model_args),
        )

    def score():
        return score_splits(trainer, scored, compute_metrics)

    train_and_record(trainer, data_args.task, model_args, data_args, data, explicit_args, score, checkpoint)


if __name__ == "__main__":
    main()
