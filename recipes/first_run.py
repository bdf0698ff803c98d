"""
A first run that needs no network and no data: four norms in a small BERT, trained from scratch, a few seeds each.

    python -m recipes.first_run

The text is the language reference that comes with every Python, and the task is to tell which of its topics a sentence
is from. The folder `first_run/` then holds one result for each run, the learning curves, and the PowerNorm model.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.progress import Progress
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments, get_norm, swap_norm
from hf_normswap.diagnostics.plots import plot_curves
from hf_normswap.reporting.results import compare_results, write_result
from recipes.common import make_result, one_sentence_errors, parse_arguments
from recipes.topics import TOPICS, load_data, score_baselines


MAX_LENGTH = 32
TRAINING = {
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
    # The run is short: with the default tenth of it PowerNorm's statistics are barely settled.
    "norm_warmup_ratio": 0.5,
}
EXAMPLE = "Set a breakpoint at the first line of the function, then step through it."


@dataclass
class FirstRunArguments:
    output_dir: str = field(default="first_run", metadata={"help": "Folder for results, curves and model."})
    norms: list[str] = field(
        default_factory=lambda: ["layernorm", "batchnorm", "rbn", "powernorm"],
        metadata={"help": "Norms to compare; the model of the last one is saved."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the runs of each norm."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Passes over the training sentences in each run."})


def train_tokenizer(texts):
    # The trainer breaks ties by id, and numbers what it meets in another order each time: number the characters first.
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    first += [f"##{character}" for character in sorted(set("".join(texts).lower()))]
    backend = BertTokenizer().backend_tokenizer
    backend.train_from_iterator(texts, WordPieceTrainer(vocab_size=2000, special_tokens=first, show_progress=False))
    return BertTokenizer(vocab=backend.get_vocab(), model_max_length=MAX_LENGTH)


def new_model(norm, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,  # 0.02 is for models eight times as wide
        id2label=dict(enumerate(TOPICS)),
        label2id={topic: label for label, topic in enumerate(TOPICS)},
    )
    return swap_norm(BertForSequenceClassification(config), norm)


class ShowProgress(TrainerCallback):
    def __init__(self, progress, bar):
        self.progress, self.bar = progress, bar

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(self.bar, 1 / state.max_steps)


def train(norm, seed, data, tokenizer, args, callback):
    """Trains one model; the same seed gives all norms the same initial weights and the same batches."""
    set_seed(seed)
    trainer = NormSwapTrainer(
        new_model(norm, tokenizer),
        NormSwapTrainingArguments(
            args.output_dir,
            seed=seed,
            num_train_epochs=args.num_train_epochs,
            per_device_eval_batch_size=128,
            eval_strategy="epoch",
            logging_steps=10,
            save_strategy="no",
            use_cpu=True,  # results that do not depend on the accelerator at hand
            disable_tqdm=True,
            log_level="error",
            **TRAINING,
        ),
        train_dataset=data["train"],
        eval_dataset=data["dev"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda dev: {"accuracy": float(np.mean(dev.predictions.argmax(-1) == dev.label_ids))},
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def above_majority(results, examples):
    """Says by how many standard errors the norms beat the majority class; seeds and dev sentences both vary."""
    margins = {}
    for norm in dict.fromkeys(result["norm"] for result in results):
        scores = [result["metrics"]["accuracy"] for result in results if result["norm"] == norm]
        mean = np.mean(scores)
        variance = mean * (1 - mean) / examples + (np.var(scores, ddof=1) / len(scores) if len(scores) > 1 else 0)
        margins[norm] = (mean - results[0]["baselines"]["majority class"]) / max(variance, 1e-12) ** 0.5
    worst = min(margins, key=margins.get)
    return f"Nearest to the majority class is {worst}, {margins[worst]:.1f} standard errors above it."


def predict(model, tokenizer, text):
    model.eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def main(argv=None):
    with one_sentence_errors():
        args, _ = parse_arguments([FirstRunArguments], argv)
        saved = [get_norm(norm).norm_name for norm in args.norms][-1]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)  # more do not make so small a model faster, and would change its last digits
    console, output = Console(), Path(args.output_dir)

    splits = dict(zip(("train", "dev"), load_data()))
    baselines = score_baselines(**splits)
    tokenizer = train_tokenizer(splits["train"]["text"][:])
    data = {
        name: split.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
        for name, split in splits.items()
    }
    print(
        f"{len(data['train'])} sentences to train on, {len(data['dev'])} to score, {len(TOPICS)} topics of the Python "
        "language reference."
    )

    arguments = {
        "dataset_name": "pydoc_data.topics",
        "train_examples": len(data["train"]),
        "eval_examples": len(data["dev"]),
        "num_train_epochs": args.num_train_epochs,
        "max_length": MAX_LENGTH,
        **TRAINING,
    }
    results = []
    runs = [(norm, seed) for norm in args.norms for seed in args.seeds]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(runs))
        for norm, seed in runs:
            progress.update(bar, description=f"{norm}, seed {seed}")
            trainer = train(norm, seed, data, tokenizer, args, ShowProgress(progress, bar))
            accuracy = trainer.predict(data["dev"]).metrics["test_accuracy"]
            progress.console.print(f"{norm}, seed {seed}: accuracy {accuracy:.3f}")
            result = make_result("python-topics", "bert-2x96", trainer, {"accuracy": accuracy}, arguments)
            results.append(result | {"baselines": baselines})
            write_result(results[-1], output / "results" / f"{result['norm']}-{seed}.json")
            if (norm, seed) == (args.norms[-1], args.seeds[0]):
                trainer.save_model(output / saved)
                expected = predict(trainer.model, tokenizer, EXAMPLE)

    compare_results(results).show()
    print(above_majority(results, len(data["dev"])))
    plot_curves(results).savefig(output / "curves.png", dpi=150)

    model = AutoModelForSequenceClassification.from_pretrained(output / saved)
    logits = predict(model, AutoTokenizer.from_pretrained(output / saved), EXAMPLE)
    torch.testing.assert_close(logits, expected)
    topic = model.config.id2label[int(logits.argmax())]
    print(f'The saved {saved} model, loaded again, says of "{EXAMPLE}": {topic}.')
    print(f"Results, curves and model are in {output}.")


if __name__ == "__main__":
    main()
