"""
What a trained model keeps when all its norms are replaced after the training: its score, and its single predictions.

    python -m recipes.glue --task_name sst2 --model_name_or_path all-MiniLM-L6-v2 --output_dir ./runs/sst2-0 ...
    python benchmarks/post_training.py --runs ./runs --data_root ./data --output_dir results/post-training

Each folder of `--runs` is a model that a recipe has trained with LayerNorm; its name says task and seed. A copy is
converted with unlabelled training examples, scored on the split that the task is scored on, distilled with the same
examples, and scored again. A model of sentence embeddings, in a folder `embeddings-<seed>`, is not trained at all: the
seed is that of the sentences. Each folder leaves one JSON file, and its converted model, so that a later run only adds
what the file has not.
"""

import copy
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from scipy.stats import bootstrap, spearmanr
from seqeval.metrics.sequence_labeling import get_entities
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    HfArgumentParser,
)

from hf_normswap import convert_norms, distill
from hf_normswap.reporting.results import describe_environment, write_result


@dataclass(frozen=True)
class Task:
    """Where the examples of a task are, and what is scored."""

    dataset_name: str
    config: str | None
    columns: tuple[str, ...]
    split: str
    kind: str = "classes"  # or "regression", "entities", "embeddings"
    least_words: int = 1  # of a training example, where most are shorter than those to score

    @property
    def auto_class(self):
        of_kind = {"entities": AutoModelForTokenClassification, "embeddings": AutoModel}
        return of_kind.get(self.kind, AutoModelForSequenceClassification)


GLUE = "nyu-mll/glue"
PAIR = ("sentence1", "sentence2")
TASKS = {
    "sst2": Task(GLUE, "sst2", ("sentence",), "validation", least_words=10),
    "mrpc": Task(GLUE, "mrpc", PAIR, "validation"),
    "trec": Task("SetFit/TREC-QC", None, ("text",), "test"),
    "stsb": Task(GLUE, "stsb", PAIR, "validation", "regression"),
    "embeddings": Task(GLUE, "stsb", PAIR, "validation", "embeddings"),
    "wnut17": Task("leondz/wnut_17", None, ("tokens",), "test", "entities"),
    "btc": Task("strombergnlp/broad_twitter_corpus", None, ("tokens",), "test", "entities"),
}


