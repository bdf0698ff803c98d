"""Which norm is best: the grid of `benchmarks/evidence.yaml`, setting by setting, for docs/choosing.md."""

from records import FOLDER, read, show, table

from hf_normswap.reporting.comparison import compare_results, mean_with_interval


PICTURE = FOLDER.parent / "docs/pictures/evidence.svg"
NORMS = {
    "batchnorm": "BatchNorm",
    "rbn": "RBN",
    "powernorm": "PowerNorm",
    "converted": "LayerNorm, converted",
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
PLACEMENTS = ("post", "pre")
TOLERATED = 0.2  # points: a norm whose mean is lower by more is not called as good as LayerNorm


def find_settings():
    """Each task and placement whose runs are complete, with a row of the comparison for each norm."""
    for task, (label, metric, _, _) in TASKS.items():
        records = [read(path) for path in sorted((FOLDER / "evidence" / task / "table").glob("*.json"))]
        for placement in PLACEMENTS:
            runs = [record | {"placement": placement} for record in records if placed(record) == placement]
            # The same runs once more: what is left of their LayerNorms is as good as a norm of its own.
            runs += [
                run | {"norm": "converted", "metrics": {metric: run["metrics"][f"converted_{metric}"]}}
                for run in runs
                if run["norm"] == "layernorm"
            ]
            rows = {row.norm: row for row in compare_results(runs, [metric], "layernorm").rows} if runs else {}
            if rows.keys() == {"layernorm", *NORMS} and len({tuple(row.seeds) for row in rows.values()}) == 1:
                yield f"{label}, {placement}", task, rows


def placed(record):
    return record["arguments"]["placement"]


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


def table_of_settings():
    """Scores with LayerNorm, and the gains over it."""
    rows = [("", "LayerNorm", *NORMS.values())]
    for label, task, found in find_settings():
        _, metric, scale, more_is_better = TASKS[task]
        score = found["layernorm"].metrics[metric]
        cells = [f"{scale * score.mean:.1f} ± {scale * score.std:.1f}"]
        for norm in NORMS:
            gain = compare(task, found[norm])
            mean, low, high = gain if more_is_better else (-gain[0], -gain[2], -gain[1])
            text = f"{show(mean, '+.1f')} ({show(low, '.1f')} to {show(high, '.1f')})"
            cells.append(f"**{text}**" if judge(*gain) != "tie" else text)
        rows.append((label, *cells))
    return table(rows)


def table_of_verdicts():
    """How often each norm is better than LayerNorm, and worse."""
    rows = [("", "better", "no difference", "worse", "as good as LayerNorm", "mean gain in points")]
    settings = list(find_settings())
    for norm, name in NORMS.items():
        gains = [compare(task, found[norm]) for _, task, found in settings]
        counts = [sum(judge(*gain) == verdict for gain in gains) for verdict in ("win", "tie", "loss")]
        good = f"{sum(is_as_good(*gain) for gain in gains)} of {len(gains)}"
        points = [gain[0] for gain, (_, task, _) in zip(gains, settings, strict=True) if TASKS[task][3]]
        rows.append(
            (name, *counts, good, "{} ({} to {})".format(*(show(x, "+.1f") for x in mean_with_interval(points))))
        )
    return table(rows)


def draw():
    """A picture of the gains with their intervals."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = list(find_settings())
    colors = dict(zip(NORMS, ("#E69F00", "#D55E00", "#0072B2", "#009E73"), strict=True))  # Okabe and Ito
    with rc_context({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 0.8 + 0.62 * len(settings)), layout="constrained")
        axes = figure.subplots()
        for place, norm in enumerate(NORMS):
            gains = [compare(task, found[norm]) for _, task, found in settings]
            heights = [number + 0.16 * (place - 1.5) for number in range(len(gains))]
            means, lows, highs = zip(*gains, strict=True)
            axes.hlines(heights, lows, highs, color=colors[norm], linewidth=1.2)
            axes.plot(means, heights, "o", color=colors[norm], markersize=4, label=NORMS[norm])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(settings)), [label for label, _, _ in settings])
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=5)
        axes.set_xlabel("gain over LayerNorm in points, and 95 % interval over seeds (linear up to 5)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(PICTURE, metadata={"Date": None})


TABLES = {"evidence": table_of_settings, "verdicts": table_of_verdicts}
