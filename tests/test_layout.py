"""Imports run one way, the runtime can travel to the Hub, and no file names the machine that it was written on."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_normswap


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_normswap"
MODELING = sorted((PACKAGE / "modeling").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))

RUNTIME_DEPENDENCIES = {"torch", "transformers", "huggingface_hub", "safetensors"}
PUBLIC_MODULES = {"metrics", "reporting.results", "reporting.card", "diagnostics.plots", "training.checkpoints"}

# From the bottom to the top: a folder or a file imports from its own layer and from those below.
LAYERS = [
    {"modeling"},
    {"core", "kernels", "metrics"},
    {"conversion"},
    {"swap", "placement", "initialization"},
    {"fusion", "diagnostics", "reporting"},
    {"training", "convert"},
    {"auto"},
    {"__init__"},
    {"cli", "__main__"},
]
MOST_FILES = 16  # that travel beside the weights, besides the norms


def read(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_at_run_time(tree):
    """All imports but those for the type checker, also those inside functions."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def absolute_names(node, path):
    """The dotted names that an import statement of `path` reaches."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    folder = path.relative_to(ROOT).parts[: -node.level]
    return [".".join([*folder, *filter(None, [node.module]), alias.name]) for alias in node.names]


def unit_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.stem)
def test_the_runtime_stands_on_its_own(path):
    for node in imports_of(read(path)):
        where = f"{path.name}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.level:
            # The loader of the Hub finds the files to fetch by this form alone.
            assert re.fullmatch(r"from \.\w+ import .*", ast.unparse(node)), f"{where}: use `from .name import ...`"
            assert (path.parent / f"{node.module}.py").exists(), f"{where}: there is no {node.module}.py beside it"
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            outside = {name.split(".")[0] for name in names} - sys.stdlib_module_names - RUNTIME_DEPENDENCIES
            assert not outside, f"{where}: the runtime may not import {outside}"


def test_the_runtime_is_flat_and_small():
    others = [path for path in MODELING if "@register_norm(" not in path.read_text(encoding="utf-8")]
    assert 0 < len([path for path in others if path.name != "__init__.py"]) <= MOST_FILES
    assert not [path for path in (PACKAGE / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_no_import_goes_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in modules.items():
        reached = {other for node in imports_at_run_time(read(path)) for other in absolute_names(node, path)}
        # `from .module import name` reaches the module, or the name in the package.
        reached |= {other.rpartition(".")[0] for other in reached}
        graph[name] = {other for other in reached if other in modules and other != name}
    TopologicalSorter(graph).prepare()


def test_imports_of_the_package_run_one_way():
    rank = {unit: level for level, units in enumerate(LAYERS) for unit in units}
    for path in sorted(PACKAGE.rglob("*.py")):
        unit = unit_of(path)
        assert unit in rank, f"{unit} has no place yet: enter it in LAYERS"
        for node in imports_at_run_time(read(path)):
            for name in absolute_names(node, path):
                if name.startswith("hf_normswap."):
                    other = name.split(".")[1]
                    assert rank.get(other, 0) <= rank[unit], f"{path.name}:{node.lineno}: {unit} imports from {other}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_use_the_public_face(path):
    public = set(hf_normswap.__all__) | PUBLIC_MODULES
    for node in imports_of(read(path)):
        for name in absolute_names(node, path):
            if name.startswith("hf_normswap."):
                is_public = any(f"{name}.".startswith(f"hf_normswap.{face}.") for face in public)
                assert is_public, f"{path.name}:{node.lineno}: {name} is not public"


def files_of_the_project():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git repository")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_names_a_machine():
    machine = re.compile(r"(?<![\w.}])/(tmp|work|root|home|opt|mnt|Users)/\w|\.\./shared")
    found = []
    for path in files_of_the_project():
        if path == ROOT / ".ci" / "run":
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if machine.search(line)
        ]
    assert not found, "\n".join(found)


def test_no_test_imports_another():
    """What tests share is in tests/helpers, for the scripts that they run as well."""
    of_a_test = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*(?:test_\w+|conftest)\b", re.MULTILINE)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found = of_a_test.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(ROOT)}: {found[0].strip()}: move what it takes to tests/helpers"
