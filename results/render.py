"""
Renders the index of this folder, and tables and pictures of the documentation, from the records in it.

    python results/render.py
"""

import re
import shlex
from statistics import mean, stdev

import tables_calibration
import tables_discrepancies
import tables_evidence
import tables_folding
import tables_regimes
import tables_runs
import tables_speed
from records import FIGURES, FOLDER, read, table
from tables_calibration import post_training, summarize

from hf_normswap.reporting.comparison import compare_results
from hf_normswap.reporting.results import load_results


# The name of a run: task, norm, placement, seed, and what else tells it from others.
NAME = re.compile(r"(?P<task>.+)-(?P<norm>[a-z]+)-(?P<placement>post|pre)-(?P<seed>\d+)(?:-(?P<variant>.+))?")
SCORES = ("test_f1", "accuracy", "test_perplexity", "test_bleu")  # the first that a run has is shown
LEAD = """# Results

The records of the runs and the benchmarks that the documentation quotes. The name of a run says its task, its norm,
the placement of the norms, its seed and its variant: `glue/sst2-rbn-post-0-calibrated.json`. A record holds the
scores, the options, the history, the versions and, for a training, the command that repeats it. In early records of
RBN the command names the weights of the penalty, which were a default then. `normswap compare results/glue` prints a
table.

`python results/render.py` renders this page: mean ± standard deviation over the seeds, in the unit of the record.
"""
RUNS = {
    "glue": "Fine-tuned from all-MiniLM-L6-v2 in bf16, all 13 norms replaced ([recipe](../recipes/README.md#glue)).",
    "glue-float32": "The same in float32, with a naive swap of all norms before the fine-tuning.",
    "ner": (
        "Fine-tuned from all-MiniLM-L6-v2 in bf16; all norms but LayerNorm calibrated "
        "([recipe](../recipes/README.md#named-entities))."
    ),
    "lm": "From scratch in bf16 ([recipe](../recipes/README.md#language-models)).",
    "translation": "A Marian of 3 + 3 layers from scratch in bf16 ([recipe](../recipes/README.md#translation)).",
    "first-run": "A BERT of 2 layers from scratch, by `python -m recipes.first_run`.",
}
OTHERS = """## Benchmarks

| records | made by | shown on |
| --- | --- | --- |
| [architectures.json](architectures.json) | `benchmarks/architectures.py` | [architectures](../docs/architectures.md) |
| [calibration-batchnorm.json](calibration-batchnorm.json) | `benchmarks/calibration.py` | [calibration](../docs/calibration.md#what-pays) |
| [conversion](conversion) | `benchmarks/conversion.py` | [calibration](../docs/calibration.md#what-pays) |
| [post-training](post-training) | `benchmarks/post_training.py` | [calibration](../docs/calibration.md#what-pays) |
| [finetuning.json](finetuning.json) | `benchmarks/finetuning.py` | [calibration](../docs/calibration.md#fine-tuning-a-converted-model) |
| [inference-cpu.json](inference-cpu.json) | `benchmarks/inference.py` | [folding](../docs/folding.md#what-it-gains) |
| [int8](int8) | `benchmarks/int8.py` | [folding](../docs/folding.md#in-8-bits) |
| [depth.json](depth.json) | `normswap depth` | [diagnostics](../docs/diagnostics.md#depth) |
| [speed](speed) | `benchmarks/norms.py`, `benchmarks/training.py` | [speed](../docs/speed.md) |
| [training](training) | `benchmarks/training.py` | [diagnostics](../docs/diagnostics.md), [scaling](../docs/scaling.md) |
| [literature](literature) | `benchmarks/evidence.py`, `literature.yaml` | [norms](../docs/norms.md#measured) |
| [removal](removal) | `benchmarks/evidence.py`, `removal.yaml` | [norms](../docs/norms.md#measured) |
| [ngram](ngram) | `benchmarks/evidence.py`, `ngram.yaml` | [recipes](../recipes/README.md#translation) |
| [evidence](evidence) | `benchmarks/evidence.py`; `<task>/<stage>/<placement>-<norm>-<seed>-<hash>.json` | [choosing](../docs/choosing.md#from-scratch) |
| [regimes](regimes) | `benchmarks/evidence.py`, `regimes.yaml` | [choosing](../docs/choosing.md#when-batch-statistics-break) |
"""  # noqa: E501


