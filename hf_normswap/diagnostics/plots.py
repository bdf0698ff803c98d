"""Figures of runs, drawn from their results (see `hf_normswap/reporting/results.py`)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_normswap.convert import ConversionReport

    from .depth_study import DepthStudy
    from .tid import TidHistory

# Colours that stay apart for colour-blind eyes (Okabe and Ito), and lines and markers that do so in grey print.
_STYLES = {
    "layernorm": ("#000000", "-", "o"),
    "batchnorm": ("#E69F00", "--", "s"),
    "rbn": ("#0072B2", "-.", "^"),
    "powernorm": ("#D55E00", (0, (6, 1, 1, 1, 1, 1)), "D"),
    "pnv": ("#CC79A7", ":", "v"),
    "rmsnorm": ("#009E73", (0, (1, 1)), "P"),
}
_OTHER_STYLES = [
    ("#56B4E9", (0, (3, 1)), "X"),
    ("#7F7F7F", (0, (8, 2)), "*"),
    ("#F0E442", (0, (5, 1, 1, 1)), "<"),
    ("#56B4E9", (0, (1, 3)), ">"),
    ("#7F7F7F", (0, (3, 3)), "p"),
    ("#F0E442", (0, (8, 1)), "h"),
]

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
    >>> from hf_normswap.diagnostics.plots import plot_curves

    >>> history = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}]
    >>> run = {"task": "rte", "model": "bert", "metrics": {"accuracy": 0.7}, "history": history}
    >>> figure = plot_curves([run | {"norm": norm, "seed": 0} for norm in ("layernorm", "rbn")])
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['training loss']

    ```
    """
    results = list(results)
    if len(tasks := {result["task"] for result in results}) != 1:
        raise ValueError(f"Curves are of the runs of one task, not of {len(tasks)}: pass the results of one.")
    panels = _find_panels(results, metric)
    if not panels:
        raise ValueError("These results have no history to draw: pass those that the recipes wrote.")
    styles = _assign_styles(dict.fromkeys(result["norm"] for result in results))

    figure, every_axes = _make_figure(len(panels))
    handles = {}
    for axes, (key, label) in zip(every_axes, panels.items(), strict=True):
        logarithmic = key.startswith("tid_")
        for norm, points in _collect_points(results, key, positive=logarithmic).items():
            steps = sorted(points)
            mean = [sum(points[step]) / len(points[step]) for step in steps]
            handles[norm] = _draw_line(axes, list(zip(steps, mean, strict=True)), styles[norm])
            low, high = ([pick(points[step]) for step in steps] for pick in (min, max))
            axes.fill_between(steps, low, high, color=styles[norm][0], alpha=0.15, linewidth=0)
        _finish(axes, "step", label, logarithmic)
    _add_legend(figure, styles, handles)
    return figure


def plot_tid(history: "TidHistory") -> "Figure":
    """
    Draws the training-inference discrepancy (TID) of every norm over a training, from the first (dark) to the last.

    Args:
        history (`TidHistory`):
            What the trainers write, as `TidHistory.read("./outputs/my-run")` reads it.

    Returns:
        `matplotlib.figure.Figure`: The figure; `figure.savefig("tid.png")` writes it.

    Example:

    ```python
    >>> import torch
    >>> from hf_normswap import TidHistory
    >>> from hf_normswap.diagnostics.plots import plot_tid

    >>> history = TidHistory(["layer.0", "layer.1"])
    >>> for step in (10, 20):
    ...     history.add(step, torch.tensor([[0.2, 0.3], [0.1, 0.4]]))
    >>> [axes.get_ylabel() for axes in plot_tid(history).axes]
    ['TID of the mean', 'TID of the variance', 'norm']

    ```
    """
    panels = {"TID of the mean": history.mean, "TID of the variance": history.variance}
    panels = {label: rows for label, rows in panels.items() if any(value for row in rows for value in row)}
    if not panels:
        raise ValueError("This history has no entries: train a model with running statistics, and log.")
    figure, every_axes = _make_figure(len(panels))
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors, depth = colormaps["cividis"], max(1, len(history.layers) - 1)
    for axes, (label, rows) in zip(every_axes, panels.items(), strict=True):
        for index in range(len(history.layers)):
            points = [(step, row[index]) for step, row in zip(history.steps, rows, strict=True) if row[index]]
            if points:
                axes.plot(*zip(*points, strict=True), color=colors(0.9 * index / depth), linewidth=1.2)
        _finish(axes, "step", label, logarithmic=True)
    scale = ScalarMappable(Normalize(0, depth / 0.9), colors)
    bar = figure.colorbar(scale, ax=every_axes, label="norm", boundaries=range(len(history.layers) + 1))
    bar.ax.set_ylabel("norm")
    return figure


