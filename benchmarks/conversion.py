"""
What it costs to replace all norms of a trained model by calibration alone, in one family of models.

    python benchmarks/conversion.py --family gpt2
    python benchmarks/conversion.py --family marian --dataset_name path/to/multi30k --norms batchnorm --examples 1024

Trains a small model with LayerNorm from scratch on real text, once: a later run finds it in the output folder. Then
each norm takes the place of all LayerNorms of a copy, calibrated on some training examples, and once distilled against
the original too. The copy is scored as the original was. Every conversion leaves a JSON file, and all of them make a
table.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from datasets import load_dataset
from families import DIGITS, FAMILIES, digits
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from hf_normswap import distill, swap_norm
from hf_normswap.reporting.results import describe_environment, write_result


HIGHER_IS_BETTER = {"accuracy", "bleu"}


@dataclass
class Arguments:
    family: str = dataclasses.field(metadata={"help": "Family of the model.", "choices": list(FAMILIES)})
    dataset_name: str | None = HfArg(help="Data set of the Hub, or a local folder laid out like one.", default=None)
    output_dir: str = HfArg(help="Folder for models and results.", default="outputs/conversion")
    norms: list[str] = HfArg(help="Norms to swap in.", default_factory=lambda: ["batchnorm", "powernorm"])
    examples: list[int] | None = HfArg(
        help="How many examples to calibrate on, one run for each number.", default=None
    )
    distillation_steps: int = HfArg(help="Steps of distillation of one more conversion; 0 is none.", default=400)
    seed: int = HfArg(help="Seed of the training, the masks and the examples.", default=0)
    vocab_size: int = HfArg(help="Size of the vocabulary.", default=6000)
    hidden_size: int = HfArg(help="Width of the model.", default=192)
    heads: int = HfArg(help="Attention heads.", default=4)
    layers: int | None = HfArg(
        help="Layers, of encoder and decoder each; those of the family if not given.", default=None
    )
    batch_size: int | None = HfArg(
        help="Sequences in a training step; those of the family if not given.", default=None
    )
    max_steps: int | None = HfArg(help="Training steps; those of the family if not given.", default=None)
    learning_rate: float = HfArg(help="Largest learning rate.", default=1e-3)
    bf16: bool = HfArg(help="Train under bf16 autocast; scores are in float32 always.", default=True)

    def __post_init__(self):
        for name, value in FAMILIES[self.family][1].items():
            setattr(self, name, getattr(self, name) or value)
        self.folder = Path(self.output_dir, self.family)
        self.record = self.folder / "training.json"  # written last: where it is, the model is whole

    def of_training(self):
        """The options that decide what the trained model is."""
        options = dataclasses.asdict(self) | {"dataset_name": Path(self.dataset_name).name}
        return {
            name: options[name]
            for name in options
            if name not in ("output_dir", "norms", "examples", "distillation_steps")
        }


def train(task, args):
    """Trains a model with LayerNorm and saves it, unless that was done before."""
    if not args.record.exists():
        set_seed(args.seed)
        options = TrainingArguments(
            args.folder,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            adam_beta2=0.98,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length" if task.tokenizer else "random",
            logging_steps=50,
            save_strategy="no",
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=True,  # scores that do not depend on the accelerator at hand
        )
        config = task.model_class.config_class(
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            attn_implementation="eager",  # on short sequences the fastest on a CPU
            **task.config,
        )
        for name in {"initializer_range", "init_std"} & set(vars(config)):
            setattr(config, name, 0.02 * math.sqrt(768 / args.hidden_size))  # 0.02 is for a width of 768
        model = task.model_class(config)
        trainer = Trainer(model, options, task.collator, task.train, processing_class=task.tokenizer)
        trainer.train()
        trainer.save_model()
        args.record.write_text(json.dumps({"arguments": args.of_training(), "history": trainer.state.log_history}))
    if json.loads(args.record.read_text())["arguments"] != args.of_training():
        raise SystemExit(f"error: {args.folder} holds a model of other options: give another --output_dir.")


def relative_loss(before, after):
    """By how much each score got worse, in percent of what it was."""
    rise = {name: 100 * (after[name] - before[name]) / (before[name] or math.nan) for name in before}
    return {name: -percent if name in HIGHER_IS_BETTER else percent for name, percent in rise.items()}


def convert(task, args, norm, kind, count, steps, before):
    """Converts a copy of the trained model, scores it, and returns the record."""
    model = task.model_class.from_pretrained(args.folder)
    rows = task.inputs[kind].select(range(min(count, len(task.inputs[kind]))))
    start = time.perf_counter()
    swap_norm(model, norm, where="all", calibrate_on=rows, tokenizer=task.tokenizer)
    if steps:
        teacher, texts = task.model_class.from_pretrained(args.folder), task.inputs[kind]
        options = {"steps": steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate / 2}
        distill(model, teacher, texts, tokenizer=task.tokenizer, **options)
    seconds = time.perf_counter() - start
    after, swapped = task.score(model), model.config.norm_swap
    return {
        "task": args.of_training()["dataset_name"],
        "model": f"{args.family}-{args.layers}x{args.hidden_size}",
        "norm": swapped["norms"][0]["norm"],
        "seed": args.seed,
        "metrics": after,
        "before": before,
        "relative_loss_percent": relative_loss(before, after),
        "worst_r2": min(swapped["calibration"].values()),
        "calibration": {
            "examples": len(rows),
            "inputs": kind,
            "distillation_steps": steps,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
        },
        "norm_swap": swapped,
        "arguments": args.of_training(),
        **describe_environment(),
    }


def table(results):
    """The results in GitHub's Markdown."""
    before = results[0]["before"]
    lines = [["norm", "calibrated on", "worst R²", "seconds"], ["layernorm", "–", "–", "–"]]
    for name, value in before.items():
        lines[0] += [name.replace("_", " "), "worse by"]
        lines[1] += [f"{value:.3f}", "–"]
    for result in results:
        calibration = result["calibration"]
        inputs = f"{calibration['examples']} {calibration['inputs']}"
        if calibration["distillation_steps"]:
            inputs += f", {calibration['distillation_steps']} steps of distillation"
        lines.append([result["norm"], inputs, f"{result['worst_r2']:.3f}", f"{calibration['seconds']:.0f}"])
        for name, percent in result["relative_loss_percent"].items():
            lines[-1] += [f"{result['metrics'][name]:.3f}", f"{percent:.2f} %"]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    data = digits() if args.dataset_name == DIGITS else load_dataset(args.dataset_name)
    task = FAMILIES[args.family][0](data, args)
    train(task, args)
    before = task.score(task.model_class.from_pretrained(args.folder))
    usual, *others = task.inputs
    middle = sorted(args.examples)[len(args.examples) // 2]
    ways = [*product([usual], args.examples, [0]), *product(others, [middle], [0])]
    ways.append((usual, middle, args.distillation_steps))
    results = []
    for norm, (kind, count, steps) in product(args.norms, dict.fromkeys(ways)):
        results.append(convert(task, args, norm, kind, count, steps, before))
        distilled = "-distilled" if steps else ""
        count = results[-1]["calibration"]["examples"]
        name = f"{results[-1]['norm']}-{kind.replace(' ', '-')}-{count}{distilled}.json"
        write_result(results[-1], args.folder / "results" / name)
    print(table(results))


if __name__ == "__main__":
    main()
