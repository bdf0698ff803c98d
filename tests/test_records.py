"""The records of runs, their index, and the figures of the README."""

import json
import re
import sys

import pytest

from tests.helpers.persistence import ROOT


FOLDER = ROOT / "results"
sys.path.insert(0, str(FOLDER))

import render  # noqa: E402


INDEX = (FOLDER / "README.md").read_text(encoding="utf-8")
RUNS = sorted(path for folder in render.RUNS for path in (FOLDER / folder).glob("*.json"))
# What the records call the tasks that have shorter names.
TASKS = {
    **{"btc": "broad_twitter_corpus", "wnut17": "wnut_17", "multi30k": "multi30k de-en"},
    **{"ptb-gpt2": "ptb_text_only", "ptb-bert": "ptb_text_only"},
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_index_is_that_of_the_records():
    assert INDEX == render.render()


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: f"{page.relative_to(ROOT)}")
def test_the_tables_of_the_documentation_are_those_of_the_records(page):
    text = page.read_text(encoding="utf-8")
    assert render.fill(text) == text


def test_every_record_is_in_the_index():
    for path in FOLDER.rglob("*.json"):
        parts = path.relative_to(FOLDER).parts
        assert f"]({'/'.join(parts)})" in INDEX or f"]({parts[0]})" in INDEX, path.name


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_name_of_a_run_is_that_of_its_record(path):
    record = read(path)
    name = render.NAME.fullmatch(path.stem)
    assert TASKS.get(name["task"], name["task"]) == record["task"]
    assert (name["norm"], int(name["seed"])) == (record["norm"], record["seed"])
    # The families where they stand by themselves, unless the record says otherwise.
    own = "pre" if record["model"].startswith("gpt2") else "post"
    assert name["placement"] == record.get("placement", own)
    arguments, variant = record["arguments"], name["variant"] or ""
    assert (variant == "progressive") == ("progressive" in arguments)
    if path.parent.name.startswith("glue"):
        assert (variant == "calibrated") == ("calibrate" in arguments)
        assert (variant == "") == (record["norm"] == "layernorm")
        assert ("bf16" in arguments) == (path.parent.name == "glue")
    if variant.startswith("warmup"):
        assert float(variant.partition("-")[2]) == arguments["warmup_steps"]


def test_a_name_that_says_too_little_is_refused(tmp_path, monkeypatch):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "sst2-rbn-0.json").write_text("{}")
    monkeypatch.setattr(render, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="sst2-rbn-0.json does not say task, norm, placement and seed"):
        render.find_runs("glue")


# README


def rows_of_readme(heading):
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [
        ["".join(re.findall(r"[\d.]+", cell)[-1:]) if number else cell for number, cell in enumerate(row)]
        for row in rows[2:]
    ]


def test_the_replacements_of_the_readme_are_those_of_the_records():
    minilm, wnut17, gpt2, marian, roberta, llama = rows_of_readme("Post-training norm replacement")
    rows = read(FOLDER / "calibration-batchnorm.json")["rows"]
    ways = {"naive swap": (0, 2), "calibrated": (256, 3), "calibrated, distilled": (256, 4)}
    before = {row["accuracy_before"] for row in rows}
    assert minilm[1] == f"{100 * sum(before) / len(before):.1f}"
    for way, (sentences, column) in ways.items():
        chosen = [row for row in rows if row["way"].partition(" in ")[0] == way and row["sentences"] == sentences]
        found = [100 * row["accuracy"] for row in chosen]
        assert minilm[column] == f"{sum(found) / len(found):.1f}", way
    for row, name, metric, digits in (
        (gpt2, "gpt2-12/batchnorm-blocks-256", "perplexity", 1),
        (marian, "marian/batchnorm-pairs-1024", "bleu", 1),
        (roberta, "roberta/batchnorm-masked-lines-1024", "perplexity", 1),
        (llama, "llama/batchnorm-blocks-256", "perplexity", 1),
    ):
        calibrated, distilled = (read(FOLDER / "conversion" / f"{name}{end}.json") for end in ("", "-distilled"))
        scores = [calibrated["before"][metric], calibrated["metrics"][metric], distilled["metrics"][metric]]
        assert [row[1], row[3], row[4]] == [f"{score:.{digits}f}" for score in scores]
    models = [read(FOLDER / "post-training" / f"{'wnut17'}-{seed}.json")["metrics"] for seed in range(3)]
    means = [sum(each[way] for each in models) / 3 for way in ("before", "converted", "distilled")]
    assert [wnut17[1], wnut17[3], wnut17[4]] == [f"{value:.1f}" for value in means]
