"""The tables of the page on calibration."""

from statistics import mean

from records import FOLDER, find, mean_and_each, read, show, table, values_of


TASKS = {
    "sst2": "SST-2, accuracy",
    "trec": "TREC, accuracy",
    "mrpc": "MRPC, accuracy",
    "btc": "Broad Twitter, F1 of entities",
    "wnut17": "WNUT-17, F1 of entities",
    "stsb": "STS-B, a regression, Spearman",
    "embeddings": "STS-B, embeddings as they came, Spearman",
}
STEPS = {
    "naive swap": "naive swap",
    "norms alone": "norms alone (steps 1 and 2)",
    "calibrated": "with linear layers (steps 1 to 4)",
    "calibrated, distilled": "and {} steps of `distill(…, linears=False)`",
}
CONVERSIONS = (
    ("GPT-2, Penn Treebank", "perplexity", "gpt2/batchnorm-blocks-256{}", "perplexity", ".1f"),
    ("Marian, Multi30k de–en", "BLEU", "marian/batchnorm-pairs-1024{}", "bleu", ".1f"),
    ("", "loss", "marian/batchnorm-pairs-1024{}", "validation_loss", ".3f"),
    ("GPT-2 of 12 layers, Penn Treebank", "perplexity", "gpt2-12/batchnorm-blocks-256{}", "perplexity", ".1f"),
    ("RoBERTa, Penn Treebank", "masked perplexity", "roberta/batchnorm-masked-lines-1024{}", "perplexity", ".1f"),
    (
        "DistilBERT, Penn Treebank",
        "masked perplexity",
        "distilbert/batchnorm-masked-lines-1024{}",
        "perplexity",
        ".1f",
    ),
    ("T5, Multi30k de–en", "loss", "t5/batchnorm-pairs-1024{}", "validation_loss", ".3f"),
    ("ViT, digits", "accuracy", "vit/batchnorm-images-512{}-seed-?", "accuracy", ".1f"),
    ("Llama, Penn Treebank", "perplexity", "llama/batchnorm-blocks-256{}", "perplexity", ".1f"),
)
EXAMPLES = (
    ("GPT-2, perplexity", "gpt2/batchnorm-blocks", "perplexity"),
    ("", "gpt2/batchnorm-lines", "perplexity"),
    ("Marian, BLEU", "marian/batchnorm-pairs", "bleu"),
    ("DistilBERT, masked perplexity", "distilbert/batchnorm-masked-lines", "perplexity"),
    ("", "distilbert/batchnorm-lines", "perplexity"),
)
GLUE = {"sst2": "SST-2", "mrpc": "MRPC", "rte": "RTE"}
RECIPES = {
    "batchnorm": "BatchNorm, frozen for the second half",
    "rbn": "RBN, frozen for the second half",
    "powernorm": "PowerNorm, frozen throughout",
}


def percent_of_change(before, after):
    return f"{show(100 * (after - before) / before, '+.1f')} %"


def with_interval(row):
    """The difference of a row of `finetuning.json`."""
    low, high = (show(end, "+.1f") for end in row["interval"])
    return f"{show(row['difference'], '+.1f')} ({low} to {high})"


def post_training():
    """The records of fine-tuned models by task, and each way of their conversion over the seeds that have it."""
    groups = {}
    for path in find("post-training/*.json"):
        groups.setdefault(path.stem.rpartition("-")[0], {})[path] = read(path)
    for task, records in groups.items():
        for way in dict.fromkeys(way for record in records.values() for way in record["conversions"]):
            yield task, way, {path: record for path, record in records.items() if way in record["conversions"]}


def changes(records, way):
    """By how many points the score of each model changes."""
    return [record["metrics"][way] - record["metrics"]["before"] for record in records]


