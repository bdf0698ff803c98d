"""The scores of `normswap convert` against plain loops, one example at a time."""

import json
import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from scipy.stats import spearmanr
from seqeval.metrics import f1_score
from torch.nn import functional
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from hf_normswap.cli import main
from tests.helpers.checkpoint import TEXTS, save_stock
from tests.helpers.models import tiny_model
from tests.helpers.persistence import is_one_sentence


PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))
TAGS = ["O", "B-PER", "I-PER"]


@pytest.fixture
def source(tmp_path):
    """Saves a tiny checkpoint, and a data set with columns of all kinds; returns what loads a model of it."""

    def save(family="bert", head=None, **overrides):
        folder = save_stock(tmp_path / "stock", family)
        model = tiny_model(family, head, **overrides)
        model.save_pretrained(folder)
        words = [text.split() for text in TEXTS]
        rows = {
            "text": TEXTS,
            "other": [other for _, other in PAIRS],
            "label": [index % 3 for index in range(len(TEXTS))],
            "score": [float((5 * index) % 7) for index in range(len(TEXTS))],
            "tokens": words,
            "ner_tags": [[(index + at) % 3 for at in range(len(each))] for index, each in enumerate(words)],
        }
        types = {"text": Value("string"), "other": Value("string"), "label": Value("int64"), "score": Value("float64")}
        lists = {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=TAGS))}
        data = Dataset.from_dict(rows, Features({**types, **lists}))
        (tmp_path / "data").mkdir()
        for split in ("train", "validation"):
            data.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
        return folder, model.eval(), AutoTokenizer.from_pretrained(folder)

    return save


def scores(folder, tmp_path, capsys, *options):
    """Before and after, as the verb prints them."""
    command = ["convert", folder, str(tmp_path / "new"), "--dataset_name", str(tmp_path / "data"), "--json", *options]
    assert main(command) == 0, capsys.readouterr().err
    ((before, after),) = json.loads(capsys.readouterr().out)["scores"].values()
    return before, after


@torch.no_grad()
def logits(model, tokenizer, *texts, **options):
    return model(**tokenizer(*texts, return_tensors="pt", **options)).logits[0]


def test_accuracy(source, tmp_path, capsys):
    folder, model, tokenizer = source("bert", num_labels=3)
    before, after = scores(folder, tmp_path, capsys, "--columns", "text", "--score", "accuracy")
    converted = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new").eval()
    for score, each in ((before, model), (after, converted)):
        right = [logits(each, tokenizer, text).argmax().item() == index % 3 for index, text in enumerate(TEXTS)]
        assert score == pytest.approx(100 * sum(right) / len(right))


def test_ranks_of_a_regression(source, tmp_path, capsys):
    folder, model, tokenizer = source("bert", num_labels=1)
    options = ["--columns", "text", "other", "--score", "spearman", "--label_column", "score"]
    before, _ = scores(folder, tmp_path, capsys, *options)
    found = [logits(model, tokenizer, *pair).item() for pair in PAIRS]
    wanted = spearmanr(found, [(5 * index) % 7 for index in range(len(TEXTS))]).statistic
    assert before == pytest.approx(100 * wanted, abs=1e-6)


def test_ranks_of_embeddings(source, tmp_path, capsys):
    folder, model, tokenizer = source("bert", "BertModel")
    options = ["--columns", "text", "other", "--score", "spearman", "--label_column", "score"]
    before, _ = scores(folder, tmp_path, capsys, *options)
    with torch.no_grad():
        vectors = [
            [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in pair]
            for pair in PAIRS
        ]
    found = [functional.cosine_similarity(*pair, dim=0).item() for pair in vectors]
    wanted = spearmanr(found, [(5 * index) % 7 for index in range(len(TEXTS))]).statistic
    assert before == pytest.approx(100 * wanted, abs=1e-6)
    assert AutoModel.from_pretrained(tmp_path / "new").config.norm_swap


def test_entities(source, tmp_path, capsys):
    folder, model, tokenizer = source("bert", "BertForTokenClassification", num_labels=3)
    before, _ = scores(folder, tmp_path, capsys, "--columns", "tokens", "--score", "seqeval")
    found, true = [], []
    for index, text in enumerate(TEXTS):
        words = text.split()
        encoded = tokenizer(words, is_split_into_words=True)
        numbers = logits(model, tokenizer, words, is_split_into_words=True).argmax(-1).tolist()
        firsts = [encoded.word_ids().index(word) for word in range(len(words))]
        found.append([TAGS[numbers[at]] for at in firsts])
        true.append([TAGS[(index + at) % 3] for at in range(len(words))])
    assert before == pytest.approx(100 * f1_score(true, found))


def test_perplexity(source, tmp_path, capsys):
    folder, model, tokenizer = source("gpt2", "GPT2LMHeadModel")
    before, _ = scores(folder, tmp_path, capsys, "--columns", "text", "--score", "perplexity")
    losses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        if len(ids) > 1:
            losses.append(functional.cross_entropy(logits(model, tokenizer, text)[:-1], ids[1:], reduction="none"))
    assert before == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)


def test_translations(source, tmp_path, capsys):
    folder, _, _ = source("marian")
    options = ["--columns", "text", "other", "--score", "bleu", "--score_examples", "3"]
    before, after = scores(folder, tmp_path, capsys, *options)
    assert 0 <= before <= 100
    assert 0 <= after <= 100


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--score", "accuracy", "--columns", "text", "--label_column", "none"], "--label_column"),
        (["--score", "accuracy", "--columns", "text", "--score_split", "test"], "cannot be read"),
        (["--score", "accuracy", "--columns", "text", "--label_column", "score"], "no numbers of classes"),
        (["--score", "bleu", "--columns", "text"], "another --score"),
        (["--score", "spearman", "--columns", "text"], "another --score"),
        (["--score", "seqeval", "--columns", "text", "--label_column", "label"], "named tags"),
        (["--score_split", "validation", "--columns", "text"], "pass --score too"),
    ],
)
def test_a_score_that_cannot_be_taken_writes_nothing(options, said, source, tmp_path, capsys):
    folder, _, _ = source("bert", num_labels=3)
    command = ["convert", folder, str(tmp_path / "new"), "--dataset_name", str(tmp_path / "data"), *options]
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert said in last
    assert said == "cannot be read" or is_one_sentence(
        last.removeprefix("error: ")
    )  # the rest of that is of `datasets`
    assert not (tmp_path / "new").exists()


def test_texts_alone_have_no_labels(source, tmp_path, capsys):
    folder, _, _ = source("bert")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = ["convert", folder, str(tmp_path / "new"), "--texts", str(tmp_path / "texts.txt"), "--score", "accuracy"]
    assert main(command) == 2
    assert "--dataset_name" in capsys.readouterr().err
