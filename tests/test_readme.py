"""The examples of the documentation run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import hf_normswap
from hf_normswap.modeling import norms, registry  # noqa: F401  (norms registers those of the package)


ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
MODULES = sorted(module.name for module in pkgutil.walk_packages(hf_normswap.__path__, "hf_normswap."))


@pytest.fixture(autouse=True)
def registry_of_its_own(monkeypatch):
    """Examples register norms."""
    for table in ("_NORMS", "_ALIASES"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


@pytest.mark.parametrize("number", range(1, len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch):
    # The first is the one line of the introduction, whose model is the reader's.
    assert "swap_norm(model" in SNIPPETS[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0


def test_there_are_examples():
    assert len(SNIPPETS) > 2
    finder = doctest.DocTestFinder()
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) > 8
