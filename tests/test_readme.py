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
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def snippets_of(page):
    """The snippets of a page; one that says that it continues begins with those above it."""
    above = ""
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield above + snippet if snippet.startswith("# Continues") else snippet
        above += snippet


SNIPPETS = {
    f"{page.relative_to(ROOT).as_posix()}-{number}": snippet
    for page in PAGES
    for number, snippet in enumerate(snippets_of(page))
}
MODULES = sorted(module.name for module in pkgutil.walk_packages(hf_normswap.__path__, "hf_normswap."))


@pytest.fixture(autouse=True)
def registry_of_its_own(monkeypatch):
    """Examples register norms."""
    for table in ("_NORMS", "_ALIASES"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[snippet], snippet, "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    outcome = doctest.testmod(module)
    assert outcome.failed == 0
    # None is passed over, as those of a function are that a decorator hides.
    assert outcome.attempted == len(
        re.findall(r"^ *>>> ", Path(module.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_no_figure_is_missing():
    for page in (*PAGES, *(ROOT / "recipes").glob("*.md")):
        assert not re.search(r"\b[A-Z]+_(TABLE|OVERHEAD|FIGURE)\b", page.read_text(encoding="utf-8")), page.name