def summarize(records, way):
    """The figures of one way, over seeds: means, and the lowest and the highest change."""
    before, after = (mean(record["metrics"][name] for record in records) for name in ("before", way))
    differences = changes(records, way)
    figures = [record["conversions"][way] for record in records]
    ends = zip(*(each["interval_of_difference"] for each in figures), strict=True)
    return {
        "before": f"{before:.2f}",
        "after": f"{after:.2f}",
        "change": show(mean(differences), "+.2f"),
        "interval": " to ".join(show(mean(end), "+.2f") for end in ends),
        "extremes": f"{show(min(differences), '+.2f')} to {show(max(differences), '+.2f')}",
        "kept": f"{mean(map(share_that_stays, figures)):.4g}",
        "kl": f"{mean(each['kl'] for each in figures):.4f}" if "kl" in figures[0] else "–",
        "examples": ", ".join(dict.fromkeys(str(each["examples"]) for each in figures)),
        "norms": ", ".join(dict.fromkeys(str(each.get("norms", "")) for each in figures)),
        "seconds": f"{mean(each['seconds'] for each in figures):.0f}",
    }


def share_that_stays(figures):
    """The strictest of the figures that a task has."""
    for name in ("agreement_on_entities", "agreement", "cosine"):
        if name in figures:
            return figures[name]
    return 1 - figures["relative_error"]


def table_of_steps():
    """SST-2, by the steps of the calibration."""
    groups = {}
    for row in read(FOLDER / "calibration-batchnorm.json")["rows"]:
        way, _, steps = row["way"].partition(" in ")
        groups.setdefault(way, []).append(row | {"steps": steps.removesuffix(" steps")})
    before = [row["accuracy_before"] for row in groups["calibrated"]]
    rows = [
        ("", "accuracy", "agreement", "error of the logits", "seconds"),
        ("LayerNorm", mean_and_each(before, scale=100), "", "", ""),
    ]
    for way, label in STEPS.items():
        found = {name: [row[name] for row in groups[way]] for name in groups[way][0]}
        shares = (mean_and_each(found[name], scale=100) for name in ("accuracy", "agreement"))
        others = (show(mean(found[name]), form) for name, form in (("logits_error", ".2f"), ("seconds", ".0f")))
        rows.append((label.format(", ".join(found["steps"])), *shares, *others))
    return table(rows)


def table_of_tasks():
    """Fine-tuned models, converted and distilled."""
    found = {(task, way): list(records.values()) for task, way, records in post_training()}
    rows = [("", "LayerNorm", "calibrated", "difference", "kept", "and distilled: difference", "kept")]
    for task, label in TASKS.items():
        cells = [label]
        for way in ("converted", "distilled"):
            records = found[task, way]
            figures = summarize(records, way)
            change = f"{figures['change']} ({figures['interval']})"
            is_share = any("agreement" in record["conversions"][way] for record in records)
            kept = f"{float(figures['kept']):.1f} %" if is_share else f"{float(figures['kept']):.3f}"
            cells += [*((figures["before"], figures["after"]) if way == "converted" else ()), change, kept]
        rows.append(cells)
    means = map(mean_over_tasks, ("converted", "distilled"))
    return table([*rows, ("mean of the seven", "", "", next(means), "", next(means), "")])


def mean_over_tasks(way):
    """How much the replacement changes the score, over tasks and fine-tunings."""
    found = {task: list(records.values()) for task, known, records in post_training() if known == way}
    return show(mean(mean(changes(found[task], way)) for task in TASKS), "+.2f")


def table_of_budgets():
    """What a budget lets pass."""
    rows = [("", "budget", "norms converted", "divergence measured", "difference", "kept")]
    for task, way, records in post_training():
        for record in records.values():
            figures = record["conversions"][way]
            if "budget" in figures:
                total = figures["norms"] + len(figures["kept"])
                shares = (f"{figures['norms']} of {total}", f"{figures['kl']:.4f}")
                change = show(*changes([record], way), "+.2f")
                rows.append((TASKS[task], figures["budget"], *shares, change, f"{share_that_stays(figures):.1f} %"))
    return table(rows)


