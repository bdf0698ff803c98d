"""
A first run that needs no network and no data: four norms in a small BERT, trained from scratch, a few seeds each.

    python recipes/first_run.py

The text is the language reference that comes with every Python, and the task is to tell which of its topics a sentence
is from. The folder `first_run/` then holds one result for each run, the learning curves, and the PowerNorm model.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics as PAGES

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars
from rich.console import Console
from rich.progress import Progress
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
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

from common import make_result, one_sentence_errors, parse_arguments
from hf_normswap import NormSwapTrainer, NormSwapTrainingArguments, get_norm, swap_norm
from hf_normswap.plots import plot_curves
from hf_normswap.results import compare_results, write_result


# Which pages make a topic. Pages that are part of a longer one are left out, and so are those of a few lines.
TOPICS = {
    "special methods": ["specialnames"],
    "compound statements": ["compound"],
    "simple statements": ["assert", "assignment", "global", "import", "nonlocal", "pass", "raise", "return", "yield"],
    "expressions": ["binary", "booleans", "calls", "comparisons", "operator-summary", "slicings", "subscriptions"],
    "types": ["types", "objects"],
    "debugger": ["debugger"],
    "string methods": ["string-methods"],
    "string formatting": ["formatstrings"],
    "sequences": ["typesseq"],
    "mappings": ["typesmapping"],
    "names": ["execmodel", "identifiers"],
}
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


def paragraphs(page):
    """Yields the prose of a page, a list of sentences for each paragraph."""
    page = re.sub(r"^.*\n *[*=\-~^]{3,}$", "", page, flags=re.MULTILINE)  # a heading names the topic
    for block in re.split(r"\n\s*\n", page):
        if "::=" in block or ">>>" in block or block.lstrip().startswith(("+", "|")):  # grammar, code, tables
            continue
        text = re.sub(r'\[\d+\]|[*"“”]', "", " ".join(block.split()))
        text = re.sub(r"^(\d+\.|-|Note:|Warning:)\s+", "", text)
        yield [
            sentence
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
            if re.match(r"[A-Z].*\.$", sentence)
            and len(re.findall(r"[A-Za-z]{2,}", sentence)) >= 6
            and not re.match(r"(New|Changed|Added|Deprecated) (in|since)|See also", sentence)
        ]


def load_data():
    """
    Returns the training and the dev sentences. No paragraph is in both, and no sentence of one is a near-duplicate of
    one of the other: the reference repeats itself often, word for word or with another name in the same sentence.
    """
    rng = random.Random(0)
    rows = []
    for label, pages in enumerate(TOPICS.values()):
        for page in pages:
            for paragraph in paragraphs(PAGES.get(page, "")):
                split = "dev" if rng.random() < 0.25 else "train"
                rows += [(sentence, label, split) for sentence in paragraph]
    texts, labels, splits = map(np.array, zip(*rows))

    words = CountVectorizer(binary=True, token_pattern="[a-z]+", dtype=float).fit_transform(texts)
    shared = (words @ words.T).toarray()
    counts = shared.diagonal()
    near = shared / (counts[:, None] + counts - shared) >= 0.6
    # Of near-duplicates under one topic the first stays, of those under several topics none.
    keep = ~(np.tril(near, -1) | (near & (labels[:, None] != labels))).any(axis=1)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TOPICS))})
    for split in ("train", "dev"):
        chosen = keep & (splits == split)
        yield Dataset.from_dict({"text": texts[chosen].tolist(), "label": labels[chosen].tolist()}, features)


def score_baselines(train, dev):
    majority = np.bincount(train["label"]).argmax()
    words = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
    words.fit(train["text"], train["label"])
    return {
        "majority class": float(np.mean(np.array(dev["label"]) == majority)),
        "TF-IDF + logistic regression": float(words.score(dev["text"], dev["label"])),
    }


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
