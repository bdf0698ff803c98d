"""The runner of the evidence: cells that are killed, doubled, failed and chosen. Most recipes here take no time."""

import fcntl
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from hf_normswap.reporting.results import load_results


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # where Python finds the script

import evidence  # noqa: E402

from recipes import glue  # noqa: E402


# A recipe that learns nothing: it counts up to 5, with a checkpoint for each number, and scores by its options.
RECIPE = """
import json, os, sys, time
from pathlib import Path

options = dict(item[2:].split("=", 1) for item in sys.argv[1:] if "=" in item)
folder, rate, seed = Path(options["output_dir"]), float(options["learning_rate"]), int(options["seed"])
if options["norm"] == "failing":
    sys.exit(f"error: {folder} and {options['dataset_name']} are no good")
done = max([int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")], default=0)
with open(ROOT / "log", "a") as log:
    log.write(f"{folder.parent.name} {options['norm']} {rate} {seed} from {done} with {options['dataset_name']}\\n")
for number in range(done + 1, 6):
    time.sleep(float(options.get("pause", 0.01)))
    (folder / f"checkpoint-{number}").mkdir()
history = [{"loss": None if options["norm"] == "exploding" else 1.0}, {"eval_loss": 1.0, "eval_accuracy": rate}]
metrics = {"accuracy": rate if options["norm"] != "contrary" else -rate, "test_accuracy": rate + seed}
result = {"format_version": 1, "task": "toy", "model": "toy", "norm": options["norm"], "seed": seed}
result |= {"metrics": metrics, "history": history, "arguments": options, "command": "of this machine"}
(folder / "unfinished").write_text(json.dumps(result))
os.replace(folder / "unfinished", folder / "result.json")
"""
NORMS = {norm: [{"learning_rate": rate} for rate in (0.25, 0.5)] for norm in ("good", "contrary")}


@pytest.fixture
def make_args(tmp_path, monkeypatch):
    """Arguments for a grid of `norms`, whose recipe is the one above."""
    root = tmp_path / "repository"
    (root / "recipes").mkdir(parents=True)
    (root / "recipes" / "__init__.py").touch()  # comes before the package of the project
    (root / "recipes" / "toy.py").write_text(RECIPE.replace("ROOT", f"Path({str(tmp_path)!r})"))
    monkeypatch.setattr(evidence, "ROOT", root)

    def make_args(norms, table=(0, 1), tuning=(100,), **options):
        grid = {
            "seeds": {"tuning": list(tuning), "table": list(table)},
            "placements": ["post"],
            "norms": norms,
            "options": {"dataset_name": "some/data"},
            "tasks": {
                "toy": {
                    "recipe": "toy",
                    "metric": "accuracy",
                    "greater_is_better": True,
                    "minutes": 60,
                    "options": {"metric_for_best_model": "eval_accuracy"},
                }
            },
        }
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
        folders = {"results": tmp_path / "results", "work_dir": tmp_path / "work"}
        return evidence.Arguments(grid=str(tmp_path / "grid.yaml"), **folders, **options)

    return make_args


def run(args):
    evidence.run_grid(evidence.read_grid(args.grid), args)


def read(args):
    return {str(path.relative_to(args.results)): json.loads(path.read_text()) for path in find(args)}


def find(args, name="*"):
    return sorted(args.results.rglob(f"{name}.json"))


