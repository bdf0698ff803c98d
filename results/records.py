"""Reads the records of this folder, and puts single figures of them into a text."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean


FOLDER = Path(__file__).parent
STEP = re.compile(r"(?P<key>[^\[\]]+)(?:\[(?P<wanted>.*)\])?")


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def find(pattern):
    """The paths of the records that match `pattern`, which is relative to this folder."""
    paths = sorted(FOLDER.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"No record matches {pattern}.")
    return paths


def select(record, path):
    """
    The numbers at a path such as `metrics.accuracy`. In a list, `rows[way=naive,sentences=256].accuracy` takes the
    rows whose values match, and `rows[-1]` one of them.
    """
    values = [record]
    for step in path.split("."):
        key, wanted = STEP.fullmatch(step).groups()
        values = [value[key] for value in values if key in value]
        if wanted is None:
            continue
        if "=" not in wanted:
            values = [value[int(wanted)] for value in values]
        else:
            pairs = [pair.split("=") for pair in wanted.split(",")]
            values = [row for rows in values for row in rows if all(fnmatchcase(str(row.get(k)), v) for k, v in pairs)]
    return values


def values_of(pattern, path):
    """The numbers at `path` in each record that matches `pattern`."""
    found = [value for file in find(pattern) for value in select(read(file), path)]
    if not found:
        raise KeyError(f"No record of {pattern} has {path}.")
    return found


def show(value, form=".1f", scale=1):
    """A number, scaled and rounded, with the sign of minus in print."""
    return f"{value * float(scale):{form}}".replace("-", "−")


def mean_and_each(values, form=".1f", scale=1):
    """The mean of some models, and each of them."""
    return f"{show(fmean(values), form, scale)} ({', '.join(show(value, form, scale) for value in values)})"


def show_ratio(row, digits=2):
    """A ratio, with its 95 % interval."""
    ratio, low, high = (f"{value:.{digits}f}" for value in (row["ratio"], *row["interval"]))
    return f"{ratio} [{low}, {high}]"


def table(rows):
    """Rows of cells in Markdown, the first one the heading."""
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in lines) + "\n"


# What a page may ask for in the middle of a sentence: `<!-- results mean PATTERN PATH FORM SCALE -->…<!-- end -->`.


def mean(pattern, path, form=".1f", scale=1):
    """The mean over records."""
    return show(fmean(values_of(pattern, path)), form, scale)


def each(pattern, path, form=".1f", scale=1):
    """One number after the other, in the order of the names of their records."""
    return ", ".join(show(value, form, scale) for value in values_of(pattern, path))


def lowest(pattern, path, form=".1f", scale=1):
    return show(min(values_of(pattern, path)), form, scale)


def highest(pattern, path, form=".1f", scale=1):
    return show(max(values_of(pattern, path)), form, scale)


def change(pattern, reference, path, form="+.1f", scale=1):
    """The mean over some records minus the mean over others."""
    return show(fmean(values_of(pattern, path)) - fmean(values_of(reference, path)), form, scale)


FIGURES = {function.__name__: function for function in (mean, each, lowest, highest, change)}