def table_of_conversions():
    """Small models from scratch, converted and distilled."""
    rows = [("", "score", "before", "calibrated", "and 400 steps of `distill`")]
    for label, score, pattern, metric, form in CONVERSIONS:
        before = mean(values_of(f"conversion/{pattern.format('')}.json", f"before.{metric}"))
        after = [
            mean(values_of(f"conversion/{pattern.format(way)}.json", f"metrics.{metric}"))
            for way in ("", "-distilled")
        ]
        cells = (f"{show(value, form)} ({percent_of_change(before, value)})" for value in after)
        rows.append((label, score, show(before, form), *cells))
    return table(rows)


def table_of_examples():
    """What a model loses, by what it is calibrated on."""
    rows = [("", "calibrated on", "change")]
    for label, pattern, metric in EXAMPLES:
        records = map(read, find(f"conversion/{pattern}-*[0-9].json"))
        for record in sorted(records, key=lambda record: record["calibration"]["examples"]):
            fit, scores = record["calibration"], (record[name][metric] for name in ("before", "metrics"))
            rows.append((label, f"{fit['examples']:,} {fit['inputs']}", percent_of_change(*scores)))
            label = ""
    return table(rows)


def finetuning():
    """The rows of `finetuning.json` by norm, way and task."""
    rows = read(FOLDER / "finetuning.json")["rows"]
    return {(row["norm"], row["way"], row["task"]): row for row in rows}


def of_seeds(scores):
    return ", ".join(map(show, scores.values()))


def table_of_finetuning():
    """Models that are converted first and fine-tuned then: each seed."""
    found = finetuning()
    scores = (found["batchnorm", "calibrated", task]["layernorm"] for task in GLUE)
    rows = [
        ("calibrated on 512 training examples", *GLUE.values(), "mean difference"),
        ("LayerNorm", *map(of_seeds, scores), ""),
    ]
    for norm, label in RECIPES.items():
        scores = (found[norm, "calibrated", task]["accuracy"] for task in GLUE)
        rows.append((label, *map(of_seeds, scores), with_interval(found[norm, "calibrated", "all"])))
    return table(rows)


def table_of_differences():
    """The same, task by task, and other ways to the new norms."""
    found = finetuning()
    rows = [("difference", *GLUE.values())]
    for norm, label in RECIPES.items():
        for way in ("calibrated", "progressive", "naive"):
            cells = [found.get((norm, way, task)) for task in GLUE]
            if any(cells):
                count = max(len(cell["accuracy"]) for cell in cells if cell)
                name = f"{label.partition(',')[0]}, {way}" + (", one seed" if count == 1 else "")
                rows.append((name, *(with_interval(cell) if cell else "" for cell in cells)))
    return table(rows)


def table_of_orders():
    """The gap to LayerNorm by the order of conversion and fine-tuning."""
    ways = {task: list(records.values()) for task, way, records in post_training() if way == "distilled"}
    rows = [
        ("", *(f"converted, then fine-tuned: {name}" for name in ("BatchNorm", "RBN")), "fine-tuned, then converted")
    ]
    for task in ("sst2", "mrpc", "btc", "wnut17"):
        if task in GLUE:
            first = [finetuning()[norm, "calibrated", task]["difference"] for norm in ("batchnorm", "rbn")]
        else:
            layernorm, *scores = (
                100 * values_of(f"ner/{task}-{norm}-post-0.json", "metrics.test_f1")[0]
                for norm in ("layernorm", "batchnorm", "rbn")
            )
            first = [score - layernorm for score in scores]
        rows.append((TASKS[task], *(show(gap, "+.1f") for gap in (*first, mean(changes(ways[task], "distilled"))))))
    return table(rows)


TABLES = {
    "orders": table_of_orders,
    "calibration-steps": table_of_steps,
    "tasks": table_of_tasks,
    "tasks-mean": mean_over_tasks,
    "budgets": table_of_budgets,
    "conversions": table_of_conversions,
    "calibration-examples": table_of_examples,
    "finetuning": table_of_finetuning,
    "finetuning-differences": table_of_differences,
}
