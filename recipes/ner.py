"""
Trains a model with swapped norms to tag words, such as the names in a sentence, and scores whole entities.

    python -m recipes.ner recipes/configs/ner/wnut17.yaml --model_name_or_path google-bert/bert-base-cased \\
        --norm rbn --calibrate 512 --norm_freeze_ratio 0.5
    python -m recipes.ner --dataset_name lhoestq/conll2003 --norm rbn --model_name_or_path google-bert/bert-base-cased

The data set has a column of words and one of their tags, as CoNLL-2003 has. A word that is cut into pieces is tagged
by its first one. Without --model_name_or_path a model of --model_type is trained from scratch, with a tokenizer
trained on the same words. Options are those of the dataclasses below and of `transformers.TrainingArguments`, in a
YAML file, in the shell or in both. The output folder then holds the model, the tokenizer and `result.json`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import ClassLabel
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification
from transformers.utils import logging

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments
from hf_normswap.metrics import SeqevalMetric
from recipes.common import (
    FamilyArguments,
    make_callbacks,
    one_sentence_errors,
    parse_and_seed,
    train_and_record,
)
from recipes.loading import check_length, load_splits, load_swapped, make_swapped


logger = logging.get_logger(__name__)

SCORES = ("precision", "recall", "f1", "accuracy")


@dataclass
class DataArguments:
    dataset_name: str = field(metadata={"help": "Data set of the Hub, or a local folder laid out like one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    words_column: str = field(default="tokens", metadata={"help": "Column of lists of words."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column of lists of tags, one for each word."})
    max_length: int = field(default=128, metadata={"help": "Longer inputs are cut to this number of pieces."})
    test_split: str | None = field(default=None, metadata={"help": "A split to score in the end too, such as test."})


def load_tags(data_args):
    """Returns the splits, with tags as numbers, and the names of the tags."""
    words, tags = data_args.words_column, data_args.tags_column
    splits = ["train", "validation", *filter(None, [data_args.test_split])]
    data = load_splits(data_args.dataset_name, data_args.dataset_config_name, splits, [words, tags])
    feature = getattr(data["train"].features[tags], "feature", None)
    known = {tag for row in data["train"][tags] for tag in row}
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif known and all(isinstance(tag, str) for tag in known):
        names = sorted(known)
        numbers = {name: number for number, name in enumerate(names)}
        data = data.map(lambda row: {tags: [numbers.get(tag, -1) for tag in row[tags]]}, desc="Numbering tags")
    else:
        raise ValueError(f"The column {tags!r} of {data_args.dataset_name!r} has no names of tags, only numbers.")
    for split, rows in data.items():
        if len(rows) == 0:
            raise ValueError(f"The split {split!r} of {data_args.dataset_name!r} is empty.")
        for index, (row_words, row_tags) in enumerate(zip(rows[words], rows[tags], strict=True)):
            if len(row_words) != len(row_tags):
                raise ValueError(f"Row {index} of {split!r} has {len(row_words)} words and {len(row_tags)} tags.")
            if any(not 0 <= tag < len(names) for tag in row_tags):
                raise ValueError(f"Row {index} of {split!r} has a tag that is none of {', '.join(names)}.")
    return data, names


def tokenize(data, tokenizer, data_args):
    """Pieces of words; the first piece of each has the tag of the word."""

    def encode(rows):
        encoded = tokenizer(
            rows[data_args.words_column],
            is_split_into_words=True,
            truncation=True,
            max_length=data_args.max_length,
        )
        encoded["labels"] = []
        for index, tags in enumerate(rows[data_args.tags_column]):
            words = encoded.word_ids(index)
            is_first = [word is not None and word != before for word, before in zip(words, [None, *words])]
            encoded["labels"].append([tags[word] if first else -100 for word, first in zip(words, is_first)])
        return encoded

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")


def count_lost(data, encoded, tags):
    """Tags of words that were cut off."""
    scored = sum(label != -100 for labels in encoded["labels"] for label in labels)
    return sum(map(len, data[tags])) - scored


def score_entities(predictions, labels, names):
    """Scores over entities."""
    found, true = (
        [[names[number] for number in row[marks != -100]] for row, marks in zip(rows, labels, strict=True)]
        for rows in (np.argmax(predictions, axis=-1), labels)
    )
    scores = SeqevalMetric().compute(predictions=found, references=true)
    return {score: scores[f"overall_{score}"] for score in SCORES}


def main(argv=None):
    with one_sentence_errors():
        groups = (FamilyArguments, DataArguments, NormSwapTrainingArguments)
        model_args, data_args, training_args, explicit_args, checkpoint = parse_and_seed(groups, argv)
        words, tags = data_args.words_column, data_args.tags_column
        data, names = load_tags(data_args)
        texts = data["train"].select_columns([words]).map(lambda row: {words: " ".join(row[words])}, desc="Joining")
        head = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
        auto_class = AutoModelForTokenClassification
        if model_args.model_type:
            tokenizer, model = make_swapped(auto_class, model_args, texts, data_args.max_length, **head)
        else:
            # Word by word byte-level tokenizers, such as RoBERTa's, have to be told that a space is before each.
            spaces = {"add_prefix_space": True}
            tokenizer, model = load_swapped(auto_class, model_args, texts, tokenizer_options=spaces, **head)
        check_length(data_args.max_length, tokenizer)
        with training_args.main_process_first(desc="tokenizing"):
            encoded = tokenize(data, tokenizer, data_args)
        for split in data:
            if lost := count_lost(data[split], encoded[split], tags):
                logger.warning(f"{lost} words of the split {split!r} are cut off and not scored: raise max_length.")

        def compute_metrics(evaluated):
            return score_entities(evaluated.predictions, evaluated.label_ids, names)

        trainer = NormSwapTrainer(
            model,
            training_args,
            train_dataset=encoded["train"],
            eval_dataset=encoded["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            compute_metrics=compute_metrics,
            callbacks=make_callbacks(model_args),
        )

    def score():
        metrics = compute_metrics(trainer.predict(encoded["validation"]))
        if test := data_args.test_split:
            scores = compute_metrics(trainer.predict(encoded[test]))
            metrics |= {f"test_{name}": value for name, value in scores.items()}
        return metrics

    task = Path(data_args.dataset_name).name
    train_and_record(trainer, task, model_args, data_args, data, explicit_args, score, checkpoint)


if __name__ == "__main__":
    main()
