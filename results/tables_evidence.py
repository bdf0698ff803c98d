"""Which norm is best: the grid of `benchmarks/evidence.yaml`, setting by setting, for docs/choosing.md."""

import tables_runs
from records import FOLDER, read, show, table

from hf_normswap.reporting.comparison import compare_results, mean_with_interval


PICTURE = FOLDER.parent / "docs/pictures/evidence.svg"
NORMS = {norm: name for norm, name in tables_runs.NORMS.items() if norm != "layernorm"}
# The same runs once more, after a step that needs no labels: the norm of the run, and the prefix of its scores.
VARIANTS = {
    "BatchNorm, re-estimated": ("batchnorm", "reestimated"),
    "RBN, re-estimated": ("rbn", "reestimated"),
    "PowerNorm, re-estimated": ("powernorm", "reestimated"),
    "LayerNorm, converted": ("layernorm", "converted"),
}
TASKS = {  # in the order of the page: what is scored, its name in a record, its scale, and whether more is better
    "trec": ("TREC, accuracy", "test_accuracy", 100, True),
    "sst2": ("SST-2, accuracy", "test_accuracy", 100, True),
    "broad_twitter": ("Broad Twitter, F1", "test_f1", 100, True),
    "multi30k": ("Multi30k, BLEU", "test_bleu", 1, True),
    "ptb": ("Penn Treebank, perplexity", "test_perplexity", 1, False),
    "subj": ("Subj, accuracy", "test_accuracy", 100, True),
    "ag_news": ("AG News, accuracy", "test_accuracy", 100, True),
    "cola": ("CoLA, correlation", "test_matthews_correlation", 100, True),
    "mrpc": ("MRPC, accuracy", "test_accuracy", 100, True),
    "wnut17": ("WNUT-17, F1", "test_f1", 100, True),
}
COLUMNS = (*NORMS.values(), *VARIANTS)
PLACEMENTS = ("post", "pre")
SEEDS = [0, 1, 2]
COLORS = ("#E69F00", "#D55E00", "#0072B2", "#009E73")  # Okabe and Ito
TOLERATED = 0.2  # points: a norm whose mean is lower by more is not called as good as LayerNorm


def read_runs(task):
    """The records of the table of a task."""
    return [read(path) for path in sorted((FOLDER / "evidence" / task / "table").glob("*.json"))]


def find_settings():
    """Each task and placement whose runs are complete, with a row of the comparison for each norm and variant."""
    for task, (label, metric, _, _) in TASKS.items():
        records = read_runs(task)
        for placement in PLACEMENTS:
            runs = [
                record | {"placement": placement}
                for record in records
                if record["arguments"]["placement"] == placement
            ]
            runs += [
                run | {"norm": variant, "metrics": {metric: run["metrics"][f"{prefix}_{metric}"]}}
                for variant, (norm, prefix) in VARIANTS.items()
                for run in runs
                if run["norm"] == norm and f"{prefix}_{metric}" in run["metrics"]
            ]
            rows = {row.norm: row for row in compare_results(runs, [metric], "layernorm").rows} if runs else {}
            rows = {NORMS.get(norm, norm): row for norm, row in rows.items()}
            if rows.keys() == {"layernorm", *COLUMNS} and all(row.seeds == SEEDS for row in rows.values()):
                yield f"{label}, {placement}", task, rows


def compare(task, row):
    """The gain of a norm over LayerNorm, positive where the norm is better: its mean, and its 95 % interval."""
    _, metric, scale, more_is_better = TASKS[task]
    difference = row.differences[metric]
    ends = [scale * value for value in (difference.mean, difference.low, difference.high)]
    return ends if more_is_better else [-ends[0], -ends[2], -ends[1]]


def judge(mean, low, high):
    """Whether a norm is better than LayerNorm by a paired t-test over seeds, worse, or neither."""
    return "win" if low > 0 else "loss" if high < 0 else "tie"


def is_as_good(mean, low, high):
    """Whether a norm is not significantly worse than LayerNorm, and in the mean no more than what is tolerated."""
    return high >= 0 and mean >= -TOLERATED


def table_of_settings(*columns):
    """Scores with LayerNorm, and the gains of some norms or variants over it."""
    rows = [("", "LayerNorm", *columns)]
    for label, task, found in find_settings():
        _, metric, scale, more_is_better = TASKS[task]
        score = found["layernorm"].metrics[metric]
        cells = [f"{scale * score.mean:.1f} ± {scale * score.std:.1f}"]
        for column in columns:
            gain = compare(task, found[column])
            mean, low, high = gain if more_is_better else (-gain[0], -gain[2], -gain[1])
            text = f"{show(mean, '+.1f')} ({show(low, '+.1f')} to {show(high, '+.1f')})"
            cells.append(f"**{text}**" if judge(*gain) != "tie" else text)
        rows.append((label, *cells))
    return table(rows)


def table_of_verdicts():
    """How often each norm is better than LayerNorm, and worse."""
    rows = [("", "better", "not told apart", "worse", "as good as LayerNorm", "mean gain in points")]
    settings = list(find_settings())
    for name in COLUMNS:
        gains = [compare(task, found[name]) for _, task, found in settings]
        counts = [sum(judge(*gain) == verdict for gain in gains) for verdict in ("win", "tie", "loss")]
        good = f"{sum(is_as_good(*gain) for gain in gains)} of {len(gains)}"
        points = [gain[0] for gain, (_, task, _) in zip(gains, settings, strict=True) if TASKS[task][3]]
        rows.append(
            (name, *counts, good, "{} ({} to {})".format(*(show(x, "+.1f") for x in mean_with_interval(points))))
        )
    return table(rows)


def draw():
    """A picture of the gains with their intervals: norms on the left, variants on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = list(find_settings())
    ticks = [-20, -10, -5, -2, 0, 2, 5, 10, 20]
    with rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 1.2 + 0.55 * len(settings)), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, columns in zip(panels, (NORMS.values(), VARIANTS), strict=True):
            for place, (column, color) in enumerate(zip(columns, COLORS)):
                gains = [compare(task, found[column]) for _, task, found in settings]
                heights = [number + 0.17 * (place - 1.5) for number in range(len(gains))]
                means, lows, highs = zip(*gains, strict=True)
                axes.hlines(heights, lows, highs, color=color, linewidth=1.2)
                axes.plot(means, heights, "o", color=color, markersize=4, label=column)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xscale("symlog", linthresh=2, linscale=0.6)
            axes.set_xticks(ticks, [show(tick, "+.0f") if tick else "0" for tick in ticks])
            axes.set_xlim(-25, 25)
            axes.minorticks_off()
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(range(len(settings)), [label for label, _, _ in settings])
        panels[0].invert_yaxis()
        figure.supxlabel("gain over LayerNorm, with its 95 % interval over seeds", fontsize=9)
        figure.savefig(PICTURE, metadata={"Date": None})


TABLES = {"evidence": table_of_settings, "verdicts": table_of_verdicts}
