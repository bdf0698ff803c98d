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
    make_callbacks,
    one_sentence_errors,
    parse_and_seed,
    train_and_record,
)
from recipes.loading import check_length, load_splits, load_swapped, make_swapped


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
HELD_OUT = "held_out"
# MNLI is scored twice, on genres seen in training and on others.
MNLI_SPLITS = {"matched": "validation_matched", "mismatched": "validation_mismatched"}


@dataclass
class DataArguments:
    task_name: str | None = field(default=None, metadata={"help": "Task of GLUE.", "choices": list(TASKS)})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text of a data set that is no task of GLUE."}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "The split to score; that named validation if not given."}
    )
    validation_share: float = field(
        default=0.0, metadata={"help": "Score this share of the training split instead, which is held out."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of that share."})
    test_split: str | None = field(default=None, metadata={"help": "A split to score in the end too, such as test."})
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
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share is a share of the training split, not {self.validation_share}.")
        if self.validation_share and self.validation_split:
            raise ValueError("validation_share holds out a part of the training split: leave out validation_split.")
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
        """The splits to score, by the prefix of their scores; early stopping looks at the first one."""
        if self.task_name == "mnli":
            return {f"{name}_": split for name, split in MNLI_SPLITS.items()}
        validation = HELD_OUT if self.validation_share else self.validation_split or "validation"
        return {"": validation} | ({"test_": self.test_split} if self.test_split else {})


def load_task(data_args):
    """Returns the splits, and what the head of the model needs to know of the labels."""
    task = data_args.task_name
    config = data_args.dataset_config_name or task
    splits = ["train", *(split for split in data_args.scored_splits.values() if split != HELD_OUT)]
    data = load_splits(data_args.dataset_name, config, splits, [*data_args.columns, "label"])
    if data_args.validation_share:
        parts = data["train"].train_test_split(data_args.validation_share, seed=data_args.split_seed)
        data["train"], data[HELD_OUT] = parts["train"], parts["test"]
    for name, split in data.items():
        if len(split) == 0:
            raise ValueError(f"The split {name!r} of {data_args.dataset_name!r} is empty.")
        if task != "stsb" and not all(isinstance(label, int) for label in split.unique("label")):
            raise ValueError(f"Labels of {data_args.dataset_name!r} are no class numbers: see class_encode_column.")
        if min(split["label"]) < 0:
            raise ValueError(f"The split {name!r} of {data_args.dataset_name!r} has no labels, only -1.")
    if task == "stsb":
        return data, {"num_labels": 1, "problem_type": "regression"}
    names = getattr(data["train"].features["label"], "names", None) or range(max(data["train"]["label"]) + 1)
    id2label = dict(enumerate(map(str, names)))
    return data, {"num_labels": len(id2label), "id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}


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
        scores = {prefix: compute_metrics(trainer.predict(split)) for prefix, split in scored.items()}
        return {prefix + name: value for prefix, found in scores.items() for name, value in found.items()}

    train_and_record(trainer, data_args.task, model_args, data_args, data, explicit_args, score, checkpoint)


if __name__ == "__main__":
    main()
