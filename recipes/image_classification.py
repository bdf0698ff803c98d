"""
Trains a model with swapped norms to classify images, and scores its accuracy.

    python -m recipes.image_classification recipes/configs/image_classification/cifar10.yaml --norm batchnorm \\
        --model_name_or_path google/vit-base-patch16-224-in21k --calibrate 512 --norm_freeze_ratio 0.5
    python -m recipes.image_classification --dataset_name ./my-images --norm rbn --model_type vit \\
        --config_overrides '{"image_size": 32, "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 6}'

The data set has a column of images and one of classes. It is one of the Hub, a folder of parquet files, or a folder
with a folder for each split, and in it a folder of images for each class. Without --model_name_or_path a model of
--model_type is trained from scratch. Images get the colours and the size of the model, and no augmentation.

Options are those of the dataclasses below and of `transformers.TrainingArguments`, in a YAML file, in the shell or in
both. The output folder then holds the model, the image processor and `result.json`.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTImageProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments, make_batches
from hf_normswap.metrics import GlueMetric
from recipes.common import (
    ScratchArguments,
    SplitArguments,
    make_callbacks,
    one_sentence_errors,
    parse_and_seed,
    score_splits,
    train_and_record,
)
from recipes.loading import apply_norm_args, load_labelled, load_swapped


@dataclass
class ModelArguments(ScratchArguments):
    model_type: str | None = field(
        default=None, metadata={"help": "Family of a model from scratch, such as vit, deit or swin."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model_type and self.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            close = difflib.get_close_matches(self.model_type, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, n=1)
            cure = f"did you mean {close[0]!r}?" if close else "give one that classifies images, such as 'vit'."
            raise ValueError(f"There is no model_type {self.model_type!r} for images: {cure}")


@dataclass
class DataArguments(SplitArguments):
    dataset_name: str = field(
        default="uoft-cs/cifar10", metadata={"help": "Data set of the Hub, or a local folder laid out like one."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of classes."})

    def __post_init__(self):
        super().__post_init__()
        if self.image_column == self.label_column:
            raise ValueError(f"image_column and label_column are both {self.image_column!r}: name two columns.")

    @property
    def task(self):
        """Name of the task in the results."""
        return Path(self.dataset_name).name


def load_images(data_args):
    """Returns the splits, and what the head of the model needs to know of the labels."""
    column = data_args.image_column
    data, head = load_labelled(data_args, data_args.dataset_config_name, [column], data_args.label_column)
    if not isinstance(data["train"].features[column], Image):
        raise ValueError(f"The column {column!r} of {data_args.dataset_name!r} has no images: see cast_column.")
    return data, head


def make_scratch(args, images, head):
    """An image processor for the size and the colours of a model from scratch, and the model."""
    # Without architectures an Auto class takes the first of several classes, such as those of DeiT.
    config = AutoConfig.for_model(args.model_type, architectures=[], **head, **args.config_overrides)
    size, half = config.image_size, [0.5] * config.num_channels
    height, width = size if isinstance(size, list | tuple) else (size, size)
    processor = ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)
    model = AutoModelForImageClassification.from_config(config)
    return processor, apply_norm_args(model, processor, args, images, is_new=True)


class ImageCollator:
    """Rows of images and labels become a batch, by the same way as images that a norm is calibrated on."""

    def __init__(self, model, processor, column):
        self.model, self.processor, self.column = model, processor, column

    def __call__(self, rows):
        images = [row[self.column] for row in rows]
        (batch,) = make_batches(self.model, images, self.processor, batch_size=len(images))
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}


def main(argv=None):
    with one_sentence_errors():
        groups = (ModelArguments, DataArguments, NormSwapTrainingArguments)
        model_args, data_args, training_args, explicit_args, checkpoint = parse_and_seed(groups, argv)
        training_args.remove_unused_columns = False  # the collator reads the images
        data, head = load_images(data_args)
        images = data["train"].select_columns(data_args.image_column)
        if model_args.model_type:
            processor, model = make_scratch(model_args, images, head)
        else:
            auto_class, processor_class = AutoModelForImageClassification, AutoImageProcessor
            processor, model = load_swapped(auto_class, model_args, images, processor_class=processor_class, **head)
        metric = GlueMetric("sst2")  # accuracy

        def compute_metrics(evaluated):
            predictions = np.argmax(evaluated.predictions, axis=-1)
            return metric.compute(predictions=predictions, references=evaluated.label_ids)

        scored = {prefix: data[split] for prefix, split in data_args.scored_splits.items()}
        trainer = NormSwapTrainer(
            model,
            training_args,
            train_dataset=data["train"],
            eval_dataset=scored[""],
            processing_class=processor,
            data_collator=ImageCollator(model, processor, data_args.image_column),
            compute_metrics=compute_metrics,
            callbacks=make_callbacks(model_args),
        )

    def score():
        return score_splits(trainer, scored, compute_metrics)

    train_and_record(trainer, data_args.task, model_args, data_args, data, explicit_args, score, checkpoint)


if __name__ == "__main__":
    main()
