"""Texts, images and recordings that a verb reads."""

import argparse
import os
import sys
from pathlib import Path

from .checkpoints import reading


# Of a usage: the options of which one says what to read.
SOURCES = "--texts FILE | --images PATH ... | --audio PATH ... | --dataset_name NAME"


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add what [`read_data`] takes; whether data is `required`."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--texts", metavar="FILE", help="text file, one text a line; - is the standard input")
    source.add_argument("--images", nargs="+", metavar="PATH", help="image files, or folders of them")
    source.add_argument("--audio", nargs="+", metavar="PATH", help="sound files, or folders of them")
    source.add_argument("--dataset_name", metavar="NAME", help="Hub id or folder of a data set")
    parser.add_argument("--dataset_config_name", metavar="NAME", help="its configuration, if it has several")
    parser.add_argument("--split", help="its split (default: train)")
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="COLUMN",
        help="its one or two columns of text, its one column of images or sound, or, of a column `translation`, the "
        "source and the target language",
    )
    parser.add_argument(
        "--examples",
        type=count,
        default=512,
        help="examples to take, a seeded sample of them (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=count, default=32, help="examples of a batch (default: %(default)s)")


def has_data(args: argparse.Namespace) -> bool:
    """Whether the arguments name anything to read."""
    return any(value is not None for value in (args.texts, args.images, args.audio, args.dataset_name))


def read_data(args: argparse.Namespace):
    """The sample of examples, as a data set with nothing but them where the columns are known; `None` without any."""
    from datasets import load_dataset

    if not has_data(args):
        return None
    if args.dataset_name is None:
        if args.dataset_config_name or args.split or args.columns:
            kind = "texts" if args.texts is not None else "images" if args.images else "audio"
            raise ValueError(f"dataset_config_name, split and columns are of a data set: leave them out with {kind}.")
        return _sample(_read_texts(args.texts) if args.texts is not None else _read_files(args), args.examples)
    # The cache of `datasets` does not notice that the files of a folder have changed.
    mode = "reuse_cache_if_exists" if os.path.isdir(args.dataset_name) else None
    with reading(args.dataset_name):
        data = load_dataset(
            args.dataset_name, args.dataset_config_name, split=args.split or "train", download_mode=mode
        )
    data = _sample(data, args.examples)
    if "translation" in data.column_names:
        data = data.from_list(data["translation"])
        if not args.columns:
            languages = " ".join(data.column_names)
            raise ValueError(
                f"{args.dataset_name} has translations: say from and to what, as in --columns {languages}."
            )
    data = data.select_columns(args.columns) if args.columns else data
    words = [name for name in args.columns or () if _is_of_words(data.features[name])]
    return data.map(lambda row: {name: " ".join(row[name]) for name in words}) if words else data


def _is_of_words(feature) -> bool:
    """Whether a column has the words of a text one by one, as data sets of entities have."""
    return getattr(getattr(feature, "feature", None), "dtype", None) == "string"


def _read_texts(path: str):
    """A data set of the lines of a file."""
    from datasets import Dataset

    with reading(path):
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    texts = [line.strip() for line in text.split("\n") if line.strip()]
    if not texts:
        raise ValueError(f"{path} has no text in it: give a file with a text on each line.")
    return Dataset.from_dict({"text": texts})


def _read_files(args: argparse.Namespace):
    """A data set of images or recordings: of the files that are given, and of all of their kind in a folder."""
    from datasets import Audio, Dataset, Image
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    kind, builder, feature = ("image", ImageFolder, Image()) if args.images else ("audio", AudioFolder, Audio())
    files = []
    for path in map(Path, args.images or args.audio):
        if not path.exists():
            raise ValueError(f"{path} cannot be read: there is no such file or folder.")
        inside = path.rglob("*") if path.is_dir() else [path]
        found = sorted(str(file) for file in inside if file.suffix.lower() in builder.EXTENSIONS and file.is_file())
        if not found:
            raise ValueError(f"{path} has no {kind} file in it: give one, or a folder of them.")
        files += found
    return Dataset.from_dict({kind: files}).cast_column(kind, feature)


def _sample(data, examples):
    return data.shuffle(seed=0).take(min(examples, len(data)))


def count(text: str) -> int:
    """A number above 0, for `argparse`."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0.")
    return int(text)
