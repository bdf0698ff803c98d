"""
Which norm is best, from scratch and to convergence: a grid of runs, cell by cell, in as many slices as it takes.

    python benchmarks/evidence.py --minutes 60
    python benchmarks/evidence.py --status
    python benchmarks/evidence.py --again results/evidence/trec/table/post-layernorm-0-0123456789.json

The grid file says what a cell is: a task, a placement, a norm, one of the norm's trials (its learning rate and its
options) and a seed. Each norm has the same number of trials. The trial with the best validation score is trained again
with the seeds of the table. A cell is one run of a recipe, and one result file, which is named by the hash of the
cell's options. A cell that has its file is not run again.

Several runners may share a grid: a cell belongs to the runner that holds its lock. A runner may be killed at any
moment. The next one goes on from the last checkpoint of its cell.
"""

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from hf_normswap.reporting.results import describe_environment, write_result


ROOT = Path(__file__).resolve().parents[1]
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
# The C library returns each large tensor to the system, and gets its pages one by one again. Without this a step of
# the language model takes 165 ms on one core, with it 105 ms, and one of the classifiers 120 and 105 ms.
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": f"{1 << 32}",
    "MALLOC_TRIM_THRESHOLD_": f"{1 << 33}",
    "MALLOC_TOP_PAD_": f"{1 << 28}",
}


# What a record has after what the recipe does last, by its option.
LAST = {"convert": "conversion", "reestimate": "reestimation"}


@dataclass
class Arguments:
    grid: str = field(default=str(ROOT / "benchmarks/evidence.yaml"), metadata={"help": "The grid."})
    results: str = field(default=str(ROOT / "results/evidence"), metadata={"help": "Folder of the result files."})
    work_dir: str = field(default="./outputs/evidence", metadata={"help": "Folder of running cells and checkpoints."})
    data_root: str | None = field(
        default=None, metadata={"help": "Folder with the data sets under their names; the Hub if not given."}
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "Run the cells whose names have all of these texts in them."}
    )
    minutes: float | None = field(default=None, metadata={"help": "Stop after so long; at the end if not given."})
    threads: int = field(default=1, metadata={"help": "Threads of a run."})
    nice: int = field(default=10, metadata={"help": "How much lower the priority of the runner is than usual."})
    status: bool = field(default=False, metadata={"help": "Say what is done and what is missing, and run nothing."})
    curves: bool = field(default=False, metadata={"help": "Show how each finished cell learned, and run nothing."})
    again: list[str] | None = field(
        default=None, metadata={"help": "Run the commands of these result files again, and compare the scores."}
    )

    def __post_init__(self):
        # Recipes run in the root of the repository, wherever the runner was started.
        self.results, self.work_dir = Path(self.results).resolve(), Path(self.work_dir).resolve()
        self.data_root = self.data_root and Path(self.data_root).resolve()


@dataclass(frozen=True)
class Cell:
    """One run. `stage` is `tuning` or `table`, `options` are those of the recipe, except for what names folders."""

    task: str
    stage: str
    recipe: str
    options: dict

    @property
    def name(self):
        content = json.dumps([self.recipe, self.options], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:10]
        options = self.options
        return f"{self.task}/{self.stage}/{options['placement']}-{options['norm']}-{options['seed']}-{key}"

    @property
    def argv(self):
        """The command of the recipe, as `shlex.split` gives it, with the data set of the Hub."""
        argv = ["-m", f"recipes.{self.recipe}"]
        for name, value in self.options.items():
            if isinstance(value, list):
                argv += [f"--{name}", *map(str, value)]
            else:
                argv.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
        return argv


def read_grid(path):
    """The grid of a YAML file."""
    grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for name in grid["tasks"]:
        counts = {norm: len(trials) for norm, trials in trials_of(grid, name).items()}
        if grid["seeds"]["table"] and len(set(counts.values())) > 1:
            raise ValueError(f"Norms have different numbers of trials in the task {name!r}: {counts}.")
    return grid


def trials_of(grid, task):
    """The trials of each norm in a task."""
    return grid["tasks"][task].get("norms", grid["norms"])


class Results:
    """The result files of cells. A file that was read is not read again: it never changes."""

    def __init__(self, folder):
        self.folder, self._read = Path(folder), {}

    def path(self, cell):
        return self.folder / f"{cell.name}.json"

    def get(self, cell):
        """The result of a cell, `None` as long as there is none."""
        path = self.path(cell)
        if path not in self._read and path.exists():
            self._read[path] = json.loads(path.read_text(encoding="utf-8"))
        return self._read.get(path)


