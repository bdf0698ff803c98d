"""
Results of runs: one run is one JSON file, and a folder of them is a comparison.

A result is a plain dictionary:

| entry | content |
|---|---|
| `task`, `model`, `norm` | what was trained, and with which norm |
| `seed` | seed of the run |
| `metrics` | final scores, `{name: number}`; `null` where a score was NaN or infinite |
| `norm_swap` | *optional*, what was swapped: `model.config.norm_swap` |
| `placement` | *optional*, as `set_norm_placement` takes it |
| `baselines` | *optional*, scores that need no training, `{name: number}` |
| `arguments`, `history`, `versions`, `hardware`, `command` | *optional*, how the run went and how to repeat it |
"""

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .comparison import ComparisonTable, compare_results


__all__ = ["ComparisonTable", "compare_results", "describe_environment", "load_results", "write_result"]

FORMAT_VERSION = 1

_REQUIRED = {"task": str, "model": str, "norm": str, "seed": int, "metrics": dict}
_LIBRARIES = ("hf_normswap", "torch", "transformers", "accelerate", "datasets", "evaluate")


def write_result(result: dict[str, Any], path: str | os.PathLike) -> Path:
    """
    Writes the result of one run, whole or not at all: a reader, or an interruption, never meets half a file.

    NaN and infinities, which JSON does not have, are written as `null`: a diverged run stays on record, and
    [`compare_results`] says in how many runs a score was finite.

    Args:
        result (`dict`):
            The result, with `task`, `model`, `norm`, `seed` and `metrics` at least. NumPy and torch scalars will do.
        path (`str` or `os.PathLike`):
            Where to write it. Missing folders are made, an older result is replaced.

    Returns:
        `Path`: The file written.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_normswap.reporting.results import load_results, write_result

    >>> result = {"task": "rte", "model": "bert", "norm": "rbn", "seed": 0, "metrics": {"accuracy": 0.7}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_result(result, f"{folder}/rte/bert-rbn-0.json")
    ...     load_results(folder)[0]["metrics"]
    {'accuracy': 0.7}

    ```
    """
    result = {"format_version": FORMAT_VERSION} | _to_json(result)
    if defect := _find_defect(result):
        raise ValueError(f"This result cannot be written because {defect}: correct that entry.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_results(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[dict[str, Any]]:
    """
    Reads results.

    Args:
        paths (`str`, `os.PathLike` or an iterable of them):
            Result files, and folders that stand for every result in them and below. Other JSON files of a folder,
            such as a model's configuration, are passed over.

    Returns:
        `list[dict]`: One dictionary for each run, in the order of the file names.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    results = {}
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: pass the files or folders that the recipes wrote.")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            content = _parse(file)
            is_result = isinstance(content, dict) and "format_version" in content and content.keys() & _REQUIRED.keys()
            if file == path or is_result:
                results[file] = _check(content, file)
    if not results:
        raise FileNotFoundError(f"There is no result in {', '.join(map(str, paths))}: run a recipe first.")
    return list(results.values())


def describe_environment() -> dict[str, Any]:
    """
    Describes what a run ran on, with nothing that names the machine or its user.

    Returns:
        `dict`: `versions`, by library, and `hardware`, ready to be merged into a result.

    Example:

    ```python
    >>> from hf_normswap.reporting.results import describe_environment

    >>> sorted(describe_environment()["versions"])
    ['accelerate', 'datasets', 'evaluate', 'hf_normswap', 'python', 'torch', 'transformers']

    ```
    """
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # of a source tree, or of what training does not need
            versions[library] = metadata.version(library)
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{_cpu_name()}, {os.cpu_count()} cores"
    return {"versions": versions, "hardware": hardware}


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of a file that is no text
        raise ValueError(f"{path} is damaged ({error}): delete it and repeat the run.") from error


def _check(result: Any, path: Path) -> dict[str, Any]:
    version = result.get("format_version") if isinstance(result, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, newer than the {FORMAT_VERSION} known here: upgrade hf_normswap."
        )
    if defect := _find_defect(result):
        raise ValueError(f"{path} is not the result of a run because {defect}: move it out of the results.")
    return result


def _find_defect(result: Any) -> str | None:
    if not isinstance(result, dict) or not isinstance(result.get("format_version"), int):
        return "it has no format version"
    for name, kind in _REQUIRED.items():
        if not isinstance(result.get(name), kind):
            return f"its {name!r} is {'missing' if name not in result else f'no {kind.__name__}'}"
    for name, value in result["metrics"].items():
        if not isinstance(value, int | float | None):
            return f"its metric {name!r} is no number"
    return None


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
