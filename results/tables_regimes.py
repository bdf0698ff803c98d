"""Where batch statistics hold and where they break: the grid of `benchmarks/regimes.yaml`, for docs/choosing.md."""

from statistics import fmean

from records import FOLDER, mean_and_each, read, table
from tables_runs import NORMS


LABELS = NORMS | {"pnv": "PN-V"}
REGIMES = {  # the row of the page: where the runs of each norm are
    "as it is": {"layernorm": "penalty", "batchnorm": "penalty", "rbn": "penalty", "powernorm": "options"},
    "rows of all lengths in a batch": "random_batches",
    "2 layers of 64 channels": "depth_2",
    "12 layers of 64 channels": "depth_12",
    "24 layers of 64 channels": "depth_24",
    "batches of 16 rows": "batch_16",
    "batches of 1,024 rows": "batch_1024",
}
PENALTIES = (0.5, 2.0, 7.5, 40.0, 200.0)  # 7.5 is the default
OPTIONS = (
    ("batchnorm", {"momentum": 0.01}),
    ("batchnorm", {"momentum": 0.5}),
    ("rbn", {"momentum": 0.01}),
    ("rbn", {"momentum": 0.5}),
    ("powernorm", None),
    ("powernorm", {"group_scaling": False}),
    ("powernorm", {"grad_scale": "batch"}),
    ("pnv", None),
)


def find_runs(regime, norm, options=None):
    """The records of a norm with these options in a regime, one for each seed."""
    records = map(read, sorted((FOLDER / "regimes" / regime).glob(f"*/post-{norm}-*.json")))
    return [record for record in records if record["arguments"].get("norm_options") == options]


def weights(value):
    return {"lambda_mean": value, "lambda_var": value}


def show_score(records, name="test_accuracy"):
    """The mean over seeds, and each of them."""
    scores = [record["metrics"][name] for record in records if name in record["metrics"]]
    return mean_and_each(scores, scale=100) if scores else "–"


def show_tid(records, name):
    """The largest discrepancy of a norm in the last epoch, mean over seeds."""
    found = [[entry[name] for entry in record["history"] if name in entry][-1:] for record in records]
    values = [value for last in found for value in last if value]
    return f"{fmean(values):.3f}" if values else "–"


def table_of_regimes():
    """Accuracy of each norm where one thing is changed."""
    rows = [("", "LayerNorm", "BatchNorm", "re-estimated", "RBN", "re-estimated", "PowerNorm")]
    for label, homes in REGIMES.items():
        cells = [label]
        for norm in NORMS:
            home = homes if isinstance(homes, str) else homes[norm]
            records = find_runs(home, norm, weights(7.5) if (home, norm) == ("penalty", "rbn") else None)
            cells.append(show_score(records))
            if norm in ("batchnorm", "rbn"):
                cells.append(show_score(records, "reestimated_test_accuracy"))
        if any(cell != "–" for cell in cells[1:]):
            rows.append(cells)
    return table(rows)


def table_of_options():
    """Accuracy and discrepancy by the options of a norm."""
    rows = [("", "validation", "test", "test, re-estimated", "TID of the mean", "TID of the variance")]
    cases = [("LayerNorm", find_runs("penalty", "layernorm")), ("BatchNorm", find_runs("penalty", "batchnorm"))]
    cases += [(f"RBN, λ = {value:g}", find_runs("penalty", "rbn", weights(value))) for value in PENALTIES]
    for norm, options in OPTIONS:
        said = "".join(f", {name} = {value}" for name, value in (options or {}).items())
        cases.append((LABELS[norm] + said, find_runs("options", norm, options)))
    for label, records in cases:
        if records:
            scores = [show_score(records, name) for name in ("accuracy", "test_accuracy", "reestimated_test_accuracy")]
            rows.append((label, *scores, *(show_tid(records, f"tid_{name}_max") for name in ("mean", "var"))))
    return table(rows)


TABLES = {"regimes": table_of_regimes, "norm-options": table_of_options}
