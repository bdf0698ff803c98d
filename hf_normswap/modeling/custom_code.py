"""The code that goes beside the weights, so that `trust_remote_code=True` loads a model without this package."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .registry import get_norm


logger = logging.get_logger(__name__)

_IMPORTS = re.compile(r"^from hf_normswap(\.modeling\.norms)? import", flags=re.MULTILINE)


def save_custom_code(config, folder) -> None:
    """Copy this folder's files and those of the norms that `config` names into `folder`.

    A norm that is not of this package travels with its own file; where it cannot, a warning says so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parent / "modeling_normswap.py"
    paths = {Path(path) for path in _with_imports(root)}
    sources = {path.name: path.read_text(encoding="utf-8") for path in paths}
    for entry in (config.norm_swap or {}).get("norms", []):
        norm = get_norm(entry["norm"])
        path = _source_file(norm)
        if path in paths:
            continue  # one of ours, or the second norm of a file
        source, obstacle = _portable_source(norm, path, sources)
        if obstacle:
            logger.warning(
                f"The norm {norm.norm_name!r} cannot travel with the model because {obstacle}: "
                "the folder loads only where that norm is registered first."
            )
            continue
        paths.add(path)
        sources[path.name] = source
        sources["norms.py"] += f"\nfrom .{path.stem} import {norm.__name__}  # noqa: E402, F401\n"
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")


def _with_imports(root: Path) -> list:
    return [root, *get_relative_import_files(root)]


def _source_file(norm: type) -> Path | None:
    try:
        return Path(inspect.getsourcefile(norm))
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return None


def _portable_source(norm: type, path: Path | None, taken: dict) -> tuple[str, str]:
    """Source of the file that defines `norm` with imports that work beside the weights, or why there is none."""
    if norm.__module__ == "__main__" or "." in norm.__qualname__:
        return "", "it is defined in a script, a notebook, a function or a class, not in a module of its own"
    if path is None or not path.is_file():
        return "", "its source file is not available"
    if path.stem == "__init__" or not path.stem.isidentifier():
        return "", f"{path.name} cannot be imported by its name"
    if path.name in taken:
        return "", f"another file that goes with the model is called {path.name} too"
    source = _IMPORTS.sub("from .norms import", path.read_text(encoding="utf-8"))
    facade = importlib.import_module(".norms", __package__).__all__
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            foreign = {alias.name.split(".")[0] for alias in node.names} - _AVAILABLE
        elif isinstance(node, ast.ImportFrom) and node.module == "norms" and node.level == 1:
            foreign = {alias.name for alias in node.names} - set(facade)
        elif isinstance(node, ast.ImportFrom):
            foreign = {node.module or "."} if node.level else {node.module.split(".")[0]} - _AVAILABLE
        else:
            continue
        if foreign:
            return "", f"its file imports {', '.join(sorted(foreign))}"
    return source, ""


_AVAILABLE = {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub", "numpy"}
