"""Swap the norms of a pretrained model, fitted to its LayerNorms on texts without labels.

The model keeps the head that its checkpoint names. One that is swapped already, and neither calibrated nor trained
since, is calibrated as it is, without --norm.

Examples:

    normswap calibrate textattack/bert-base-uncased-SST-2 sst2-rbn --norm rbn --texts reviews.txt
    zcat reviews.gz | normswap calibrate my-model my-model-pn --norm powernorm --where all --texts - --json
    normswap calibrate my-swapped-model my-calibrated-model --dataset_name stanfordnlp/imdb --columns text
    normswap calibrate Helsinki-NLP/opus-mt-en-de en-de-rbn --norm rbn --dataset_name wmt/wmt14 \\
        --dataset_config_name de-en --split validation --columns en de
"""

import argparse
import copy
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from hf_normswap.files import new_folder

from .checkpoints import load_checkpoint, reading
from .reports import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    # Positionals first: behind an option of several values they would be further ones.
    parser.usage = "%(prog)s MODEL OUTPUT [--norm NORM] (--texts FILE | --dataset_name NAME) [--option VALUE ...]"
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model to start from")
    parser.add_argument("output", metavar="OUTPUT", help="folder to save the calibrated model in, new or empty")
    add_conversion_arguments(parser, required=True)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def add_conversion_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add what [`convert`] takes; whether texts are `required`."""
    parser.add_argument("--norm", help="norm to swap in, for example rbn, batchnorm or powernorm")
    parser.add_argument(
        "--norm_options",
        type=_json_object,
        metavar="JSON",
        help="options of the norm, for example '{\"momentum\": 0.2}'",
    )
    parser.add_argument("--where", nargs="+", help="which norms to swap, one or several names (default: blocks)")
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--texts", metavar="FILE", help="text file, one text a line; - is the standard input")
    source.add_argument("--dataset_name", metavar="NAME", help="Hub id or folder of a data set")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="its configuration, if it has several")
    parser.add_argument("--split", help="its split (default: train)")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="its one or two columns of text, or, of a column `translation`, the source and the target language",
    )
    parser.add_argument(
        "--examples",
        type=_count,
        default=512,
        help="texts to calibrate on, a seeded sample of them (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=_count, default=32, help="texts of a batch (default: %(default)s)")
    parser.add_argument(
        "--memory_budget",
        type=_count,
        default=2**30,
        metavar="BYTES",
        help="activations to keep in memory, more are memory-mapped (default: %(default)s)",
    )
    parser.add_argument(
        "--distillation_steps",
        type=_count,
        default=0,
        metavar="STEPS",
        help="then train the model so many steps against the original, on the same texts (default: none)",
    )


def run(args: argparse.Namespace) -> None:
    """Calibrate, save, and print the report."""
    with new_folder(args.output) as folder:
        model, tokenizer, report = convert(args)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if args.json:
        print_json({"output": args.output, "fits": list(map(asdict, report))})
    else:
        print_table(report.rows())


def convert(args: argparse.Namespace) -> tuple:
    """Model, tokenizer and report of the calibration."""
    from hf_normswap import NormSwapConfig, calibrate, distill, get_norm, restore_norm, swap_norm

    if args.texts is not None and (args.dataset_config_name or args.split or args.columns):
        raise ValueError("dataset_config_name, split and columns are of a data set: leave them out with texts.")
    if args.norm:
        # swap_norm(calibrate_on=...) takes these options by itself, but keeps the report.
        norm = NormSwapConfig(args.norm, **{**get_norm(args.norm).calibrated_options, **(args.norm_options or {})})
    data = _read_data(args)
    model, tokenizer = load_checkpoint(args.model)
    record = getattr(model.config, "norm_swap", None)
    if record and {entry["norm"] for entry in record["norms"]} == {"layernorm"}:  # the baseline of the recipes
        restore_norm(model)
        record = None
    if record is None and not args.norm:
        raise ValueError(f"{args.model} has LayerNorms: say what they become, for example with --norm rbn.")
    if record is not None and args.distillation_steps:
        raise ValueError(f"{args.model} is swapped already, and there is no original to distill: leave that out.")
    if record is None:
        original = copy.deepcopy(model) if args.distillation_steps else None
        with _without_warning():
            swap_norm(model, norm, where=args.where or "blocks")
    elif args.norm or args.norm_options or args.where:
        norms = " and ".join(dict.fromkeys(entry["norm"] for entry in record["norms"]))
        raise ValueError(f"{args.model} is swapped already, to {norms}: leave out norm, norm_options and where.")
    reader = copy.deepcopy(tokenizer)  # saved is what came
    if reader.pad_token is None:  # as in GPT-2, which pads with its end of text
        reader.pad_token = reader.eos_token
    options = {"tokenizer": reader, "batch_size": args.batch_size}
    report = calibrate(model, data, memory_budget=args.memory_budget, **options)
    if args.distillation_steps:
        distill(model, original, data, steps=args.distillation_steps, **options)
    return model, tokenizer, report


def _read_data(args):
    """The sample of texts, as a data set with nothing but them where the columns are known."""
    from datasets import Dataset, load_dataset

    if args.texts is not None:
        with reading(args.texts):
            text = sys.stdin.read() if args.texts == "-" else Path(args.texts).read_text(encoding="utf-8")
        texts = [line.strip() for line in text.split("\n") if line.strip()]
        if not texts:
            raise ValueError(f"{args.texts} has no text in it: give a file with a text on each line.")
        return _sample(Dataset.from_dict({"text": texts}), args.examples)
    # The cache of `datasets` does not notice that the files of a folder have changed.
    mode = "reuse_cache_if_exists" if os.path.isdir(args.dataset_name) else None
    with reading(args.dataset_name):
        data = load_dataset(
            args.dataset_name, args.dataset_config_name, split=args.split or "train", download_mode=mode
        )
    data = _sample(data, args.examples)
    if "translation" in data.column_names:
        data = Dataset.from_list(data["translation"])
        if not args.columns:
            languages = " ".join(data.column_names)
            raise ValueError(
                f"{args.dataset_name} has translations: say from and to what, as in --columns {languages}."
            )
    return data.select_columns(args.columns) if args.columns else data


def _sample(data, count):
    return data.shuffle(seed=0).take(min(count, len(data)))


@contextmanager
def _without_warning() -> Iterator[None]:
    """`swap_norm` warns of a swap without calibration, which here follows at once."""
    logger = logging.getLogger("hf_normswap.surgery")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _json_object(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object.") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0.")
    return int(text)