def plan_cells(grid, results):
    """Every cell that is known, in the order in which they run. `None` stands for a cell of an unknown trial."""
    for name, task in grid["tasks"].items():
        for placement in grid["placements"]:
            make = functools.partial(make_cell, grid, name, placement)
            tuning = {
                norm: [[make(norm, "tuning", trial, seed) for seed in grid["seeds"]["tuning"]] for trial in trials]
                for norm, trials in trials_of(grid, name).items()
            }
            yield from ((name, cell) for trials in tuning.values() for cells in trials for cell in cells)
            for seed in grid["seeds"]["table"]:
                for norm, trials in trials_of(grid, name).items():
                    best = choose_trial(task, tuning[norm], results)
                    yield name, None if best is None else make(norm, "table", trials[best], seed)


def make_cell(grid, task, placement, norm, stage, trial, seed):
    """A cell. The options of its stage come last: a tuning may be shorter than a run of the table."""
    shared = grid["options"] | grid["tasks"][task]["options"]
    own = {"placement": placement, "norm": norm, **trial, "seed": seed}
    if stage == "table":
        own |= grid.get("table_options", {}).get(norm, {})
    else:
        own |= grid["tasks"][task].get("tuning_options", {})
    return Cell(task, stage, grid["tasks"][task]["recipe"], shared | own)


def choose_trial(task, trials, results):
    """The index of the trial with the best mean validation score, the first of equals; `None` before all are done."""
    scores = []
    for cells in trials:
        found = [results.get(cell) for cell in cells]
        if None in found:
            return None
        sign = 1 if task["greater_is_better"] else -1
        scores.append(
            statistics.fmean(
                sign * result["metrics"][task["metric"]] if result["status"] == "done" else -float("inf")
                for result in found
            )
        )
    return scores.index(max(scores))


@contextmanager
def claim(path):
    """Holds the lock of a cell, or gives `None` where another runner, or the run that it left behind, holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file = None
        yield file


def is_running(path):
    if not path.exists():
        return False
    with claim(path) as lock:
        return lock is None


def _die_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def run_recipe(argv, folder, args, seconds=None, lock=None, threads=None):
    """
    Runs a recipe, and goes on where an earlier run was killed. Returns its exit status, negative if it was killed, or
    `None` where time was up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if args.data_root:
        key = "--dataset_name="
        argv = [f"{key}{args.data_root / item.removeprefix(key)}" if item.startswith(key) else item for item in argv]
    device = [] if torch.cuda.is_available() else ["--use_cpu"]  # bf16 on a CPU has to be told so
    with open(folder / "log.txt", "a") as log:
        child = subprocess.Popen(
            [sys.executable, *argv, *device, f"--output_dir={folder}", "--resume_from_checkpoint=auto"],
            cwd=ROOT,
            env=ALLOCATOR
            | os.environ
            | {"OMP_NUM_THREADS": str(threads or args.threads), "TOKENIZERS_PARALLELISM": "false"},
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()] if lock else [],  # held as long as the run lives
            preexec_fn=_die_with_parent,
        )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        child.kill()
        child.wait()


def run_cell(cell, results, args, lock, deadline):
    """Runs a cell, and writes its file unless it was killed or out of time. Returns what became of it."""
    folder = args.work_dir / cell.name
    is_resumed = any(folder.glob("checkpoint-*"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = 0
    if not is_whole(folder / "result.json", cell):  # it is where a runner was killed right before it took the file
        code = run_recipe(cell.argv, folder, args, deadline and max(0, deadline - time.monotonic()), lock)
    if code is None or code < 0:
        return "out of time" if code is None else f"killed by signal {-code}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
    result = read_result(cell, folder, code, args)
    result["cpu_minutes"] = None if is_resumed or not minutes else round(minutes, 2)
    write_result(result, results.path(cell))
    shutil.rmtree(folder)
    return result["status"]


def is_whole(path, cell):
    """Whether a recipe wrote this result in the end, and not before it changed the trained model."""
    if not path.exists():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    return all(part in result for option, part in LAST.items() if option in cell.options)


def read_result(cell, folder, code, args):
    """The record of a run that has ended, with nothing that names a folder of this machine."""
    if code == 0:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        logged = [entry.get(name, 0) for entry in result["history"] for name in ("loss", "grad_norm")]
        result["status"] = "diverged" if None in [*logged, *result["metrics"].values()] else "done"
    else:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        error = lines[-1] if lines else f"exit status {code}"
        for path in filter(None, (folder, args.data_root, ROOT)):
            error = error.replace(f"{path}", path.name)
        names = {name: cell.options[name] for name in ("norm", "placement", "seed")}
        model = f"{cell.options.get('model_type', 'marian')} from scratch"
        result = {"task": cell.task, "model": model, **names, "metrics": {}, "history": [], **describe_environment()}
        result |= {"status": "failed", "error": error}
    command = f"python {shlex.join(cell.argv)}"
    given = {"recipe": cell.recipe, "arguments": cell.options, "command": command}
    return result | given | {"stage": cell.stage, "threads": args.threads}


def run_grid(grid, args):
    """Runs what is missing, in the order of the grid, until the end or until time is up."""
    results, passed = Results(args.results), set()
    deadline = args.minutes and time.monotonic() + 60 * args.minutes
    while not deadline or time.monotonic() < deadline:
        cells = [cell for _, cell in plan_cells(grid, results) if cell and is_chosen(cell, args)]
        missing = [cell for cell in cells if cell.name not in passed and results.get(cell) is None]
        if not missing:
            break
        with claim(args.work_dir / f"{missing[0].name}.lock") as lock:
            if lock is None:
                outcome = "another runner has it"
            elif results.get(missing[0]) is not None:  # written since the plan was made
                continue
            else:
                outcome = run_cell(missing[0], results, args, lock, deadline)
        if results.get(missing[0]) is None:
            passed.add(missing[0].name)
        print(f"{missing[0].name}: {outcome}", flush=True)


def is_chosen(cell, args):
    return all(text in cell.name for text in args.only or [])


def run_again(path, args):
    """Runs the command of a result file from the beginning. Prints both scores, and returns whether they agree."""
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    folder = args.work_dir / "again" / Path(path).stem
    shutil.rmtree(folder, ignore_errors=True)
    code = run_recipe(shlex.split(result["command"])[1:], folder, args, threads=result["threads"])
    if code:
        print(f"{path}: {result['status']}, and now exit status {code}")
        return result["status"] == "failed"
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))["metrics"]
    for name, value in result["metrics"].items():
        print(f"{Path(path).stem} {name}: {value}, and now {found[name]}")
    shutil.rmtree(folder)
    return found == result["metrics"]


