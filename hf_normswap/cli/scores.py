"""Scores of a model on labelled examples, before a conversion and after it."""

import argparse
from collections.abc import Callable

from .data import count


METRICS = ("accuracy", "spearman", "seqeval", "perplexity", "bleu")
_LABELS = {"accuracy": ("label", "labels"), "spearman": ("label", "labels", "score"), "seqeval": ("ner_tags", "tags")}


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what [`make_score`] takes."""
    parser.add_argument(
        "--score",
        choices=METRICS,
        help="metric of the model before and after, on labelled examples of --dataset_name: accuracy; Spearman's rank "
        "correlation of a regression, or of the cosine of two embeddings; F1 of entities; perplexity; BLEU",
    )
    parser.add_argument("--score_split", metavar="SPLIT", help="split to score on (default: validation)")
    parser.add_argument("--score_examples", type=count, metavar="N", help="its first examples (default: all)")
    parser.add_argument("--label_column", metavar="COLUMN", help="column of the labels (default: found by its name)")


def make_score(args: argparse.Namespace, tokenizer) -> Callable | None:
    """A function that returns the score of a model by name; `None` if none is asked for.

    Raises:
        ValueError: when there are no labelled examples for the metric.
    """
    given = [name for name in ("score_split", "score_examples", "label_column") if getattr(args, name)]
    if args.score is None:
        if given:
            raise ValueError(f"{given[0]} is for a score: pass --score too.")
        return None
    if args.dataset_name is None:
        raise ValueError("A score needs labelled examples: pass --dataset_name with --score.")
    rows = _read_rows(args)
    if args.score == "seqeval":
        return lambda model: _score_entities(model, rows, tokenizer, args)
    score = {
        "accuracy": _score_accuracy,
        "spearman": _score_ranks,
        "perplexity": _score_perplexity,
        "bleu": _score_translations,
    }[args.score]
    texts, labels = _texts_of(args, rows), rows[_label_column(args, rows)] if args.score in _LABELS else None
    # In the order of `make_batches`, so that predictions and labels stay together.
    order = sorted(range(len(texts)), key=lambda index: _length(texts[index]))
    texts, labels = [texts[index] for index in order], labels and [labels[index] for index in order]
    return lambda model: {args.score: score(model, texts, labels, tokenizer, args.batch_size)}


def _read_rows(args):
    from datasets import load_dataset

    from .checkpoints import reading

    split = args.score_split or "validation"
    with reading(f"The split {split} of {args.dataset_name}"):
        rows = load_dataset(args.dataset_name, args.dataset_config_name, split=split)
    if "translation" in rows.column_names:
        rows = rows.from_list(rows["translation"])
    return rows.take(min(args.score_examples, len(rows))) if args.score_examples else rows


def _label_column(args, rows) -> str:
    names = [args.label_column] if args.label_column else _LABELS[args.score]
    found = next((name for name in names if name in rows.column_names), None)
    if found is None:
        raise ValueError(
            f"{args.dataset_name} has columns {', '.join(rows.column_names)}, and none of labels for "
            f"{args.score}: say which with --label_column."
        )
    if args.score == "accuracy" and not all(isinstance(label, int) and label >= 0 for label in rows[found]):
        raise ValueError(f"The column {found} has labels that are no numbers of classes: score a labelled split.")
    return found


def _texts_of(args, rows) -> list:
    names = args.columns or [
        name for name in rows.column_names if getattr(rows.features[name], "dtype", "") == "string"
    ]
    if len(names) not in (1, 2):
        raise ValueError(
            f"{args.dataset_name} has columns {', '.join(rows.column_names)}: name the texts by --columns."
        )
    columns = [rows[name] for name in names]
    return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))


def _length(text) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))


def _outputs(model, texts, tokenizer, batch_size):
    """Batches in the order of the texts, and what the model returns for them."""
    import torch

    from hf_normswap import make_batches
    from hf_normswap.core.model_state import run_model

    for batch in make_batches(model, texts, tokenizer, batch_size):
        with torch.no_grad():
            yield batch, run_model(model, batch)


def _score_accuracy(model, texts, labels, tokenizer, batch_size) -> float:
    found = [
        row.argmax().item() for _, output in _outputs(model, texts, tokenizer, batch_size) for row in output.logits
    ]
    return 100 * sum(one == other for one, other in zip(found, labels, strict=True)) / len(labels)


def _score_ranks(model, texts, labels, tokenizer, batch_size) -> float:
    from torch.nn import functional

    from hf_normswap.metrics import GlueMetric

    def embed(texts):
        vectors = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        chosen = iter(order)
        for batch, output in _outputs(model, [texts[index] for index in order], tokenizer, batch_size):
            mask = batch["attention_mask"][..., None].to(output.last_hidden_state.device)
            for vector in (output.last_hidden_state * mask).sum(1) / mask.sum(1):
                vectors[next(chosen)] = vector
        return vectors

    if model.base_model is model and not isinstance(texts[0], str):
        pairs = zip(*(embed([pair[side] for pair in texts]) for side in (0, 1)), strict=True)
        found = [functional.cosine_similarity(*pair, dim=0).item() for pair in pairs]
    elif model.base_model is not model and model.config.num_labels == 1:
        found = [row.item() for _, output in _outputs(model, texts, tokenizer, batch_size) for row in output.logits]
    else:
        raise ValueError(
            f"A {type(model).__name__} makes neither one number of a text nor embeddings of a pair: choose another "
            "--score."
        )
    return 100 * GlueMetric("stsb").compute(predictions=found, references=labels)["spearmanr"]


def _score_perplexity(model, texts, labels, tokenizer, batch_size) -> float:
    import math

    import torch

    from hf_normswap import make_batches
    from hf_normswap.core.model_state import run_model

    total = tokens = 0
    for batch in make_batches(model, texts, tokenizer, batch_size):
        predicted = batch.get("labels")
        if predicted is None:  # the next token of each
            mask = batch["attention_mask"]
            batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)
            predicted = batch["labels"][:, 1:]
        number = (predicted != -100).sum().item()
        if number:
            with torch.no_grad():
                total, tokens = total + run_model(model, batch).loss.item() * number, tokens + number
    if not tokens:
        raise ValueError("The examples to score have no token that the model predicts: choose a longer split.")
    return math.exp(total / tokens)


def _score_translations(model, texts, labels, tokenizer, batch_size) -> float:
    from hf_normswap import make_batches
    from hf_normswap.metrics import SacrebleuMetric

    if not model.config.is_encoder_decoder or isinstance(texts[0], str):
        raise ValueError("BLEU is for a model that translates, and pairs of texts: choose another --score.")
    sources = sorted(range(len(texts)), key=lambda index: len(texts[index][0]))
    found = []
    for batch in make_batches(model, [texts[index][0] for index in sources], tokenizer, batch_size):
        batch = {name: values.to(model.device) for name, values in batch.items()}
        length = 2 * batch["input_ids"].shape[1] + 10
        written = model.generate(**batch, num_beams=1, do_sample=False, max_new_tokens=length)
        found += [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    references = [texts[index][1] for index in sources]
    return SacrebleuMetric().compute(predictions=found, references=references)["score"]


def _score_entities(model, rows, tokenizer, args) -> dict[str, float]:
    import torch

    from hf_normswap.metrics import SeqevalMetric

    tags = _label_column(args, rows)
    names = getattr(getattr(rows.features[tags], "feature", None), "names", None)
    words = (args.columns or ["tokens"])[0]
    if names is None or words not in rows.column_names:
        raise ValueError(
            f"Entities need a column of words and one of named tags: {tags} of {args.dataset_name} is none."
        )
    found, true = [], []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        encoded = tokenizer(part[words], is_split_into_words=True, truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded.to(model.device)).logits.cpu()
        for index, marks in enumerate(part[tags]):
            pieces = encoded.word_ids(index)
            firsts = [at for at, word in enumerate(pieces) if word is not None and word not in pieces[:at]]
            found.append([names[tag] for tag in logits[index, firsts].argmax(-1)])
            true.append([names[tag] for tag in marks[: len(firsts)]])
    return {"seqeval": 100 * SeqevalMetric().compute(predictions=found, references=true)["overall_f1"]}