def find_runs(folder):
    """The paths of the runs of a folder, by everything in their names except for the seed."""
    groups = {}
    for path in sorted((FOLDER / folder).glob("*.json")):
        match = NAME.fullmatch(path.stem)
        if match is None:
            raise ValueError(f"{path.name} does not say task, norm, placement and seed: rename it.")
        groups.setdefault(tuple(match[part] or "" for part in ("task", "norm", "placement", "variant")), []).append(
            path
        )
    return groups


def show_scores(paths):
    """The score of some runs, and its name."""
    results = load_results(paths)
    metric = next(name for name in SCORES if name in results[0]["metrics"])
    score = compare_results(results, [metric]).rows[0].metrics[metric]
    return metric, f"{score.mean:.4g}" + (f" ± {score.std:.2g}" if score.std else "")


SWEEP = """## penalty

A BERT of 6 layers and width 128 from scratch on TREC, 6 epochs, one seed, by `benchmarks/evidence.py --grid
benchmarks/penalty.yaml`. The lowest validation loss, the accuracy at the best epoch and on the test split, and the
discrepancy of the variances in the last epoch, mean over the norms. RBN's penalty of 7.5, the published weight for
post-norm models, is its default. Here a weight of 40 costs pre-norm models accuracy; the longer runs of `evidence`
chose 40 for them, by another seed. One seed does not tell the warm-ups of PowerNorm apart.
"""


def render_sweep():
    """The table of RBN's weights and PowerNorm's warm-ups."""
    rows = [("placement", "norm", "λ or warm-up", "validation loss", "validation", "test", "TID of σ")]
    for path in sorted((FOLDER / "penalty").rglob("*.json")):
        result = read(path)
        given, history = result["arguments"], result["history"]
        varied = given.get("norm_options", {}).get("lambda_mean", given.get("norm_warmup_ratio"))
        tid = [entry["tid_var_avg"] for entry in history if "tid_var_avg" in entry]
        rows.append(
            (
                given["placement"],
                f"[{given['norm']}]({path.relative_to(FOLDER)})",
                "–" if varied is None else varied,
                f"{min(entry['eval_loss'] for entry in history if 'eval_loss' in entry):.3f}",
                f"{100 * result['metrics']['accuracy']:.1f}",
                f"{100 * result['metrics']['test_accuracy']:.1f}",
                f"{tid[-1]:.4f}" if tid else "–",
            )
        )
    rows[1:] = sorted(rows[1:], key=lambda row: (row[0], row[1].split("]")[0], row[2] if row[2] != "–" else 0))
    return SWEEP + "\n" + table(rows)


CONVERSIONS = """## conversion

Small models from scratch, all norms replaced after the training, by `benchmarks/conversion.py`. One model each; the
scores are of text, or images, that neither training nor calibration saw.
"""
POST_TRAINING = """## post-training

all-MiniLM-L6-v2, fine-tuned with LayerNorm, then all 13 norms replaced by BatchNorm without labels, by
`benchmarks/post_training.py`. `converted` is calibrated, `distilled` trained against the original for some two minutes
on one core after that, on the same training examples. Accuracy, F1 of entities on the test split, Spearman's rank
correlation × 100; `embeddings` is the model as it came. Differences are to the same model with its LayerNorms: their
mean, the 95 % interval over examples that each record has, averaged, and the lowest and the highest of the seeds.
`kept` is the share of predictions that stay, of entity tokens where there are entities; the mean cosine of embeddings;
for a regression, one minus the relative error. `divergence` is that of the predictions, on the split that is scored.
"""


