"""Texts that a verb reads."""

import argparse
import os
import sys
from pathlib import Path

from .checkpoints import reading


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add what [`read_data`] takes; whether texts are `required`."""
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
        type=count,
        default=512,
        help="texts to take, a seeded sample of them (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=count, default=32, help="texts of a batch (default: %(default)s)")


def read_data(args: argparse.Namespace):
    """The sample of texts, as a data set with nothing but them where the columns are known; `None` without any."""
    from datasets import Dataset, load_dataset

    if args.texts is None and args.dataset_name is None:
        return None
    if args.texts is not None and (args.dataset_config_name or args.split or args.columns):
        raise ValueError("dataset_config_name, split and columns are of a data set: leave them out with texts.")
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


def _sample(data, examples):
    return data.shuffle(seed=0).take(min(examples, len(data)))


def count(text: str) -> int:
    """A number above 0, for `argparse`."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0.")
    return int(text)
