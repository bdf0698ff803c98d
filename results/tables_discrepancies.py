"""Does the discrepancy of training and inference tell what batch statistics cost? The evidence, run by run."""

from records import FOLDER, show, table
from scipy.stats import spearmanr
from tables_evidence import TASKS, read_runs


PICTURE = FOLDER.parent / "docs/pictures/evidence-tid.svg"
NORMS = {"batchnorm": ("BatchNorm", "o"), "rbn": ("RBN", "^")}
FEWEST = 6  # runs that a correlation is computed from
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito


def find_points():
    """The discrepancy and the gain over LayerNorm of the same seed, `{(task, norm): [(tid, gain), ...]}`.

    The discrepancy is that of the variances in the worst layer, in the last log entry. Tasks whose score is no share
    are left out: their points would be no percentage points.
    """
    points = {}
    for task, (_, metric, scale, more_is_better) in TASKS.items():
        runs = {(each["arguments"]["placement"], each["norm"], each["seed"]): each for each in read_runs(task)}
        for (placement, norm, seed), run in runs.items():
            base = runs.get((placement, "layernorm", seed))
            tids = [entry["tid_var_max"] for entry in run["history"] if entry.get("tid_var_max")]
            if more_is_better and norm in NORMS and base and tids:
                gain = scale * (run["metrics"][metric] - base["metrics"][metric])
                points.setdefault((task, norm), []).append((tids[-1], gain))
    return points


def table_of_correlations():
    """Rank correlations of the discrepancy with the gain, for each task and over all of them."""
    points = find_points()
    tasks = {TASKS[task][0].partition(",")[0]: [task] for task, _ in points}
    tasks["all of them"] = [task for (task,) in tasks.values()]
    rows = [("", "runs", "BatchNorm and RBN together", "BatchNorm alone", "RBN alone")]
    for label, chosen in tasks.items():
        cells = []
        for norms in (NORMS, ["batchnorm"], ["rbn"]):
            found = [point for task in chosen for norm in norms for point in points[task, norm]]
            cells.append(show(spearmanr(*zip(*found)).statistic, "+.2f") if len(found) >= FEWEST else "–")
        rows.append((label, sum(len(points[task, norm]) for task in chosen for norm in NORMS), *cells))
    return table(rows)


def draw():
    """A picture of the same: one mark for each run."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = find_points()
    colors = dict(zip(dict.fromkeys(task for task, _ in points), COLORS))
    with rc_context({"svg.hashsalt": "tid", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for (task, norm), found in points.items():
            label, marker = NORMS[norm]
            name = f"{TASKS[task][0].partition(',')[0]}, {label}"
            axes.plot(*zip(*found), marker, color=colors[task], markersize=5, linestyle="none", label=name, alpha=0.85)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        ticks = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("TID of the variance in the worst layer, at the end")
        axes.set_ylabel("gain over LayerNorm, in points")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURE, metadata={"Date": None})


TABLES = {"tid-correlations": table_of_correlations}
