"""Tables of docs/folding.md, docs/diagnostics.md, docs/scaling.md and docs/speed.md."""

from records import FOLDER, read, select, show, show_ratio, table, values_of
from tables_runs import NORMS


TIMED = {
    "BERT, one row of 128 tokens": "task=encode,batch_size=1",
    "BERT, 32 rows of 128 tokens": "task=encode,batch_size=32",
    "GPT-2, the next token after 128": "task=decode",
}
QUANTIZED = {
    "stsb": "STS-B, embeddings, Spearman",
    "sst2": "SST-2, accuracy",
    "wnut17": "WNUT-17, F1 of entities",
}
SINGLE = {
    "bf16": "dtype=bfloat16",
    "f32, 16k tokens": "dtype=float32,tokens=16384",
    "f32, 4k tokens": "dtype=float32,tokens=4096",
}


def table_of_inference():
    """The time of folded models, in times of LayerNorm, with its interval."""
    rows = [("", "eager", "compiled")]
    for label, case in TIMED.items():
        found = [values_of("inference-cpu.json", f"rows[{case},variant=folded {way}]") for way in rows[0][1:]]
        rows.append((label, *(show_ratio(row) for (row,) in found)))
    return table(rows)


def table_of_int8():
    """Scores, errors and times of graphs in 8 bits."""
    rows = [("", "graph", *(cell for label in QUANTIZED.values() for cell in (label, "error")), "time")]
    records = [read(FOLDER / f"int8/{task}-0.json")["rows"] for task in QUANTIZED]
    for graphs in zip(*records, strict=True):
        (form,), (graph,) = ({row[name] for row in graphs} for name in ("form", "graph"))
        scores = [cell for row in graphs for cell in (f"{row['score']:.2f}", f"{row['error']:.3f}")]
        times = [f"{row['time'][0]:.2f}" for row in graphs if "time" in row] or ["1"]  # the others are in times of it
        rows.append((form, graph, *scores, *times))
    return table(rows)


def table_of_depth():
    """The slope of the logarithm of the last gradient over that of the depth."""
    labels = NORMS | {"rbn": "RBN, with its penalty", "powernorm": "PowerNorm in its warm-up", "pnv": "PN-V"}
    rows = [("norm", "Post-LN", "Pre-LN")]
    for norm, label in labels.items():
        found = [values_of("depth.json", f"slopes[norm={norm},placement={place}]") for place in ("post", "pre")]
        rows.append((label, *(f"{show(row['slope'], '+.2f')} ± {row['error']:.2f}" for (row,) in found)))
    return table(rows)


def table_of_discrepancies():
    """The worst TID in the last step of a GPT-2, beside its scores."""
    rows = [("", "TID of the mean", "TID of the variance", "training loss", "validation loss", "perplexity")]
    for norm, label in NORMS.items():
        record = read(FOLDER / f"lm/ptb-gpt2-{norm}-pre-0.json")
        last = f"history[step={record['history'][-1]['step']}]"
        worst = [select(record, f"{last}.tid_{name}_max") for name in ("mean", "var")]
        losses = [f"{value:.2f}" for path in (f"{last}.loss", "metrics.loss") for value in select(record, path)]
        # LayerNorm has no discrepancy, PowerNorm none of the mean.
        tid = [f"{found[0]:.3f}" if any(found) else "–" for found in worst]
        rows.append((label, *tid, *losses, f"{record['metrics']['perplexity']:.1f}"))
    return table(rows)


def table_of_warmup():
    """What a warm-up of the learning rate is worth, by placement."""
    rows = [("", "with warm-up", "without", "loss at step 125, with", "without")]
    for placement in ("pre", "post"):
        runs = [f"lm/ptb-gpt2-layernorm-{placement}-0-warmup-{share}.json" for share in ("0.1", "0")]
        before, after = (values_of(run, "metrics.test_perplexity")[0] for run in runs)
        losses = [show(values_of(run, "history[step=125].loss")[0], ".2f") for run in runs]
        more = show(after / before - 1, "+.0f", 100)
        rows.append((f"{placement.title()}-LN", f"{before:.1f}", f"{after:.1f} ({more} %)", *losses))
    return table(rows)


def table_of_synchronization():
    """The time of a step on two processes whose norms share their statistics."""
    rows = [("norm", "ratio")]
    for norm in ("batchnorm", "powernorm"):
        path = f"training/synchronization-{norm}.json"
        rows.append((f"[{NORMS[norm]}](../results/{path})", show_ratio(read(FOLDER / path), 3)))
    return table(rows)


def table_of_speed():
    """Training steps of single norms, the lowest and the highest ratio over sizes and variants."""
    columns = []
    for case in SINGLE.values():
        ratios = {}
        for row in values_of("speed/*-[14]*.json", f"rows[{case}]"):  # of 4,096 and 16,384 tokens
            ratios.setdefault(row["norm"].partition(",")[0], []).append(row["ratio"])
        columns.append({norm: f"{min(found):.2f} to {max(found):.2f}" for norm, found in ratios.items()})
    return table([("", *SINGLE), *((norm, *(column[norm] for column in columns)) for norm in columns[0])])


TABLES = {
    "inference": table_of_inference,
    "int8": table_of_int8,
    "depth": table_of_depth,
    "discrepancies": table_of_discrepancies,
    "warmup": table_of_warmup,
    "synchronization": table_of_synchronization,
    "speed": table_of_speed,
}
