"""Result files and their comparison: round trips, interruptions, statistics worked out by hand, errors."""

import json
import math
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_normswap.reporting.results import compare_results, describe_environment, load_results, write_result


def make_run(norm="rbn", seed=0, task="rte", model="bert", **entries):
    return {"task": task, "model": model, "norm": norm, "seed": seed, "metrics": {"accuracy": 0.5}} | entries


def make_swap(norm, modules, **options):
    return {"format_version": 1, "norms": [{"norm": norm, "options": options, "modules": modules}]}


def rows_of(table):
    return {row.norm: row for row in table.rows}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.none(), max_size=4),
    arguments=st.dictionaries(st.text(), json_values, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_a_result_survives_the_disk(tmp_path_factory, metrics, arguments):
    result = make_run(metrics=metrics, arguments=arguments)
    path = write_result(result, tmp_path_factory.mktemp("results") / "run.json")
    assert load_results(path) == [{"format_version": 1} | result]


def test_numbers_of_other_libraries_are_written_as_numbers(tmp_path):
    metrics = {"a": np.float32(0.25), "b": torch.tensor(0.5), "c": np.int64(3)}
    loaded = load_results(write_result(make_run(metrics=metrics), tmp_path / "run.json"))[0]
    assert loaded["metrics"] == {"a": 0.25, "b": 0.5, "c": 3}


def test_what_is_not_finite_is_written_as_null(tmp_path):
    history = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": -math.inf}]
    metrics = {"loss": math.inf, "accuracy": 0.5, "bleu": np.float32("nan")}
    path = write_result(make_run(metrics=metrics, history=history), tmp_path / "run.json")
    assert "NaN" not in path.read_text()
    loaded = load_results(path)[0]
    assert loaded["metrics"] == {"loss": None, "accuracy": 0.5, "bleu": None}
    assert loaded["history"] == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = write_result(make_run(seed=1), tmp_path / "run.json")
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_result(make_run(seed=2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = write_result(make_run(seed=1), tmp_path / "run.json")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_result(make_run(arguments={"model": object()}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"task": None}, "its 'task' is no str"),
        ({"metrics": {"PER": {"f1": 1.0}}}, "its metric 'PER' is no number"),
    ],
)
def test_an_incomplete_result_is_not_written(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        write_result(make_run(**entries), tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def test_folders_and_files_are_read_once_and_in_order(tmp_path):
    for seed in (2, 1, 0):
        write_result(make_run(seed=seed), tmp_path / "rte" / f"{seed}.json")
    (tmp_path / "notes.txt").write_text("not a result")
    assert [run["seed"] for run in load_results(tmp_path)] == [0, 1, 2]
    assert [run["seed"] for run in load_results([tmp_path / "rte" / "1.json", tmp_path])] == [1, 0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"task": "rt', r"run\.json is damaged .* repeat the run"),
        (b"\xff\xfe\x00", r"run\.json is damaged"),
        (b"[1, 2]", r"run\.json is not the result of a run because it has no format version"),
        (b'{"hidden_size": 8}', r"run\.json is not the result of a run .* move it"),
        (b'{"format_version": 1, "task": "rte"}', r"run\.json is not .* its 'model' is missing"),
        (b'{"format_version": 2, "task": "rte"}', r"run\.json has format version 2, .* upgrade hf_normswap"),
    ],
)
def test_a_file_that_is_no_result_is_named_with_the_cure(tmp_path, content, message):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_results(tmp_path / "run.json")


def test_a_model_beside_its_result_is_passed_over(tmp_path):
    write_result(make_run(), tmp_path / "run" / "result.json")
    (tmp_path / "run" / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "run" / "tokens.json").write_text("[1, 2]")
    assert load_results(tmp_path) == [load_results(tmp_path / "run" / "result.json")[0]]


def test_nothing_to_load_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="run a recipe first"):
        load_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        load_results(tmp_path / "absent")


def test_mean_and_sample_standard_deviation_over_seeds():
    table = compare_results(make_run(seed=seed, metrics={"bleu": value}) for seed, value in enumerate([30, 31, 35]))
    (row,) = table.rows
    score = row.metrics["bleu"]
    # Deviations are -2, -1 and 3: variance 14 / 2.
    assert (score.mean, score.std, score.n, row.seeds) == (32, pytest.approx(math.sqrt(7)), 3, [0, 1, 2])
    assert "32.00 ± 2.65" in table.to_markdown()


def test_a_single_run_has_no_deviation():
    table = compare_results([make_run()])
    assert table.rows[0].metrics["accuracy"].std is None
    assert table.to_markdown().splitlines()[-1] == "| rte | bert | rbn | 1 | 0.5000 |"


@given(st.permutations([make_run(norm, seed) for norm in ("batchnorm", "layernorm", "rbn") for seed in (0, 1)]))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_results_does_not_matter_and_layernorm_leads(results):
    table = compare_results(results)
    assert [row.norm for row in table.rows] == ["layernorm", "batchnorm", "rbn"]
    assert table == compare_results(sorted(results, key=lambda run: (run["norm"], run["seed"])))


def test_tasks_models_and_placements_are_never_mixed():
    results = [
        make_run(task=task, model=model, placement=placement)
        for task in ("cola", "rte")
        for model in ("bert", "roberta")
        for placement in ("post", "pre")
    ]
    table = compare_results(results)
    assert [(row.task, row.model, row.placement) for row in table.rows] == [
        (run["task"], run["model"], run["placement"]) for run in results
    ]
    assert table.to_markdown().startswith("| task | model | placement | norm | runs | accuracy |")


def test_options_make_rows_of_their_own():
    results = [
        make_run("powernorm", seed, norm_swap=make_swap("powernorm", modules, num_groups=groups, eps=1e-5))
        for groups, modules in [(1, ["a"]), (4, ["a"]), (4, ["a", "b"])]
        for seed in (0, 1)
    ]
    table = compare_results(results + [make_run("layernorm"), make_run("layernorm", 1, norm_swap={"norms": []})])
    assert {name: row.seeds for name, row in rows_of(table).items()} == {
        "layernorm": [0, 1],
        "powernorm (num_groups=1, norms=1)": [0, 1],
        "powernorm (num_groups=4, norms=1)": [0, 1],
        "powernorm (num_groups=4, norms=2)": [0, 1],
    }


@pytest.mark.parametrize(
    "results",
    [
        [make_run(arguments={"learning_rate": 1e-4}), make_run(arguments={"learning_rate": 1e-3})],
        [make_run(seed=seed, norm_swap=make_swap("rbn", [module])) for seed, module in enumerate("ab")],
    ],
    ids=["the same seed twice", "other modules"],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(results):
    with pytest.raises(ValueError, match="differ in more than their seed: compare them from separate folders"):
        compare_results(results)


def test_a_diverged_run_is_counted():
    values = [0.25, None, 0.75]
    table = compare_results(
        [make_run("rbn", seed, metrics={"accuracy": value}) for seed, value in enumerate(values)]
        + [make_run("batchnorm", metrics={"accuracy": None}), make_run("layernorm", metrics={"f1": 0.5})]
    )
    cells = {line.split(" | ")[2]: line.strip("| ").split(" | ")[4:] for line in table.to_markdown().splitlines()[2:]}
    assert cells == {
        "layernorm": ["–", "0.5000"],
        "batchnorm": ["not finite", "–"],
        "rbn": [f"0.5000 ± {math.sqrt(1 / 8):.4f} (2 of 3)", "–"],
    }


def test_differences_are_paired_by_seed():
    scores = {"layernorm": [60.0, 70.0, 80.0], "rbn": [61.0, 72.0, 82.0, 50.0], "batchnorm": [None, 69.5]}
    results = [
        make_run(norm, seed, metrics={"bleu": value})
        for norm, values in scores.items()
        for seed, value in enumerate(values)
    ]
    table = compare_results(results, against="layernorm")
    rows = rows_of(table)
    difference = rows["rbn"].differences["bleu"]
    # Changes of 1, 2 and 2 over the shared seeds; the test of SciPy on the same pairs is the truth.
    interval = scipy.stats.ttest_rel(scores["rbn"][:3], scores["layernorm"]).confidence_interval(0.95)
    assert (difference.mean, difference.n) == (pytest.approx(5 / 3), 3)
    assert (difference.low, difference.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    single = rows["batchnorm"].differences["bleu"]
    assert (single.mean, single.low, single.n) == (-0.5, None, 1)
    assert rows["layernorm"].differences == {}
    lines = table.to_markdown().splitlines()
    assert lines[0].endswith("| runs | bleu | bleu − layernorm |")
    assert lines[2].endswith("| – |")
    assert lines[3].endswith("| -0.50 |")
    assert lines[4].endswith("| +1.67 (+0.23 to +3.10) |")
    with pytest.raises(
        ValueError, match="powernorm has no run on rte with bert: run it, or compare with another norm."
    ):
        compare_results(results, against="powernorm")


def test_chosen_metrics_are_the_columns():
    results = [make_run(metrics={"accuracy": 0.5, "f1": 0.25, "loss": 1.0})]
    assert compare_results(results, ["loss", "f1"]).to_markdown().splitlines()[0].endswith("| runs | loss | f1 |")
    with pytest.raises(ValueError, match="No result has the metric 'bleu': choose from accuracy, f1, loss"):
        compare_results(results, ["bleu"])


def test_baselines_stand_below_the_table():
    table = compare_results([make_run(baselines={"majority_accuracy": 0.52708, "other": None})])
    assert table.to_markdown().endswith("|\n\nBaselines on rte: majority_accuracy 0.5271.")
    assert str(table).endswith("\nBaselines on rte: majority_accuracy 0.5271.")


def test_a_bar_in_a_name_does_not_break_the_markdown():
    assert r"| a\|b |" in compare_results([make_run(model="a|b")]).to_markdown()


def test_rich_and_plain_text_show_the_same_cells():
    console = pytest.importorskip("rich.console").Console(width=200)
    table = compare_results([make_run("rbn"), make_run("layernorm", model="[bold]bert")])
    with console.capture() as capture:
        console.print(table)
    for text in (capture.get(), str(table)):
        assert all(word in text for word in ("rte", "[bold]bert", "layernorm", "rbn", "0.5000"))


def test_rich_cuts_no_name_short():
    console = pytest.importorskip("rich.console").Console(width=60)
    options = "a_rather_long_name_of_an_option"
    results = [make_run(seed=seed, norm_swap=make_swap("rbn", ["a"], **{options: seed})) for seed in (0, 1)]
    with console.capture() as capture:
        console.print(compare_results(results))
    assert "…" not in capture.get()


def test_a_terminal_without_rich_gets_plain_text(capsys, monkeypatch):
    table = compare_results([make_run()])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    table.show()
    assert capsys.readouterr().out == f"{table}\n"


def test_the_environment_names_no_machine():
    environment = describe_environment()
    assert set(environment) == {"versions", "hardware"}
    assert environment["versions"]["torch"] == metadata.version("torch")
    assert environment["versions"]["python"] == platform.python_version()
    text = json.dumps(environment)
    assert platform.node() not in text
    assert str(Path.home()) not in text
