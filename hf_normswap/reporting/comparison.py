"""Norms side by side, from the results of runs (see `hf_normswap/reporting/results.py`)."""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Score:
    """Mean and sample standard deviation (`None` below two runs) over the `n` runs whose score is finite."""

    mean: float | None
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """
    Mean of the differences to the baseline over the `n` seeds that both have, and its 95 % interval by a paired t-test
    (`None` below two seeds).
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class ComparisonRow:
    """The runs of one norm on one task, model and placement, one for each seed."""

    task: str
    model: str
    placement: str | None
    norm: str
    seeds: list[int]
    metrics: dict[str, Score]
    differences: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonTable:
    """
    The table of [`compare_results`]. `str(table)` is plain text, `rich.print(table)` a rich table.

    Args:
        rows (`list[ComparisonRow]`):
            One row for each norm of a task, model and placement, LayerNorm first.
        metrics (`list[str]`):
            The metrics, one column for each.
        baselines (`dict[str, dict[str, float]]`):
            For each task, the scores that need no training.
        against (`str`, *optional*):
            The norm that the differences are to. Each metric has a second column then.
    """

    rows: list[ComparisonRow]
    metrics: list[str]
    baselines: dict[str, dict[str, float]]
    against: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as plain dictionaries and lists, ready for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Returns the table in GitHub's Markdown."""
        cells = [[cell.replace("|", r"\|") for cell in line] for line in self._cells()]
        lines = [f"| {' | '.join(line)} |" for line in cells]
        lines.insert(1, "|" + "---|" * len(cells[0]))
        return "\n\n".join(["\n".join(lines), *self._notes()])

    def show(self) -> None:
        """Prints the table: through rich in a terminal, as plain text in a pipe or where rich is missing."""
        if sys.stdout.isatty():  # rich would fold the columns of a pipe into 80 characters
            try:
                import rich
            except ImportError:
                pass
            else:
                return rich.print(self)
        sys.stdout.write(f"{self}\n")

    def __str__(self):
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join([*("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells), *self._notes()])

    def __rich__(self):
        from rich.table import Table
        from rich.text import Text  # unlike a string, shows square brackets as they are

        header, *body = self._cells()
        table = Table(caption=Text("\n".join(self._notes())))
        for cell in header:
            table.add_column(Text(cell), overflow="fold")
        for line in body:
            table.add_row(*map(Text, line))
        return table

    def _cells(self) -> list[list[str]]:
        placed = any(row.placement for row in self.rows)
        columns = [[name, *([f"{name} − {self.against}"] if self.against else [])] for name in self.metrics]
        header = ["task", "model", *["placement"] * placed, "norm", "runs", *chain(*columns)]
        means = {
            name: [row.metrics[name].mean or 0.0 for row in self.rows if name in row.metrics] for name in self.metrics
        }
        decimals = {name: 4 if max(map(abs, column), default=0.0) <= 1 else 2 for name, column in means.items()}

        def cells_of(row, name):
            yield _format(row.metrics.get(name), len(row.seeds), decimals[name])
            if self.against:
                yield _format_difference(row.differences.get(name), decimals[name])

        return [header] + [
            [row.task, row.model, *[row.placement or "–"] * placed, row.norm, str(len(row.seeds))]
            + [*chain(*(cells_of(row, name) for name in self.metrics))]
            for row in self.rows
        ]

    def _notes(self) -> list[str]:
        return [
            f"Baselines on {task}: {', '.join(f'{name} {value:.4g}' for name, value in scores.items())}."
            for task, scores in self.baselines.items()
            if scores
        ]


def compare_results(
    results: Iterable[dict[str, Any]], metrics: Iterable[str] | None = None, against: str | None = None
) -> ComparisonTable:
    """
    Compares norms: one row for each norm of a task, model and placement, LayerNorm first, with the mean and the sample
    standard deviation over the seeds.

    Runs in which a norm has other options, or replaces another number of norms, make another row, named after what
    differs: `powernorm (num_groups=4)`. A score that is not finite in every run says in how many it is:
    `0.7100 (2 of 3)`.

    Args:
        results (`Iterable[dict]`):
            The results, as [`load_results`] returns them.
        metrics (`Iterable[str]`, *optional*):
            The metrics to show. All of them if not given.
        against (`str`, *optional*):
            A norm that all others are compared with, seed by seed: the mean difference and its 95 % interval by a
            paired t-test. An interval on both sides of 0 tells nothing apart. It needs `scipy`.

    Returns:
        [`ComparisonTable`]: The table.

    Raises:
        ValueError: when no result has a metric, runs of a norm differ in more than their seed, or a task has no run of
            `against`.
        ImportError: for `against` without scipy.

    Example:

    ```python
    >>> from hf_normswap.reporting.results import compare_results

    >>> run = {"task": "rte", "model": "bert"}
    >>> table = compare_results(
    ...     [
    ...         run | {"norm": "batchnorm", "seed": 0, "metrics": {"accuracy": 0.70}},
    ...         run | {"norm": "batchnorm", "seed": 1, "metrics": {"accuracy": 0.72}},
    ...         run | {"norm": "layernorm", "seed": 0, "metrics": {"accuracy": 0.69}},
    ...     ]
    ... )
    >>> print(table.to_markdown())
    | task | model | norm | runs | accuracy |
    |---|---|---|---|---|
    | rte | bert | layernorm | 1 | 0.6900 |
    | rte | bert | batchnorm | 2 | 0.7100 ± 0.0141 |

    ```
    """
    results = list(results)
    known = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    metrics = known if metrics is None else list(metrics)
    for name in metrics:
        if name not in known:
            raise ValueError(f"No result has the metric {name!r}: choose from {', '.join(known)}.")

    rows, baselines, groups = [], {}, dict(_group(results))
    for (task, model, placement, norm), runs in groups.items():
        seeds = sorted(run["seed"] for run in runs)
        if len(set(seeds)) < len(seeds) or any(_swapped(run) != _swapped(runs[0]) for run in runs):
            raise ValueError(
                f"The runs of {norm} on {task} with {model} (seeds {', '.join(map(str, seeds))}) differ in more than "
                "their seed: compare them from separate folders."
            )
        reported = [name for name in metrics if any(name in run["metrics"] for run in runs)]
        scores = {name: _score([run["metrics"].get(name) for run in runs]) for name in reported}
        differences = {}
        if against is not None and norm != against:
            reference = groups.get((task, model, placement, against))
            if reference is None:
                raise ValueError(f"{against} has no run on {task} with {model}: run it, or compare with another norm.")
            found = {name: _difference(runs, reference, name) for name in reported}
            differences = {name: difference for name, difference in found.items() if difference}
        rows.append(ComparisonRow(task, model, placement or None, norm, seeds, scores, differences))
        for run in runs:
            finite = {name: value for name, value in (run.get("baselines") or {}).items() if value is not None}
            baselines.setdefault(task, {}).update(finite)
    return ComparisonTable(rows, metrics, baselines, against)


def _group(results: list[dict]) -> list[tuple[tuple, list[dict]]]:
    by_norm = defaultdict(list)
    for result in results:
        by_norm[result["task"], result["model"], result.get("placement") or "", result["norm"]].append(result)

    rows = defaultdict(list)
    for (*setting, norm), runs in by_norm.items():
        options = [_options(run) for run in runs]
        differing = [key for key in dict.fromkeys(chain(*options)) if len({str(o.get(key)) for o in options}) > 1]
        for run, option in zip(runs, options):
            chosen = ", ".join(f"{key}={option[key]}" for key in differing if key in option)
            rows[*setting, f"{norm} ({chosen})" if chosen else norm].append(run)
    return sorted(rows.items(), key=lambda row: (*row[0][:3], row[0][3] != "layernorm", row[0][3]))


def _options(run: dict) -> dict[str, Any]:
    swapped = _swapped(run)
    options = {key: value for entry in swapped for key, value in entry["options"].items()}
    return options | {"norms": sum(len(entry["modules"]) for entry in swapped)}


def _swapped(run: dict) -> list[dict]:
    # A LayerNorm swapped for a LayerNorm is the same baseline.
    return [] if run["norm"] == "layernorm" else (run.get("norm_swap") or {}).get("norms", [])


def _score(values: list[float | None]) -> Score:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return Score(mean=fmean(finite) if finite else None, std=stdev(finite) if len(finite) > 1 else None, n=len(finite))


def _difference(runs: list[dict], reference: list[dict], metric: str) -> Difference | None:
    scores = [{run["seed"]: run["metrics"].get(metric) for run in each} for each in (runs, reference)]
    pairs = [(scores[0][seed], scores[1][seed]) for seed in scores[0].keys() & scores[1].keys()]
    changes = [new - old for new, old in pairs if None not in (new, old) and math.isfinite(new - old)]
    return Difference(*mean_with_interval(changes), len(changes)) if changes else None


def mean_with_interval(changes: list[float]) -> tuple[float, float | None, float | None]:
    """
    The mean of some paired differences, and the ends of its 95 % interval by a t-test, `None` below two differences.
    """
    mean = fmean(changes)
    if len(changes) < 2:
        return mean, None, None
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("Intervals need scipy: install it with `pip install scipy`.") from error
    reach = float(t.ppf(0.975, len(changes) - 1)) * stdev(changes) / math.sqrt(len(changes))
    return mean, mean - reach, mean + reach


def _format(score: Score | None, runs: int, decimals: int) -> str:
    if score is None:
        return "–"
    if score.mean is None:
        return "not finite"
    spread = "" if score.std is None else f" ± {score.std:.{decimals}f}"
    share = "" if score.n == runs else f" ({score.n} of {runs})"
    return f"{score.mean:.{decimals}f}{spread}{share}"


def _format_difference(difference: Difference | None, decimals: int) -> str:
    if difference is None:
        return "–"
    mean = f"{difference.mean:+.{decimals}f}"
    if difference.low is None:
        return mean
    return f"{mean} ({difference.low:+.{decimals}f} to {difference.high:+.{decimals}f})"