def log(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_the_best_trial_of_each_norm_is_in_the_table(make_args, tmp_path):
    args = make_args(NORMS)
    run(args)
    assert len(log(tmp_path)) == len(find(args)) == 8
    tuned = load_results(args.results / "toy" / "tuning")
    assert [result["seed"] for result in tuned] == [100] * 4
    table = {(result["norm"], result["seed"]): result for result in load_results(args.results / "toy" / "table")}
    assert {key: result["metrics"]["test_accuracy"] for key, result in table.items()} == {
        **{("good", seed): 0.5 + seed for seed in (0, 1)},  # the larger rate is better
        **{("contrary", seed): 0.25 + seed for seed in (0, 1)},  # and here the smaller one
    }
    assert not list(args.work_dir.rglob("*.json"))
    run(args)
    assert len(log(tmp_path)) == 8


def test_each_stage_may_have_options_of_its_own(make_args):
    args = make_args(NORMS)
    grid = yaml.safe_load(Path(args.grid).read_text())
    grid["table_options"] = {"good": {"convert": 8}}
    grid["tasks"]["toy"]["tuning_options"] = {"num_train_epochs": 1}
    for norm in NORMS:
        tuning, table = (
            evidence.make_cell(grid, "toy", "post", norm, stage, {"learning_rate": 0.5}, 0).options
            for stage in ("tuning", "table")
        )
        assert (tuning.get("num_train_epochs"), tuning.get("convert")) == (1, None)
        assert (table.get("num_train_epochs"), table.get("convert")) == (None, 8 if norm == "good" else None)


def test_cells_run_in_the_order_of_the_grid(make_args, tmp_path):
    run(make_args(NORMS))
    order = [tuple(line.split()[:4]) for line in log(tmp_path)]
    tuning = [("tuning", norm, rate, "100") for norm in NORMS for rate in ("0.25", "0.5")]
    best = {"good": "0.5", "contrary": "0.25"}
    assert order == tuning + [("table", norm, best[norm], seed) for seed in "01" for norm in NORMS]


def test_the_score_of_a_trial_is_the_mean_over_tuning_seeds():
    def result(value, status="done"):
        return {"metrics": {"perplexity": value}, "status": status}

    found = {"a": result(10.0), "b": result(30.0), "c": result(18.0), "d": result(19.0), "e": result(1, "diverged")}
    task = {"metric": "perplexity", "greater_is_better": False}
    assert evidence.choose_trial(task, [["a", "b"], ["c", "d"]], found) == 1
    assert evidence.choose_trial(task, [["a", "a"], ["c", "e"]], found) == 0
    assert evidence.choose_trial(task, [["e", "e"], ["e", "e"]], found) == 0  # the table says that it diverges
    assert evidence.choose_trial(task, [["a", "b"], ["c", "missing"]], found) is None


def test_norms_have_as_many_trials_as_others(make_args):
    with pytest.raises(ValueError, match="different numbers of trials in the task 'toy': {'good': 2, 'other': 1}"):
        run(make_args({"good": NORMS["good"], "other": NORMS["good"][:1]}))
    run(make_args({"good": NORMS["good"], "other": NORMS["good"][:1]}, table=()))  # no table, nothing to compare


def test_an_option_makes_another_cell(make_args):
    grid = evidence.read_grid(make_args(NORMS).grid)

    def name(**changes):
        trial = {"learning_rate": 0.25, **changes}
        return evidence.make_cell(grid, "toy", "post", "good", "tuning", trial, 100).name

    assert name() == name()
    names = [name(), name(learning_rate=0.5), name(norm_options={"momentum": 0.1}), name(where=["encoder"])]
    assert len(set(names)) == 4
    grid["options"]["weight_decay"] = 0.1
    assert name() != names[0]


def test_failures_and_divergence_are_on_record(make_args, tmp_path, capsys):
    norms = {norm: [{"learning_rate": 0.5}] for norm in ("failing", "exploding", "good")}
    args = make_args(norms, table=[0], data_root=str(tmp_path / "data"))
    run(args)
    found = read(args)
    assert {result["norm"]: result["status"] for result in found.values()} == {
        "failing": "failed",
        "exploding": "diverged",
        "good": "done",
    }
    assert str(tmp_path) not in json.dumps(found)
    assert all("are no good" in result["error"] for result in found.values() if result["norm"] == "failing")
    assert len(found) == 6
    evidence.show_status(evidence.read_grid(args.grid), args)
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:7] == ["toy", "6", "2", "2", "2", "0", "0"]
    evidence.show_curves(evidence.read_grid(args.grid), args)
    assert "failed: error: " in capsys.readouterr().out


def test_the_command_of_a_result_is_that_of_the_hub(make_args, tmp_path):
    args = make_args(NORMS, table=[], data_root=str(tmp_path / "data"))
    run(args)
    path = find(args, "post-good-*")[0]
    result = json.loads(path.read_text())
    flag, module, *options = shlex.split(result["command"])[1:]
    assert (flag, module) == ("-m", "recipes.toy")
    assert "--dataset_name=some/data" in options
    assert not any("output_dir" in option for option in options)
    assert log(tmp_path)[0].endswith(f"with {tmp_path / 'data' / 'some/data'}")
    assert evidence.run_again(path, args)
    changed = json.loads(path.read_text())
    changed["metrics"]["accuracy"] += 1e-9
    path.write_text(json.dumps(changed))
    assert not evidence.run_again(path, args)


