"""Data sets and models for the recipes, checked before anything is written."""

import os
from itertools import chain, product
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.fingerprint import Hasher
from transformers import AutoConfig, AutoTokenizer

from hf_normswap import (
    Fixup,
    NormSwapConfig,
    WeightNorm,
    find_norms,
    get_norm,
    initialize_fixup,
    initialize_weightnorm,
    make_batches,
    set_norm_placement,
    swap_norm,
)
from recipes.common import HELD_OUT
from recipes.vocabulary import train_tokenizer


def load_splits(name, config, splits, columns):
    """The `splits` of a data set of the Hub, or of a folder laid out like one, with at least `columns`."""
    # The cache of `datasets` does not notice that the files of a folder have changed.
    cache = os.path.join(HF_DATASETS_CACHE, _stamp(name)) if os.path.isdir(name) else None
    try:
        data = load_dataset(name, config, cache_dir=cache)
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"A split of the data set {name!r} is empty: {error}") from error
        raise ValueError(f"The data set {name!r} has no configuration {config!r}: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"The data set {name!r} cannot be read without running its code: {error}") from error
    except OSError as error:
        raise ValueError(
            f"There is no data set {name!r}: give the id of one on the Hub, or a local folder."
        ) from error
    for split in splits:
        if split not in data:
            raise ValueError(f"The data set {name!r} has no split {split!r}, only {', '.join(data)}.")
    for split, column in product(splits, columns):
        if column not in (found := data[split].column_names):
            raise ValueError(f"The split {split!r} of {name!r} has no column {column!r}, only {', '.join(found)}.")
    return DatasetDict({split: data[split] for split in splits})


def load_labelled(data_args, config, columns, label="label", is_regression=False):
    """Returns the splits, with a column `label`, and what the head of a model needs to know of the labels."""
    splits = ["train", *(split for split in data_args.scored_splits.values() if split != HELD_OUT)]
    data = load_splits(data_args.dataset_name, config, splits, [*columns, label])
    data = data.select_columns([*columns, label]).rename_columns({label: "label"} if label != "label" else {})
    if data_args.validation_share:
        parts = data["train"].train_test_split(data_args.validation_share, seed=data_args.split_seed)
        data["train"], data[HELD_OUT] = parts["train"], parts["test"]
    for name, split in data.items():
        if len(split) == 0:
            raise ValueError(f"The split {name!r} of {data_args.dataset_name!r} is empty.")
        if not is_regression and not all(isinstance(value, int) for value in split.unique("label")):
            raise ValueError(f"Labels of {data_args.dataset_name!r} are no class numbers: see class_encode_column.")
        if min(split["label"]) < 0:
            raise ValueError(f"The split {name!r} of {data_args.dataset_name!r} has no labels, only -1.")
    if is_regression:
        return data, {"num_labels": 1, "problem_type": "regression"}
    names = getattr(data["train"].features["label"], "names", None) or range(max(data["train"]["label"]) + 1)
    id2label = dict(enumerate(map(str, names)))
    return data, {"num_labels": len(id2label), "id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}


def _stamp(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return Hasher.hash([(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in files])


def check_length(max_length, tokenizer):
    """Refuses inputs that are longer than the model has positions."""
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}, but the model takes {tokenizer.model_max_length} tokens at most."
        )


def load_swapped(auto_class, args, examples, tokenizer_options=None, processor_class=AutoTokenizer, **config):
    """
    The processor, and the model with its norms swapped as the arguments say, or as its checkpoint has them.

    `examples` is the training split, with nothing but what the processor reads.
    """
    try:
        processor = processor_class.from_pretrained(args.model_name_or_path, **(tokenizer_options or {}))
        model = auto_class.from_pretrained(args.model_name_or_path, **config)
    except Exception as error:  # a damaged folder can raise anything
        misfit = "ignore_mismatched_sizes" in str(error)
        reason = "it has weights of other shapes, as the head of another task has" if misfit else error
        raise ValueError(f"{args.model_name_or_path} cannot be loaded: {reason}") from error
    if getattr(processor, "pad_token", "") is None:  # as in GPT-2, which pads with its end of text
        processor.pad_token = processor.eos_token
    return processor, apply_norm_args(model, processor, args, examples)


def make_swapped(auto_class, args, texts, max_length, template="<s> $A </s>", **config):
    """
    A tokenizer trained on `texts`, and a model from scratch with its norms swapped as the arguments say.

    `texts` is the training split, with nothing but the columns of text.
    """
    tokenizer = train_tokenizer(
        chain.from_iterable(column for batch in texts.iter(1000) for column in batch.values()),
        template,
        max_length,
        args.vocab_size,
        words=args.vocabulary == "words",
    )
    config = AutoConfig.for_model(
        args.model_type,
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max_length + 2,  # RoBERTa counts positions from 2
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
            **config,
            **args.config_overrides,
        },
    )
    return tokenizer, apply_norm_args(auto_class.from_config(config), tokenizer, args, texts, is_new=True)


def take_sample(examples, count):
    """`count` examples at random, the same ones in every run, or all if there are fewer."""
    return examples.shuffle(seed=0).take(min(count, len(examples)))


def apply_norm_args(model, processor, args, examples, is_new=False):
    """The model with its norms swapped as the arguments say, or as they are if they are swapped already.

    A new model gets the initial weights that belong to its norm and its placement.
    """
    recorded = getattr(model.config, "norm_swap", None) or {"norms": []}
    if not recorded["norms"]:
        norm = NormSwapConfig(args.norm or "layernorm", **args.norm_options)
        sample = take_sample(examples, args.calibrate) if args.calibrate else None
        where = args.where or "blocks"
        if args.placement:
            scale_weights = is_new and args.placement in ("deep", "sub")
            set_norm_placement(model, args.placement, drop_final=True, scale_weights=scale_weights)
        swap_norm(model, norm, where=where, calibrate_on=sample, tokenizer=processor)
        if is_new and get_norm(norm.norm) is Fixup:
            initialize_fixup(model)
        if is_new and get_norm(norm.norm) is WeightNorm:
            (batch,) = make_batches(model, take_sample(examples, 64), processor, batch_size=64)
            initialize_weightnorm(model, batch)
        return model
    places = {path for entry in recorded["norms"] for path in entry["modules"]}
    asked = {site.path for site in find_norms(model) for where in args.where or [] if site.is_in(where)}
    # Where the record says nothing, the norms stand where the family has them.
    placements = [recorded["placement"]] if "placement" in recorded else [s.placement for s in find_norms(model)]
    for entry in recorded["norms"]:
        same_norm = args.norm is None or get_norm(args.norm).norm_name == entry["norm"]
        same_place = args.placement is None or args.placement in placements
        same_options = args.norm_options.items() <= entry["options"].items()
        if not same_norm or not same_place or not same_options or (args.where and asked != places):
            raise ValueError(
                f"{args.model_name_or_path} is swapped already, to {entry['norm']} in {len(places)} places: leave out "
                "norm, norm_options, where and placement, in the configuration too, or give those that it has."
            )
    return model
