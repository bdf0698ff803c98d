"""What is saved of a model with swapped norms: the code beside its weights, and a configuration that is true.

A norm may stand in a model that does not know of it: put in by hand, in a part that was swapped by itself, or in a
part of a swapped model. transformers saves such a model as one of its own class, and it loads with LayerNorms.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .registry import get_norm


logger = logging.get_logger(__name__)


def guard_saving() -> None:
    """Let `PreTrainedModel.save_pretrained`, which has no hook of its own, call [`check_saving`] first."""
    save = PreTrainedModel.save_pretrained
    if getattr(save, "keeps_norms", False):  # the file may be imported twice: installed, and from the Hub
        return

    @functools.wraps(save)
    def save_pretrained(self, *args, **kwargs):
        check_saving(self)
        return save(self, *args, **kwargs)

    save_pretrained.keeps_norms = True
    PreTrainedModel.save_pretrained = save_pretrained


def check_saving(model: PreTrainedModel) -> None:
    """Make the configuration of a swapped model, or of its swapped parts, say what their modules are now.

    Raises:
        ValueError: when a folder of `model` would load with other norms than it has.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # it is the adapter that is saved
        return
    kind = type(model).__name__
    if is_swapped(model):
        model.update_record()
        if model.stock_class is not None:
            name = model.stock_class.__name__
            logger.warning(
                f"The code of {name} is not saved with its weights, and an Auto class would load another class: load "
                f"the folder with swapped_class({name}).from_pretrained(...)."
            )
        return
    if getattr(model.config, "norm_swap", None) is not None:
        raise ValueError(
            f"This {kind} has the configuration of a swapped model, and a folder of it would load with other norms: "
            "save the whole swapped model, or give the class a configuration of its own family."
        )
    parts = dict(_find_parts("", model))
    for name, part in parts.items():
        if is_swapped(part):
            part.update_record()
        if not is_swapped(part) or not any(config is part.config for config in _configs_of(model.config)):
            raise ValueError(
                f"{name} has a swapped norm that this {kind} does not know of, and a folder of it would load with "
                "LayerNorm: swap the whole model with swap_norm, and save that."
            )
    if parts:
        logger.warning(
            f"This {kind} is saved without the code of its swapped parts: load it after `import hf_normswap`, as "
            "trust_remote_code alone cannot."
        )


def is_swapped(model) -> bool:
    """Whether `model` is one of a class of swapped models, of this copy of the code or of another."""
    return hasattr(type(model), "update_record")


def _find_parts(prefix: str, module) -> Iterator[tuple]:
    """Names of the swapped models inside of `module`, and of the norms that stand in none of them."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if is_swapped(child) or hasattr(type(child), "norm_name"):
            yield name, child
        else:
            yield from _find_parts(f"{name}.", child)


def _configs_of(config) -> Iterator:
    """A configuration and those inside of it."""
    yield config
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig):
            yield from _configs_of(inner)


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
