"""
What calibration keeps of fine-tuned classifiers: accuracy, and the share of predictions that stay as they were.

    python benchmarks/calibration.py --models ./outputs/sst2-layernorm-0 ./outputs/sst2-layernorm-1

Each model, fine-tuned on SST-2 with LayerNorm, is converted in several ways, from unlabelled sentences of the training
split alone, and scored on the whole validation split. A JSON file holds the figures of every model.
"""

import copy
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from hf_normswap import calibrate, distill, fold_norms, make_batches, restore_norm, swap_norm
from hf_normswap.reporting.results import describe_environment


@dataclass
class Arguments:
    models: list[str] = field(metadata={"help": "Folders of fine-tuned models."})
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "GLUE on the Hub, or a folder like it."})
    output_file: str = field(default="outputs/calibration.json", metadata={"help": "Where the figures go."})
    norm: str = field(default="batchnorm", metadata={"help": "Norm to swap in."})
    sentences: list[int] = field(default_factory=lambda: [256, 1024], metadata={"help": "Sentences to calibrate on."})
    seconds: float = field(default=120.0, metadata={"help": "Time of the distillation, about."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of sentences."})


@torch.no_grad()
def predict(model, data, tokenizer):
    """Logits for the sentences of `data`, in their order."""
    order = sorted(range(len(data)), key=lambda index: len(data[index]["sentence"]))
    batches = make_batches(model, [data[index]["sentence"] for index in order], tokenizer)
    logits = torch.cat([model(**batch).logits for batch in batches])
    return logits[torch.tensor(order).argsort()]


def swapped(original, norm):
    model = copy.deepcopy(original)
    if hasattr(model.config, "norm_swap"):  # the LayerNorm baseline of the recipes
        restore_norm(model)
    return swap_norm(model, norm, where="all")


def convert(original, texts, tokenizer, args):
    """Yields `(way, sentences, model, seconds)` of each conversion."""

    def calibrated(count, **options):
        model, start = swapped(original, args.norm), time.perf_counter()
        calibrate(model, texts[:count], tokenizer=tokenizer, **options)
        return model, time.perf_counter() - start

    yield "naive swap", 0, swapped(original, args.norm), 0.0
    yield "norms alone", args.sentences[0], *calibrated(args.sentences[0], linears=False)
    for count in args.sentences:
        model, seconds = calibrated(count)
        yield "calibrated", count, model, seconds
        if count == args.sentences[0]:
            distilled, folded = copy.deepcopy(model), copy.deepcopy(model)
            start = time.perf_counter()
            fold_norms(folded)
            yield "calibrated and folded", count, folded, time.perf_counter() - start
    start = time.perf_counter()
    distill(copy.deepcopy(distilled), original, texts, tokenizer=tokenizer, steps=5)
    steps = int(args.seconds / (time.perf_counter() - start) * 5)
    for trained, linears, learning_rate in (("norms alone", False, 3e-3), ("norms and linear layers", True, 1e-4)):
        model, start = copy.deepcopy(distilled), time.perf_counter()
        options = {"linears": linears, "steps": steps, "learning_rate": learning_rate}
        distill(model, original, texts[: 32 * steps], tokenizer=tokenizer, **options)
        way = f"calibrated, {trained} distilled in {steps} steps"
        yield way, args.sentences[0], model, time.perf_counter() - start


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    data = load_dataset(args.dataset_name, "sst2")
    # Training examples are phrases, those of the validation split sentences: these are nearer to them.
    sentences = data["train"].filter(lambda row: row["sentence"].rstrip().endswith("."))
    texts = list(sentences.shuffle(seed=args.seed)["sentence"])
    labels = torch.tensor(data["validation"]["label"])
    rows = []
    for path in args.models:
        tokenizer = AutoTokenizer.from_pretrained(path)
        original = AutoModelForSequenceClassification.from_pretrained(path).eval()
        wanted = predict(original, data["validation"], tokenizer)
        before = (wanted.argmax(-1) == labels).float().mean().item()
        for way, count, model, seconds in convert(original, texts, tokenizer, args):
            logits = predict(model, data["validation"], tokenizer)
            rows.append(
                {
                    "model": Path(path).name,
                    "way": way,
                    "sentences": count,
                    "accuracy_before": before,
                    "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
                    "agreement": (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
                    "logits_error": ((logits - wanted).norm() / wanted.norm()).item(),
                    "seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    facts = {"norm": args.norm, "seed": args.seed, "rows": rows, **describe_environment()}
    Path(args.output_file).write_text(json.dumps(facts, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
