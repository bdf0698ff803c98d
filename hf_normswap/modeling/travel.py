"""The code that goes beside the weights, so that `trust_remote_code=True` loads a model without this package."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .configuration import family_of
from .registry import get_norm


logger = logging.get_logger(__name__)

_IMPORTS = re.compile(r"^from hf_normswap(\.modeling\.norms)? import", flags=re.MULTILINE)


def auto_heads(config_class: type) -> dict[str, str]:
    """Auto class name → swapped class name, for every head that transformers has for the family."""
    family = family_of(config_class.model_type)
    heads = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and family in mapping._model_mapping:
            heads[name] = "NormSwap" + mapping._model_mapping[family]
    return heads


def auto_map(config_class: type) -> dict[str, str]:
    """The `auto_map` of a saved configuration: every head, so that a language model opens as a classifier too.

    All in one file: the loader imports a local folder anew for each file that it is sent to.
    """
    classes = {"AutoConfig": config_class.__name__, **auto_heads(config_class)}
    return {auto: f"swapped.{name}" for auto, name in classes.items()}


def write_code(config, folder) -> None:
    """Copy this folder's files and those of the norms that `config` names into `folder`.

    A norm that is not of this package travels with its own file; where it cannot, a warning says so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parent / "swapped.py"
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