def render_conversions():
    """The table of models that are converted after their training."""
    rows = [
        ("model", "score", "LayerNorm or RMSNorm", "calibrated on", "distilled", "after", "worse by"),
    ]
    for path in sorted((FOLDER / "conversion").rglob("*.json")):
        result = read(path)
        fit = result["calibration"]
        for metric, before in result["before"].items():
            rows.append(
                (
                    f"[{result['model']}]({path.relative_to(FOLDER)})",
                    metric.replace("_", " "),
                    f"{before:.4g}",
                    f"{fit['examples']} {fit['inputs']}",
                    f"{fit['distillation_steps']} steps" if fit["distillation_steps"] else "–",
                    f"{result['metrics'][metric]:.4g}",
                    f"{result['relative_loss_percent'][metric]:.1f} %",
                )
            )
    return CONVERSIONS + "\n" + table(rows)


def render_post_training():
    """The table of fine-tuned models, over their seeds."""
    heading = ("task", "seeds", "LayerNorm", "way", "examples", "norms", "score", "difference", "interval")
    rows = [(*heading, "lowest to highest", "kept", "divergence", "seconds")]
    for task, way, records in post_training():
        seeds = ", ".join(f"[{path.stem.rpartition('-')[2]}](post-training/{path.name})" for path in records)
        found = summarize(list(records.values()), way)
        columns = ("examples", "norms", "after", "change", "interval", "extremes", "kept", "kl", "seconds")
        rows.append((task, seeds, found["before"], way, *(found[name] for name in columns)))
    return POST_TRAINING + "\n" + table(rows)


INT8 = """## int8

What 8 bits cost in ONNX Runtime, by `benchmarks/int8.py`: accuracy on SST-2, the F1 of entities on WNUT-17, the
Spearman correlation of embeddings on STS-B. The error is that of the outputs against the same form in float32. The
time is that of a batch of 32 examples on one thread, in times of LayerNorm in float32.
"""


def render_int8():
    """The table of graphs in 8 bits."""
    rows = [("task", "form", "graph", "score", "error", "MB", "time")]
    for path in sorted((FOLDER / "int8").glob("*.json")):
        result = read(path)
        for row in result["rows"]:
            cells = (f"{row['score']:.2f}", f"{row['error']:.3f}", f"{row['megabytes']:.1f}")
            cells += ("{:.2f} ({:.2f} to {:.2f})".format(*row["time"]) if "time" in row else "",)
            rows.append((f"[{result['task']}]({path.relative_to(FOLDER)})", row["form"], row["graph"], *cells))
    return INT8 + "\n" + table(rows)


GRIDS = {
    "literature": """A BERT of 6 layers and width 128 from scratch on TREC, 10 epochs, post-norm, by
`benchmarks/evidence.py --grid benchmarks/literature.yaml`. One of three settings was chosen for each norm with another
seed. PRepBN is `repbn` with a progressive swap over the first half of the training. Accuracy on the test split, mean ±
standard deviation over three seeds, and paired differences with their 95 % intervals.
""",
    "removal": """Norms removed from a post-norm BERT of 12 layers and width 128, 300 steps from scratch on the Broad
Twitter Corpus, by `benchmarks/evidence.py --grid benchmarks/removal.yaml`. Mean ± standard deviation over three seeds,
on the test split.
""",
    "ngram": """A Marian of 2 + 2 layers and width 128 from scratch on Multi30k, German to English, 1,800 steps, one
seed, by `benchmarks/evidence.py --grid benchmarks/ngram.yaml`. A token of the target attends to the last N tokens
alone, itself among them. BLEU of beam search with four beams.
""",
}
NORMS = {
    "layernorm": "LayerNorm",
    "powernorm": "PowerNorm",
    "adanorm": "AdaNorm",
    "dyt": "DyT",
    "repbn": "PRepBN",
    "affine": "none",
    "weightnorm": "weight normalisation",
    "fixup": "Fixup",
}