def test_a_slice_of_time_ends_in_the_middle_of_a_cell(make_args, tmp_path):
    args = make_args({"good": [{"learning_rate": 0.25, "pause": 0.1}]}, table=[], minutes=0.01 / 60)
    run(args)
    assert not read(args)
    for _ in range(20):
        run(args)
        args.minutes *= 1.5  # until it is long enough to start at all, and then not long enough for the whole
    assert len(read(args)) == 1
    started = [int(line.split(" from ")[1].split()[0]) for line in log(tmp_path)]
    assert started == sorted(started)
    assert started[-1] > 0


def test_only_what_is_asked_for(make_args, tmp_path):
    run(make_args(NORMS, only=["tuning", "good"]))
    assert {line.split()[1] for line in log(tmp_path)} == {"good"}
    assert len(log(tmp_path)) == 2


def start(args):
    """A runner in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            run(args)
        finally:
            os._exit(0)
    return pid


def test_killed_at_any_moment_no_cell_is_lost_doubled_or_half_written(make_args, tmp_path):
    args, rng, kills = make_args(NORMS), random.Random(0), 0
    deadline = time.monotonic() + 60
    while len(read(args)) < 8 and time.monotonic() < deadline:
        pid = start(args)
        time.sleep(rng.uniform(0.01, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    assert len(read(args)) == 8
    assert kills > 2
    assert len(load_results(args.results)) == 8
    written = {path: path.stat().st_mtime_ns for path in find(args)}
    lines = log(tmp_path)
    run(args)
    assert {path: path.stat().st_mtime_ns for path in find(args)} == written
    assert log(tmp_path) == lines


def test_a_run_does_not_outlive_its_runner(make_args, tmp_path):
    args = make_args(NORMS)
    pid = start(args)
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 10
    locks = list(args.work_dir.rglob("*.lock"))
    while any(map(evidence.is_running, locks)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert locks
    assert not any(map(evidence.is_running, locks))


def test_two_runners_share_a_grid(make_args, tmp_path):
    args = make_args(NORMS)
    pids = [start(args) for _ in range(2)]
    for pid in pids:
        os.waitpid(pid, 0)
    run(args)  # what one left while the other had it
    assert len(read(args)) == 8
    assert len(log(tmp_path)) == len(set(log(tmp_path))) == 8


def test_a_cell_that_another_runner_has_is_passed_over(make_args, tmp_path, capsys):
    args = make_args(NORMS, table=[])
    grid = evidence.read_grid(args.grid)
    first = next(cell for _, cell in evidence.plan_cells(grid, evidence.Results(args.results)))
    path = args.work_dir / f"{first.name}.lock"
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run(args)
        capsys.readouterr()
        evidence.show_status(grid, args)
        assert capsys.readouterr().out.splitlines()[-1].split()[1:7] == ["4", "3", "0", "0", "1", "0"]
    assert len(read(args)) == 3
    run(args)
    assert len(read(args)) == 4


def test_a_result_that_was_written_before_the_runner_died_is_taken(make_args, tmp_path):
    args = make_args(NORMS, table=[])
    run(args)
    (path,) = [path for path in find(args, "post-good-*") if '"learning_rate": 0.5' in path.read_text()]
    result, lines = json.loads(path.read_text()), log(tmp_path)
    folder = args.work_dir / path.relative_to(args.results).with_suffix("")
    folder.mkdir(parents=True)
    path.rename(folder / "result.json")
    run(args)
    assert json.loads(path.read_text())["metrics"] == result["metrics"]
    assert log(tmp_path) == lines


@pytest.mark.parametrize("options", [{}, {"convert": 8}, {"reestimate": 8}])
def test_a_result_from_before_the_last_step_is_not_whole(options, tmp_path):
    cell, path = evidence.Cell("toy", "table", "toy", options), tmp_path / "result.json"
    assert not evidence.is_whole(path, cell)
    path.write_text('{"metrics": {}}')
    assert evidence.is_whole(path, cell) == (not options)
    path.write_text('{"metrics": {}, "conversion": {}, "reestimation": {}}')
    assert evidence.is_whole(path, cell)


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = "the a good bad film plot is was not very dull bright".split()


@pytest.fixture
def tiny(tmp_path):
    """Options of a runner on tiny data, with a real recipe and the grid's own options of every run."""
    rng = random.Random(0)
    features = Features({"text": Value("string"), "label": ClassLabel(num_classes=2)})
    for split, count in {"train": 200, "test": 40}.items():
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(count)]
        path = tmp_path / "data" / "tiny" / "words" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = [int("good" in text.split()) for text in texts]
        Dataset.from_dict({"text": texts, "label": labels}, features).to_parquet(path)
    grid = yaml.safe_load((ROOT / "benchmarks" / "evidence.yaml").read_text())
    options = {
        **grid["tasks"]["trec"]["options"],
        **{"dataset_name": "tiny/words", "config_overrides": TINY, "vocab_size": 290, "max_length": 20},
        **{"num_train_epochs": 6, "early_stopping": 2, "per_device_train_batch_size": 8, "save_total_limit": 2},
    }
    grid["tasks"] = {"trec": {**grid["tasks"]["trec"], "options": options}}
    grid |= {"seeds": {"tuning": [100], "table": []}, "placements": ["pre"]}
    grid["norms"] = {"rbn": [{"learning_rate": 0.01, "norm_options": {"lambda_mean": 8.0}}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return [f"--grid={tmp_path / 'grid.yaml'}", f"--data_root={tmp_path / 'data'}"]


def curve(path):
    """The part of a result that has no times in it."""
    result = json.loads(path.read_text())
    history = [
        {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in result["history"]
        if "train_runtime" not in entry
    ]
    return result["metrics"], history


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Trains the cell of the tiny grid in this process; returns the metrics, the history and the weights."""
    for module in ("datasets.config", "recipes.loading"):
        monkeypatch.setattr(f"{module}.HF_DATASETS_CACHE", tmp_path / "cache")
    args = evidence.Arguments(grid=str(tmp_path / "grid.yaml"))
    ((_, cell),) = evidence.plan_cells(evidence.read_grid(args.grid), evidence.Results(tmp_path / "results"))
    options = [option.replace("=tiny/words", f"={tmp_path / 'data' / 'tiny/words'}") for option in cell.argv[2:]]

    def train(folder):
        glue.main([*options, "--use_cpu", f"--output_dir={folder}", "--resume_from_checkpoint=auto"])
        return *curve(folder / "result.json"), (folder / "model.safetensors").read_bytes()

    return train


def test_two_runs_of_a_cell_agree_bit_for_bit(train, tmp_path):
    metrics, history, weights = train(tmp_path / "first")
    assert set(metrics) == {"accuracy", "test_accuracy"}
    assert len([entry for entry in history if "eval_accuracy" in entry]) > 2
    assert train(tmp_path / "second") == (metrics, history, weights)


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(train, tmp_path):
    pid = os.fork()
    if pid == 0:
        try:
            train(tmp_path / "killed")
        finally:
            os._exit(0)
    while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert train(tmp_path / "killed") == train(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.release
def test_a_runner_that_was_killed_in_a_real_cell(tiny, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home")}

    def start(name, *options):
        folders = [f"--results={tmp_path / name}", f"--work_dir={tmp_path / 'work' / name}"]
        command = [sys.executable, str(ROOT / "benchmarks" / "evidence.py"), *tiny, *folders, *options]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    def finish(process):
        try:
            printed, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, printed

    finish(start("first"))
    (first,) = (tmp_path / "first").rglob("*.json")
    assert json.loads(first.read_text())["status"] == "done"
    killed = start("second")
    while not list((tmp_path / "work" / "second").rglob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    killed.kill()  # SIGKILL, right after the first checkpoint
    killed.communicate()
    assert not list((tmp_path / "second").rglob("*"))
    finish(start("second"))
    (second,) = (tmp_path / "second").rglob("*.json")
    assert second.relative_to(tmp_path / "second") == first.relative_to(tmp_path / "first")
    assert curve(second) == curve(first)
    assert json.loads(second.read_text())["cpu_minutes"] is None  # a part of them was lost
