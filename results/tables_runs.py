"""Tables of trainings and conversions, for README.md and recipes/README.md."""

from statistics import fmean, stdev

from records import show, table, values_of
from tables_calibration import post_training


NORMS = {"layernorm": "LayerNorm", "batchnorm": "BatchNorm", "rbn": "RBN", "powernorm": "PowerNorm"}


def table_of_norms(*columns):
    """
    A row for each norm. A column is `heading=pattern=metric=scale`: the scores of the records that match the pattern
    with the norm in its place.
    """
    columns = [column.split("=") for column in columns]
    rows = [("", *(heading for heading, *_ in columns))]
    for norm, name in NORMS.items():
        cells = [values_of(pattern.format(norm), f"metrics.{metric}") for _, pattern, metric, _ in columns]
        rows.append((name, *(show_mean(cell, scale) for cell, (*_, scale) in zip(cells, columns, strict=True))))
    return table(rows)


def show_mean(values, scale):
    """The mean, and with several seeds their standard deviation and their number."""
    if len(values) == 1:
        return show(values[0], scale=scale)
    return f"{show(fmean(values), scale=scale)} ± {show(stdev(values), scale=scale)} ({len(values)} seeds)"


REPLACED = {  # the row of the README: the records, and the score
    "GPT-2, 12 layers, Penn Treebank": ("gpt2-12/batchnorm-blocks-256", "perplexity", "perplexity", ".1f"),
    "Marian, 3 + 3 layers, Multi30k de–en": ("marian/batchnorm-pairs-1024", "BLEU", "bleu", ".1f"),
    "RoBERTa, 4 layers, Penn Treebank": (
        "roberta/batchnorm-masked-lines-1024",
        "masked perplexity",
        "perplexity",
        ".1f",
    ),
    "Llama, 4 layers, Penn Treebank": ("llama/batchnorm-blocks-256", "perplexity", "perplexity", ".1f"),
}


def table_of_replacements():
    """Trained models before and after the replacement of their norms."""
    ways = ("naive swap", "calibrated", "and 100 to 400 steps of `distill`")
    rows = [("trained with LayerNorm", "score with LayerNorm", *ways)]
    models, ways = (
        "calibration-batchnorm.json",
        ("naive swap", "calibrated,sentences=256", "*distilled*,sentences=256"),
    )
    before = f"accuracy {100 * fmean(values_of(models, 'rows[way=*].accuracy_before')):.1f}"
    after = [100 * fmean(values_of(models, f"rows[way={way}].accuracy")) for way in ways]
    rows.append(("all-MiniLM-L6-v2, SST-2 (3 models)", before, *(f"{value:.1f}" for value in after)))
    records = next(found.values() for task, way, found in post_training() if (task, way) == ("wnut17", "distilled"))
    means = (fmean(record["metrics"][way] for record in records) for way in ("before", "converted", "distilled"))
    before, *after = (f"{value:.1f}" for value in means)
    rows.append(("all-MiniLM-L6-v2, WNUT-17 (3 models)", f"F1 of entities {before}", "", *after))
    for name, (stem, score, metric, form) in REPLACED.items():
        (before,) = values_of(f"conversion/{stem}.json", f"before.{metric}")
        after = [values_of(f"conversion/{stem}{end}.json", f"metrics.{metric}")[0] for end in ("", "-distilled")]
        rows.append((name, f"{score} {before:{form}}", "", *(f"{value:{form}}" for value in after)))
    return table(rows)


TABLES = {"norms": table_of_norms, "replacements": table_of_replacements}