def plot_layer(histories: "dict[str, TidHistory]", layer: int = -1) -> "Figure":
    """
    Draws the distance between batch and running statistics in one layer over training, a line for each norm.

    Args:
        histories (`dict[str, TidHistory]`):
            History of the training with each norm, by its name.
        layer (`int`, *optional*, defaults to -1):
            Index of the norm in the model, the last one by default.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    panels = {"mean": "TID of the mean", "variance": "TID of the variance"}
    figure, every_axes = _make_figure(len(panels))
    styles, handles = _assign_styles(histories), {}
    for axes, (name, label) in zip(every_axes, panels.items(), strict=True):
        for norm, history in histories.items():
            rows = zip(history.steps, getattr(history, name), strict=True)
            points = [(step, row[layer]) for step, row in rows if row[layer]]
            if points:
                handles[norm] = _draw_line(axes, points, styles[norm])
        _finish(axes, "step", label, logarithmic=True)
    _add_legend(figure, styles, handles)
    return figure


def plot_gap(results: Iterable[dict[str, Any]]) -> "Figure":
    """
    Draws the gap between the loss in evaluation and in training against the TID of the worst layer, a point for each
    run, at the end of its training.

    Args:
        results (`Iterable[dict]`):
            Results of runs that were evaluated while they trained.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ValueError: when no run has both in its history.
    """
    panels = {key: label for key, label in _PANELS.items() if key.startswith("tid_")}
    points = {key: defaultdict(list) for key in panels}
    for result in results:
        last = {}
        for entry in result.get("history", []):
            last |= {name: value for name, value in entry.items() if value is not None}
        for key in panels:
            if {key, "eval_loss", "loss"} <= last.keys() and last[key] > 0:
                gap = last["eval_loss"] - (last["loss"] - last.get("rbn_penalty", 0.0))
                points[key][result["norm"]].append((last[key], gap))
    panels = {key: label for key, label in panels.items() if points[key]}
    if not panels:
        raise ValueError("No run has a TID and a loss in evaluation: train with --eval_strategy steps.")
    styles, handles = _assign_styles(dict.fromkeys(norm for norms in points.values() for norm in norms)), {}
    figure, every_axes = _make_figure(len(panels))
    for axes, (key, label) in zip(every_axes, panels.items(), strict=True):
        for norm, of_norm in points[key].items():
            color, _, marker = styles[norm]
            handles[norm] = axes.scatter(*zip(*of_norm, strict=True), color=color, marker=marker)
        axes.set_xscale("log")
        _finish(axes, label, "loss in evaluation − in training")
    _add_legend(figure, styles, handles)
    return figure


def plot_depth(study: "DepthStudy") -> "Figure":
    """
    Draws the gradient of the last feed-forward layer against the depth of the model, a panel for each placement.

    Args:
        study (`DepthStudy`):
            What `study_depth` returns.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    placements = list(dict.fromkeys(slope.placement for slope in study))
    styles, handles = _assign_styles(dict.fromkeys(slope.norm for slope in study)), {}
    figure, every_axes = _make_figure(len(placements))
    for axes, placement in zip(every_axes, placements, strict=True):
        for slope in study:
            if slope.placement == placement:
                points = [(depth, sum(values) / len(values)) for depth, values in slope.gradients.items()]
                handles[slope.norm] = _draw_line(axes, points, styles[slope.norm])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        _finish(axes, "blocks", f"gradient of the last layer, {placement}", logarithmic=True)
    limits = [axes.get_ylim() for axes in every_axes]
    for axes in every_axes:  # of one scale: a slope can be seen
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    _add_legend(figure, styles, handles)
    return figure


def plot_damage(report: "ConversionReport") -> "Figure":
    """
    Draws how far the model would be from the original one if a single norm were converted, a bar for each norm.

    Bars of norms that the budget has left as they were are grey.

    Args:
        report (`ConversionReport`):
            What `convert_norms` returns with a budget.

    Returns:
        `matplotlib.figure.Figure`: The figure; `figure.savefig("damage.png")` writes it.

    Raises:
        ValueError: when the conversion had no budget, and no damage was measured.
    """
    if not report.damage:
        raise ValueError("This conversion has measured no damage of single norms: pass a budget to convert_norms.")
    figure, (axes,) = _make_figure(1)
    names = list(report.damage)
    figure.set_size_inches(7.2, 1.2 + 0.22 * len(names))
    color = _assign_styles([report.norm])[report.norm][0]
    kept = [name for name in names if name in report.kept]
    groups = {"converted": [name for name in names if name not in kept], "left as it was": kept}
    for (label, group), fill in zip(groups.items(), (color, "#BFBFBF"), strict=True):
        places = [names.index(name) for name in group]
        axes.barh(places, [report.damage[name] for name in group], color=fill, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    _finish(axes, "distance from the original model, this norm alone converted", "")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _make_figure(panels: int) -> tuple["Figure", list]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: install it with `pip install 'hf_normswap[plots]'`.") from error
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.2 * columns, 0.4 + 2.9 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index) for index in range(1, panels + 1)]


def _draw_line(axes, points: list[tuple], style: tuple):
    color, dashes, marker = style
    xs, ys = zip(*points, strict=True)
    (line,) = axes.plot(
        xs,
        ys,
        color=color,
        linestyle=dashes,
        marker=marker,
        markevery=max(1, len(xs) // 6),
        markersize=4.5,
        linewidth=1.4,
    )
    return line


def _finish(axes, xlabel: str, ylabel: str, logarithmic: bool = False) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _add_legend(figure, styles: dict, handles: dict) -> None:
    figure.legend(
        [handles[norm] for norm in styles if norm in handles],
        [norm for norm in styles if norm in handles],
        loc="outside upper center",
        ncols=len(handles),
        frameon=False,
        handlelength=4,
    )


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
