"""Folders that are written whole or not at all, and what belongs into them beside a model."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A folder to fill that becomes `output` in the end: whole, or not at all on an error.

    Raises:
        ValueError: when `output` exists and is no empty folder, or is a mount point, which nothing can replace.
    """
    output = Path(output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is no empty folder: name another one.")
    if output.is_mount():
        raise ValueError(
            f"{output} is a mount point, which no finished folder can replace: name a folder inside of it."
        )
    parent = next(folder for folder in output.parents if folder.exists())
    # Inside of a temporary folder, which is its owner's alone: what is made in it has the usual permissions.
    with tempfile.TemporaryDirectory(prefix=".normswap-", dir=parent) as temporary:
        folder = Path(temporary, output.name)
        folder.mkdir()
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()  # a rename onto an empty folder is not for every system
        folder.rename(output)


_SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def copy_sentence_modules(source: str | os.PathLike, folder: str | os.PathLike) -> list[str]:
    """Copy what sentence-transformers needs beside a model: the list of modules, pooling, dense layers and prompts.

    A converted or folded model, saved in `folder`, is then one of sentence-transformers as the model in `source` is.

    Args:
        source (`str` or `os.PathLike`): the folder that the model came from, of sentence-transformers or not.
        folder (`str` or `os.PathLike`): the folder that the model was saved in.

    Returns:
        `list[str]`: names of what was copied; empty where `source` is no local folder of sentence-transformers.

    Raises:
        ValueError: when the list of modules in `source` names something outside of it, or its model is not what
            transformers would load. Nothing is copied then.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_normswap import copy_sentence_modules
    >>> with tempfile.TemporaryDirectory() as source, tempfile.TemporaryDirectory() as folder:
    ...     copy_sentence_modules(source, folder)
    []

    ```
    """
    source, folder = Path(source), Path(folder)
    listing = source / "modules.json"
    if not listing.is_file():
        return []
    try:
        paths = [module["path"] for module in json.loads(listing.read_text(encoding="utf-8"))]
        inside = [(source / path).resolve() for path in paths]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{listing} is no list of modules of sentence-transformers: mend or remove it.") from error
    root = source.resolve()
    if root not in inside:
        raise ValueError(f"{listing} has its model in a folder of its own: pass that folder as the model to load.")
    names = [Path(path).as_posix() for path, place in zip(paths, inside, strict=True) if place != root]
    if outside := [path for path, place in zip(paths, inside, strict=True) if not place.is_relative_to(root)]:
        raise ValueError(f"{listing} names {outside[0]}, which is not in {source}: mend or remove it.")
    names = [name for name in names if (source / name).is_dir()]  # one without files is not on the Hub
    for name in names:
        shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    files = [name for name in _SENTENCE_FILES if (source / name).is_file()]
    for name in files:
        shutil.copyfile(source / name, folder / name)
    return [*names, *files]
