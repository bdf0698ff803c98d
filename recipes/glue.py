"""
Fine-tunes a model with swapped norms on one of the nine GLUE tasks, and scores it with the task's own metrics.
With --text_columns on any data set of texts with a column `label`, and scores its accuracy.

    python recipes/glue.py recipes/configs/glue/sst2-powernorm.yaml --model_name_or_path google-bert/bert-base-uncased
    accelerate launch recipes/glue.py --task_name mrpc --norm rbn --model_name_or_path google-bert/bert-base-uncased

Options are those of the dataclasses below and of `transformers.TrainingArguments`, in a YAML file, in the shell or in
both. The output folder then holds the model, the tokenizer and `result.json`; `normswap compare` compares results.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from common import (
    ModelArguments,
    begin,
    one_sentence_errors,
    progressive_callbacks,
    train_and_record,
)
from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments
from hf_normswap.metrics import GlueMetric
from loading import check_length, load_splits, load_swapped


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
class DataArguments:
    task_name: str | None = field(default=None, metadata={"help": "Task of GLUE.", "choices": list(TASKS)})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text of a data set that is no task of GLUE."}
    )
    validation_split: str = field(default="validation", metadata={"help": "The split of that one to score."})
    dataset_name: str = field(
        default="nyu-mll/glue", metadata={"help": "Data set of the Hub, or a local folder laid out like one."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set; that of the task's name if not given."}
    )
    max_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})

    def __post_init__(self):
        if (self.task_name is None) == (self.text_columns is None):
            raise ValueError("Say either task_name, of GLUE, or text_columns, of another data set.")

    @property
    def task(self):
        """Name of the task in the results."""
        return self.task_name or Path(self.dataset_name).name

    @property
    def columns(self):
        return self.text_columns or TASKS[self.task_name]


def load_task(data_args):
    """Returns the splits, and what the head of the model needs to know of the labels."""
    task = data_args.task_name
    validation = MNLI_SPLITS.values() if task == "mnli" else [data_args.validation_split]
    config = data_args.dataset_config_name or task
    data = load_splits(data_args.dataset_name, config, ["train", *validation], [*data_args.columns, "label"])
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
        groups = (ModelArguments, DataArguments, NormSwapTrainingArguments)
        model_args, data_args, training_args, given, checkpoint = begin(groups, argv)
        task = data_args.task_name
        data, head = load_task(data_args)
        texts = data["train"].select_columns(data_args.columns)
        tokenizer, model = load_swapped(AutoModelForSequenceClassification, model_args, texts, **head)
        model.config.pad_token_id = tokenizer.pad_token_id
        with training_args.main_process_first(desc="tokenizing"):
            data = tokenize(data, tokenizer, data_args)

        metric = GlueMetric(task or "sst2")  # accuracy

        def compute_metrics(evaluated):
            logits = evaluated.predictions
            predictions = logits.squeeze(-1) if task == "stsb" else np.argmax(logits, axis=-1)
            return metric.compute(predictions=predictions, references=evaluated.label_ids)

        if task == "mnli":
            validation = {name: data[split] for name, split in MNLI_SPLITS.items()}
        else:
            validation = data[data_args.validation_split]
        trainer = NormSwapTrainer(
            model,
            training_args,
            train_dataset=data["train"],
            eval_dataset=validation,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics,
            callbacks=progressive_callbacks(model_args),
        )

    def score():
        metrics = {}
        for name, split in validation.items() if task == "mnli" else [("", validation)]:
            scores = compute_metrics(trainer.predict(split))
            metrics |= {f"{name}_{score}".lstrip("_"): value for score, value in scores.items()}
        return metrics

    train_and_record(trainer, data_args.task, model_args, data_args, data, given, score, checkpoint)


if __name__ == "__main__":
    main()