def table_of_literature():
    """For the page of the norms."""
    rows = [("", "learning rate", "accuracy", "difference to LayerNorm")]
    results = load_results(sorted((FOLDER / "literature").glob("*/table/*.json")))
    rates = {result["norm"]: result["arguments"]["learning_rate"] for result in results}
    for row in compare_results(results, ["test_accuracy"], "layernorm").rows:
        score, change = row.metrics["test_accuracy"], ""
        if difference := row.differences.get("test_accuracy"):
            ends = (100 * value for value in (difference.mean, difference.low, difference.high))
            change = "{:+.1f} ({:+.1f} to {:+.1f})".format(*ends)
        accuracy = f"{100 * score.mean:.1f} ± {100 * score.std:.1f}"
        rows.append((NORMS[row.norm], f"{rates[row.norm]:g}", accuracy, change))
    return table(rows)


def table_of_removal():
    """For the page of the norms."""
    rows = [("norms", "learning rate", "F1 of entities", "training loss in the end")]
    groups = {}
    for result in load_results(sorted((FOLDER / "removal").rglob("*.json"))):
        groups.setdefault((result["norm"], result["arguments"]["learning_rate"]), []).append(result)
    for (norm, rate), results in groups.items():
        scores = [100 * result["metrics"]["test_f1"] for result in results]
        loss = mean([entry["loss"] for entry in result["history"] if "loss" in entry][-1] for result in results)
        rows.append((NORMS[norm], f"{rate:g}", f"{mean(scores):.1f} ± {stdev(scores):.1f}", f"{loss:.3g}"))
    return table(rows)


def table_of_ngram():
    """For the page of the recipes."""
    rows = [("N", "validation loss", "BLEU", "BLEU, test")]
    for result in load_results(sorted((FOLDER / "ngram").rglob("*.json"))):
        loss = [entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry][-1]
        scores = (f"{loss:.3f}", *(f"{result['metrics'][name]:.1f}" for name in ("bleu", "test_bleu")))
        rows.append((result["arguments"].get("ngram", "all"), *scores))
    rows[1:] = sorted(rows[1:], key=lambda row: (row[0] == "all", str(row[0])))
    return table(rows)


TABLES = {
    **FIGURES,
    **tables_calibration.TABLES,
    **tables_discrepancies.TABLES,
    **tables_evidence.TABLES,
    **tables_runs.TABLES,
    **tables_speed.TABLES,
    "literature": table_of_literature,
    "removal": table_of_removal,
    "ngram": table_of_ngram,
    **tables_folding.TABLES,
    **tables_regimes.TABLES,
}
ROOT = FOLDER.parent
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill(text):
    """The page `text` with its tables, and the figures in its sentences, made anew."""

    def make(found):
        name, *given = shlex.split(found[2])
        made = TABLES[name](*given)
        return f"{found[1]}\n\n{made}\n{found[3]}" if "\n" in made else found[1] + made + found[3]

    return re.sub(r"(<!-- results (.+?) -->).*?(<!-- end -->)", make, text, flags=re.DOTALL)


def render():
    """The whole page."""
    parts = [LEAD]
    for folder, about in RUNS.items():
        rows = [("task", "norm", "placement", "variant", "seeds", "metric", "score")]
        for (task, norm, placement, variant), paths in find_runs(folder).items():
            seeds = ", ".join(f"[{NAME.fullmatch(path.stem)['seed']}]({folder}/{path.name})" for path in paths)
            rows.append((task, norm, placement, variant, seeds, *show_scores(paths)))
        parts.append(f"## {folder}\n\n{about}\n\n{table(rows)}")
    grids = [f"## {folder}\n\n{about}\n{TABLES[folder]()}" for folder, about in GRIDS.items()]
    pages = [
        render_conversions(),
        render_post_training(),
        render_int8(),
        render_sweep(),
        *grids,
        OTHERS,
    ]
    return "\n".join([*parts, *pages])


if __name__ == "__main__":
    tables_discrepancies.draw()
    tables_evidence.draw()
    tables_speed.draw_scaling()
    (FOLDER / "README.md").write_text(render(), encoding="utf-8")
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
