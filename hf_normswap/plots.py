"""Figures of runs, drawn from their results (see `hf_normswap/results.py`)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that stay apart for colour-blind eyes (Okabe and Ito), and lines and markers that do so in grey print.
_STYLES = {
    "layernorm": ("#000000", "-", "o"),
    "batchnorm": ("#E69F00", "--", "s"),
    "rbn": ("#0072B2", "-.", "^"),
    "powernorm": ("#D55E00", (0, (6, 1, 1, 1, 1, 1)), "D"),
    "pnv": ("#CC79A7", ":", "v"),
    "rmsnorm": ("#009E73", (0, (1, 1)), "P"),
}
_OTHER_STYLES = [("#56B4E9", (0, (3, 1)), "X"), ("#7F7F7F", (0, (8, 2)), "*")]

_PANELS = {
    "loss": "training loss",
    "tid_mean_max": "TID of the mean, worst layer",
    "tid_var_max": "TID of the variance, worst layer",
}


def plot_curves(results: Iterable[dict[str, Any]], metric: str | None = None) -> "Figure":
    """
    Draws how runs went: the training loss, the evaluated metric and the training-inference discrepancy (TID) of the
    worst layer over the steps, one line for each norm.

    Where a norm has several seeds, the line is their mean and the shade reaches from the lowest to the highest. A
    panel for which no run has figures is left out: LayerNorm has no TID, PowerNorm has none of the mean.

    Args:
        results (`Iterable[dict]`):
            Results of runs on one task, with their `history`.
        metric (`str`, *optional*):
            The metric to show, as `eval_{metric}` in the history. The first of the results' metrics that is there if
            not given.

    Returns:
        `matplotlib.figure.Figure`: The figure; `figure.savefig("curves.png")` writes it.

    Example:

    ```python
    >>> from hf_normswap.plots import plot_curves

    >>> history = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]
    >>> run = {"task": "rte", "model": "bert", "metrics": {"accuracy": 0.7}, "history": history}
    >>> figure = plot_curves([run | {"norm": norm, "seed": 0} for norm in ("layernorm", "rbn")])
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['training loss']

    ```
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError("Plots need matplotlib: install it with `pip install 'hf_normswap[plots]'`.") from error

    results = list(results)
    if len(tasks := {result["task"] for result in results}) != 1:
        raise ValueError(f"Curves are of the runs of one task, not of {len(tasks)}: pass the results of one.")
    panels = _find_panels(results, metric)
    if not panels:
        raise ValueError("These results have no history to draw: pass those that the recipes wrote.")
    styles = _assign_styles(dict.fromkeys(result["norm"] for result in results))

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 0.4 + 2.9 * rows), layout="constrained")
    handles = {}
    for index, (key, label) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, index)
        logarithmic = key.startswith("tid_")
        for norm, points in _collect_points(results, key, positive=logarithmic).items():
            color, dashes, marker = styles[norm]
            steps = sorted(points)
            mean = [sum(points[step]) / len(points[step]) for step in steps]
            (handles[norm],) = axes.plot(
                steps,
                mean,
                color=color,
                linestyle=dashes,
                marker=marker,
                markevery=max(1, len(steps) // 6),
                markersize=4.5,
                linewidth=1.4,
            )
            low, high = ([pick(points[step]) for step in steps] for pick in (min, max))
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="step", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.legend(
        [handles[norm] for norm in styles if norm in handles],
        [norm for norm in styles if norm in handles],
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        handlelength=4,
    )
    return figure


def _find_panels(results, metric) -> dict[str, str]:
    """Key of the history → label of the axis, for what at least one run has figures of."""
    metrics = [metric] if metric else dict.fromkeys(name for result in results for name in result["metrics"])
    evaluated = {f"eval_{name}": name for name in metrics}
    found = {key: label for key, label in evaluated.items() if _collect_points(results, key)}
    if metric and not found:
        raise ValueError(f"The metric {metric!r} was not evaluated while training: pass another, or none.")
    candidates = {"loss": _PANELS["loss"], **dict(list(found.items())[:1]), **_PANELS}
    return {key: label for key, label in candidates.items() if _collect_points(results, key, key.startswith("tid_"))}


def _collect_points(results, key, positive=False) -> dict[str, dict[int, list[float]]]:
    """Norm → step → one value for each seed. What is not finite was written as `None`."""
    points = defaultdict(lambda: defaultdict(list))
    for result in results:
        for entry in result.get("history", []):
            value = entry.get(key)
            if value is not None and (value > 0 or not positive):
                points[result["norm"]][entry["step"]].append(value)
    return points


def _assign_styles(norms) -> dict[str, tuple]:
    others = [norm for norm in norms if norm not in _STYLES]
    spare = {norm: _OTHER_STYLES[index % len(_OTHER_STYLES)] for index, norm in enumerate(others)}
    return {norm: style for norm, style in {**_STYLES, **spare}.items() if norm in norms}
