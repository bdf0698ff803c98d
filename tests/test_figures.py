"""Every measured number of README, documentation and recipes is rendered from a record."""

import json
import re
import sys

import pytest

from tests.helpers.persistence import ROOT


sys.path.insert(0, str(ROOT / "results"))

import records  # noqa: E402


# Other tests hold these pages to their sources: the cards are rendered as a whole, and so is the index of the records.
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Phrases of each page whose numbers this project did not measure: settings, versions, figures of papers and manuals.
GIVEN = json.loads((ROOT / "tests/data/given_figures.json").read_text(encoding="utf-8"))

RENDERED = re.compile(r"<!-- results .+? -->.*?<!-- end -->", re.DOTALL)
NO_TEXT = (
    re.compile(r"\A---\n.*?\n---\n", re.DOTALL),  # of a site generator
    re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE),
    re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL),
    re.compile(r"`[^`]*`"),
    re.compile(r"\]\([^)]*\)"),
)
# What is measured has decimals, or is a share.
FIGURE = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+(?:e-?\d+)?|e-\d+| ?%)(?![\w])")


def find_figures(text, given=()):
    """The figures of a page that no record renders."""
    text = RENDERED.sub(" ", text)
    for pattern in NO_TEXT:
        text = pattern.sub(" ", text)
    text = re.sub(r"\s+", " ", text)
    for words in given:
        text = text.replace(words, " ")
    return FIGURE.findall(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.relative_to(ROOT)}")
def test_every_figure_is_rendered_from_a_record(page):
    given = GIVEN.get(f"{page.relative_to(ROOT)}", [])
    text = page.read_text(encoding="utf-8")
    assert find_figures(text, given) == []
    plain = re.sub(r"\s+", " ", text)
    assert [words for words in given if words not in plain] == []


def test_a_typed_figure_is_found():
    text = "Loses <!-- results mean x y -->0.3<!-- end --> of 85.5 %, in `1.0` or $2.0$, 3 % or 4e-5 (torch 2.6).\n"
    assert find_figures(text, ["torch 2.6"]) == ["85.5", "3 %", "4e-5"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for seed, score in enumerate((0.5, 0.75)):
        rows = [{"way": "naive", "sentences": 1, "loss": 2.0}, {"way": "all", "sentences": 1, "loss": score}]
        record = {"metrics": {"accuracy": score}, "rows": rows}
        (tmp_path / f"a-{seed}.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"metrics": {"accuracy": 0.875}, "rows": []}), encoding="utf-8")
    return tmp_path


def test_figures_of_records(folder):
    figures = records.FIGURES
    assert figures["mean"]("a-*.json", "metrics.accuracy", ".2f") == "0.62"
    assert figures["mean"]("a-*.json", "metrics.accuracy", ".1f", "100") == "62.5"
    assert figures["each"]("a-*.json", "metrics.accuracy", ".0f", "100") == "50, 75"
    assert figures["lowest"]("a-*.json", "metrics.accuracy", ".1f") == "0.5"
    assert figures["highest"]("a-*.json", "rows[-1].loss", ".2f") == "0.75"
    assert figures["change"]("a-*.json", "b.json", "metrics.accuracy", "+.3f") == "−0.250"
    assert figures["mean"]("a-*.json", "rows[way=all,sentences=1].loss", ".3f") == "0.625"


def test_a_figure_without_a_record_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="No record matches c.json"):
        records.mean("c.json", "metrics.accuracy")
    with pytest.raises(KeyError, match="No record of b.json has metrics.f1"):
        records.mean("b.json", "metrics.f1")
