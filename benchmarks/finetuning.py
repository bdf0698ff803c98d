"""
Whether fine-tuning with swapped norms is as good as with LayerNorm: differences in accuracy with paired intervals.

    python benchmarks/finetuning.py --runs ./outputs/glue

Reads every run of `recipes.glue` below the folders, loads its model, and predicts the validation split once more.
Runs of one norm, made in one way, are compared with the LayerNorm runs of the same task and seeds, example by example.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

import hf_normswap  # noqa: F401 (enters the swapped models in the Auto classes)
from hf_normswap.reporting.results import describe_environment


RESAMPLES = 10_000


@dataclass
class Arguments:
    runs: list[str] = field(metadata={"help": "Folders with runs in them, at any depth."})
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "GLUE on the Hub, or a folder like it."})
    output_file: str = field(default="outputs/finetuning.json", metadata={"help": "Where the figures go."})
    seed: int = field(default=0, metadata={"help": "Seed of the resampling."})


def describe_way(arguments):
    """How the norms came into the model."""
    if arguments.get("progressive"):
        return "progressive"
    return "calibrated" if arguments.get("calibrate") else "naive"


@torch.inference_mode()
def find_correct(folder, rows):
    """Whether the model in `folder` is right, one boolean for each of `rows`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    columns = [name for name in rows.column_names if name not in ("label", "idx")]
    encoded = tokenizer(*(list(rows[name]) for name in columns), truncation=True, max_length=128)
    order = sorted(range(len(rows)), key=lambda index: len(encoded["input_ids"][index]))
    predicted = np.empty(len(rows), dtype=int)
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        batch = tokenizer.pad(
            {name: [values[i] for i in chosen] for name, values in encoded.items()}, return_tensors="pt"
        )
        predicted[chosen] = model(**batch).logits.argmax(-1)
    return predicted == np.array(rows["label"])


def resample(differences, generator):
    """Means of resampled `differences`, of shape `(seeds, examples)`: both are drawn anew, with replacement."""
    seeds, examples = differences.shape
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = differences[generator.integers(seeds, size=seeds)].mean(0)
        means[index] = drawn[generator.integers(examples, size=examples)].mean()
    return means


def make_row(task, way, differences, means, **more):
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return {
        "task": task,
        "norm": way[0],
        "way": way[1],
        "difference": 100 * float(np.mean([values.mean() for values in differences])),
        "interval": [float(low), float(high)],
        **more,
    }


def compare(correct, seed):
    """One row for each task, norm and way, and one over all tasks where a way was taken in several."""
    generator, rows, over_tasks = np.random.default_rng(seed), [], defaultdict(list)
    for (task, *way), runs in sorted(correct.items()):
        baseline = correct.get((task, "layernorm", "naive"), {})
        if way[0] == "layernorm" or not (seeds := sorted(runs.keys() & baseline.keys())):
            continue
        differences = np.stack([runs[s].astype(float) - baseline[s] for s in seeds])
        means = resample(differences, generator)
        over_tasks[tuple(way)].append((differences, means))
        accuracy = {str(s): 100 * float(runs[s].mean()) for s in seeds}
        reference = {str(s): 100 * float(baseline[s].mean()) for s in seeds}
        rows.append(make_row(task, way, [differences], means, accuracy=accuracy, layernorm=reference))
    for way, parts in over_tasks.items():
        if len(parts) > 1:
            differences, means = zip(*parts, strict=True)
            rows.append(make_row("all", way, differences, np.mean(means, axis=0)))
    return rows


def table(rows):
    """The rows in GitHub's Markdown."""
    lines = [
        "| task | norm | way | LayerNorm | accuracy | difference | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = [
            ", ".join(f"{value:.1f}" for value in row.get(name, {}).values()) for name in ("layernorm", "accuracy")
        ]
        cells = [row["task"], row["norm"], row["way"], *scores, f"{row['difference']:+.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['interval'][0]:+.2f} to {row['interval'][1]:+.2f} |")
    return "\n".join(lines)


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    correct, splits = defaultdict(dict), {}
    paths = sorted(path for folder in args.runs for path in Path(folder).rglob("result.json"))
    for path in tqdm(paths, "Predicting"):
        result = json.loads(path.read_text(encoding="utf-8"))
        task = result["task"]
        if task not in splits:
            splits[task] = load_dataset(args.dataset_name, task, split="validation")
        way = (task, result["norm"], describe_way(result["arguments"]))
        if result["seed"] in correct[way]:
            raise SystemExit(f"error: {path} is the second run of {way} with seed {result['seed']}: leave one out.")
        correct[way][result["seed"]] = find_correct(path.parent, splits[task])
    rows = compare(correct, args.seed)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output_file).write_text(json.dumps({"rows": rows, **describe_environment()}, indent=2), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