@dataclass
class Arguments:
    runs: str = field(metadata={"help": "Folder of the trained models, <task>-<seed> each."})
    data_root: str = field(default="", metadata={"help": "Folder with data sets, laid out as on the Hub."})
    output_dir: str = field(default="outputs/post-training", metadata={"help": "Folder for the records."})
    models: str = field(default="", metadata={"help": "Folder for the converted models; in output_dir by default."})
    only: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks."})
    norm: str = field(default="batchnorm", metadata={"help": "The new norm."})
    examples: int = field(default=2048, metadata={"help": "Examples of the fit; a fourth of that is held out."})
    distill_steps: int = field(default=100, metadata={"help": "Steps of the distillation; 0 leaves it out."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of the distillation."})
    other_texts: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks whose texts, single sentences, one more conversion is fitted on, as many of each."},
    )
    budgets: list[float] = field(
        default_factory=list, metadata={"help": "Distances that one more conversion each may not exceed."}
    )


def texts_of(task, rows):
    """The examples as `convert_norms` takes them."""
    if task.kind == "entities":
        return [" ".join(words) for words in rows[task.columns[0]]]
    if task.kind == "embeddings":
        return list(dict.fromkeys(text for column in task.columns for text in rows[column]))
    texts = [tuple(texts) for texts in zip(*(rows[name] for name in task.columns), strict=True)]
    texts = [each for each in texts if len(" ".join(each).split()) >= task.least_words]
    return texts if len(task.columns) > 1 else [text for (text,) in texts]


def texts_of_others(names, args, seed):
    """As many sentences of one task as of another, in a random order."""
    count, found = round(1.25 * args.examples) // len(names), []
    for task in map(TASKS.get, names):
        rows = load_dataset(str(Path(args.data_root, task.dataset_name)), task.config, split="train")
        texts = texts_of(task, rows.shuffle(seed=seed).take(min(len(rows), 3 * count)))
        found += [text for each in texts for text in ([each] if isinstance(each, str) else each)][:count]
    random.Random(seed).shuffle(found)
    return found


@torch.inference_mode()
def predict(model, task, rows, tokenizer):
    """Logits of each example, those of the first piece of each word for entities; or an embedding of each sentence."""
    columns = [list(rows[name]) for name in task.columns]
    if task.kind == "embeddings":
        columns = [[text for column in columns for text in column]]
    words = {"is_split_into_words": True} if task.kind == "entities" else {}
    encoded = tokenizer(*columns, truncation=True, max_length=128, **words)
    sizes = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    found = [None] * len(order)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer.pad({name: [encoded[name][i] for i in chosen] for name in encoded}, return_tensors="pt")
        output = model(**batch)
        for index, row in enumerate(chosen):
            if task.kind == "embeddings":
                found[row] = output.last_hidden_state[index, : sizes[row]].mean(0)
            elif task.kind == "entities":
                pieces = encoded.word_ids(row)
                firsts = [at for at, word in enumerate(pieces) if word is not None and word != pieces[at - 1]]
                found[row] = output.logits[index, firsts]
            else:
                found[row] = output.logits[index]
    return found


def scorer(task, rows, predictions):
    """A function that returns the score, times 100, of the examples of some indices."""
    if task.kind == "entities":
        tags = rows.features["ner_tags"].feature.names
        counts = []
        for logits, row in zip(predictions, rows["ner_tags"], strict=True):
            found, true = (
                set(get_entities([tags[tag] for tag in each])) for each in (logits.argmax(-1), row[: len(logits)])
            )
            counts.append((2 * len(found & true), len(found) + len(true)))
        counts = np.array(counts)
        return lambda index: 100 * np.divide(*counts[index].sum(0))
    labels = np.array(rows["label"])
    if task.kind == "classes":
        right = torch.stack(predictions).argmax(-1).numpy() == labels
        return lambda index: 100 * right[index].mean()
    if task.kind == "embeddings":
        first, second = torch.stack(predictions).chunk(2)
        values = functional.cosine_similarity(first, second).numpy()
    else:
        values = torch.stack(predictions)[:, 0].numpy()
    return lambda index: 100 * spearmanr(values[index], labels[index]).statistic


def compare_scores(task, rows, ours, wanted):
    """Both scores, and the 95 % interval of their difference: a bootstrap over examples."""
    ours, theirs = scorer(task, rows, ours), scorer(task, rows, wanted)
    examples = np.arange(len(rows))
    found = bootstrap(
        (examples,),
        lambda index: ours(index) - theirs(index),
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=0,
    )
    return float(ours(examples)), float(theirs(examples)), [float(end) for end in found.confidence_interval]


def compare(task, predictions, wanted):
    """Shares of predictions that stay, in percent, or how near they stay."""
    ours, theirs = (
        torch.cat(each) if task.kind == "entities" else torch.stack(each) for each in (predictions, wanted)
    )
    figures = {"relative_error": ((ours - theirs).norm() / theirs.norm()).item()}
    if task.kind == "embeddings":
        return figures | {"cosine": functional.cosine_similarity(ours, theirs).mean().item()}
    if task.kind == "regression":
        return figures
    logs = ours.log_softmax(-1), theirs.log_softmax(-1)
    figures["kl"] = functional.kl_div(*logs, log_target=True, reduction="batchmean").item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    figures["agreement"] = 100 * same.mean().item()
    if task.kind == "entities":
        is_entity = theirs.argmax(-1) != 0
        figures["agreement_on_entities"] = 100 * same[is_entity].mean().item()
    return figures


def measure(folder, args, path):
    """Converts the model of one folder in each way that the record at `path` lacks; `None` if it lacks none."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ways = {way: options for way, options in ways_of(args).items() if way not in known.get("conversions", {})}
    if not ways:
        return None
    name, _, seed = folder.name.rpartition("-")
    task, seed = TASKS[name], int(seed)
    data = load_dataset(str(Path(args.data_root, task.dataset_name)), task.config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = task.auto_class.from_pretrained(folder).eval()
    rows, texts = data[task.split], texts_of(task, data["train"].shuffle(seed=seed))
    chosen = texts[: round(1.25 * args.examples)]
    wanted = predict(original, task, rows, tokenizer)
    record = known or {
        "task": name,
        "model": f"{original.config.model_type}-{original.config.num_hidden_layers}x{original.config.hidden_size}",
        "norm": args.norm,
        "seed": seed,
        "metrics": {},
        "conversions": {},
    }

    def note(way, model, start, **options):
        seconds, found = time.perf_counter() - start, predict(model, task, rows, tokenizer)
        record["metrics"][way], record["metrics"]["before"], interval = compare_scores(task, rows, found, wanted)
        figures = {"examples": len(chosen), "seconds": round(seconds), **compare(task, found, wanted)}
        record["conversions"][way] = {**options, **figures, "interval_of_difference": interval}

    converted = Path(args.models or path.parent / "models", folder.name)
    for way, options in ways.items():
        if way == "distilled":
            model, start = task.auto_class.from_pretrained(converted).eval(), time.perf_counter()
            distill(model, original, chosen, tokenizer=tokenizer, seed=seed, **options)
            note(way, model, start, **options)
            continue
        texts = texts_of_others(args.other_texts, args, seed) if way.startswith("texts of") else chosen
        model, start = copy.deepcopy(original), time.perf_counter()
        report = convert_norms(model, texts, args.norm, tokenizer=tokenizer, seed=seed, **options)
        worst = min(norm.r2 for norm in report.norms)
        note(way, model, start, **options, norms=len(report.norms), kept=report.kept, worst_r2=worst)
        if way == "converted":
            model.save_pretrained(converted)
    places = ("runs", "data_root", "output_dir", "models", "only")
    options = {name: value for name, value in vars(args).items() if name not in places}
    return record | {"arguments": options, **describe_environment()}


def ways_of(args):
    """The conversions that the arguments ask for, by name, with their options."""
    ways = {"converted": {}}
    if args.distill_steps:
        ways["distilled"] = {"steps": args.distill_steps, "learning_rate": args.learning_rate}
    if args.other_texts:
        ways[f"texts of {', '.join(args.other_texts)}"] = {}
    return ways | {f"budget {budget:g}": {"budget": budget} for budget in args.budgets}


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    for folder in sorted(Path(args.runs).iterdir()):
        name, _, seed = folder.name.rpartition("-")
        path = Path(args.output_dir, f"{folder.name}.json")
        is_whole = name == "embeddings" or (folder / "result.json").exists()
        if name not in args.only or not seed.isdigit() or not is_whole:
            continue
        record = measure(folder, args, path)
        if record is None:
            continue
        write_result(record, path)
        print(folder.name, json.dumps(record["metrics"]), json.dumps(record["conversions"]), flush=True)


if __name__ == "__main__":
    main()