def show_status(grid, args):
    """Prints for each task what is done and how many hours of one core the rest is expected to take."""
    results, counts, total = Results(args.results), {}, 0.0
    for name, cell in plan_cells(grid, results):
        if args.only and not (cell and is_chosen(cell, args)):
            continue
        row = counts.setdefault(name, {"cells": 0, "done": 0, "diverged": 0, "failed": 0, "running": 0, "minutes": []})
        result = cell and results.get(cell)
        row["cells"] += 1
        if result:
            row[result["status"]] += 1
            row["minutes"].append(result["cpu_minutes"])
        elif cell and is_running(args.work_dir / f"{cell.name}.lock"):
            row["running"] += 1
    heading = ("task", "cells", "done", "diverged", "failed", "running", "missing", "minutes", "hours left", "so far")
    print(("{:18}" + "{:>11}" * (len(heading) - 1)).format(*heading))
    for name, row in counts.items():
        measured = [minutes for minutes in row.pop("minutes") if minutes]
        minutes = statistics.fmean(measured) if measured else grid["tasks"][name]["minutes"]
        missing = row["cells"] - row["done"] - row["diverged"] - row["failed"]
        total += missing * minutes / 60
        cells = [*row.values(), missing - row["running"], f"{minutes:.1f}", f"{missing * minutes / 60:.1f}"]
        print(f"{name:18}" + "".join(f"{cell!s:>11}" for cell in [*cells, f"{total:.1f}"]))


def show_curves(grid, args):
    """Prints how each finished cell learned."""
    results = Results(args.results)
    for _, cell in plan_cells(grid, results):
        result = cell and is_chosen(cell, args) and results.get(cell)
        if result:
            task = grid["tasks"][cell.task]
            own = {name: cell.options[name] for name in ("learning_rate", "norm_options") if name in cell.options}
            print(f"{cell.name} {own}: {describe_curve(result, task)}")


def describe_curve(result, task):
    """The losses and scores of a run in one line, with a warning of what a table of scores hides."""
    if result["status"] == "failed":
        return f"failed: {result['error']}"
    columns = {"loss": [], "eval_loss": [], result["arguments"]["metric_for_best_model"]: []}
    for entry in result["history"]:
        for name in columns.keys() & entry.keys():
            columns[name].append(float("nan") if entry[name] is None else entry[name])
    losses, held_out, scores = columns["loss"], columns["eval_loss"], [*columns.values()][-1]
    is_better = max if result["arguments"]["metric_for_best_model"] != "eval_loss" else min
    best, lowest = scores.index(is_better(scores)) + 1, min(held_out)
    marks = {
        "diverged": result["status"] == "diverged",
        "did not learn": losses[-1] > 0.95 * losses[0],
        "not converged": best == len(scores),
        "overfits": held_out[-1] > 1.02 * lowest,
    }
    tested = ", ".join(f"{name} {result['metrics'][name]}" for name in (task["metric"], f"test_{task['metric']}"))
    return (
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, validation loss {lowest:.3f} to {held_out[-1]:.3f}, best "
        f"evaluation {best} of {len(scores)}, {tested}; {', '.join(name for name, holds in marks.items() if holds)}"
    )


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    grid = read_grid(args.grid)
    if args.status:
        return show_status(grid, args)
    if args.curves:
        return show_curves(grid, args)
    os.nice(args.nice)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the run, too
    if args.again:
        return sys.exit(not all(run_again(path, args) for path in args.again))
    run_grid(grid, args)


if __name__ == "__main__":
    main()
