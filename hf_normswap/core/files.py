"""Folders that are written whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A folder to fill that becomes `output` in the end: whole, or not at all on an error.

    Raises:
        ValueError: when `output` exists and is no empty folder.
    """
    output = Path(output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is no empty folder: name another one.")
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
