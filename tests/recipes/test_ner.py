"""The recipe of named entities, on tiny data."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForTokenClassification, AutoTokenizer

from hf_normswap.reporting.results import load_results
from recipes import ner
from tests.helpers.recipes import sentences


NAMES = ["O", "B-FILM", "I-FILM", "B-PLOT"]
TAGS = List(ClassLabel(names=NAMES))


def tag(words):
    """`good film` is a film, and `plot` a plot."""
    tags = []
    for word, before in zip(words, ["", *words], strict=False):
        is_inside = word == "film" and before == "good"
        tags.append(2 if is_inside else 1 if word == "good" else 3 if word == "plot" else 0)
    return tags


def write_data(folder, tags=TAGS, change=lambda split, rows: rows, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((splits or {"train": 24, "validation": 10, "test": 7}).items()):
        tokens = [sentence.split() for sentence in sentences(count, number)]
        rows = change(split, {"tokens": tokens, "ner_tags": [tag(words) for words in tokens]})
        features = Features({"tokens": List(Value("string")), "ner_tags": tags})
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def run(tmp_path, model_folder):
    def run(data, *options, model=model_folder, norm="rbn"):
        fixed = ["--max_length=20", "--max_steps=3", "--learning_rate=0.01", "--logging_steps=1", "--use_cpu"]
        names = [f"--dataset_name={data}", f"--model_name_or_path={model}", f"--norm={norm}"]
        ner.main([*names, f"--output_dir={tmp_path / 'output'}", *fixed, "--disable_tqdm=true", *options])
        return load_results(tmp_path / "output" / "result.json")[0]

    return run


def test_a_tagger_trains_and_is_scored_over_entities(run, tmp_path):
    data = write_data(tmp_path / "films")
    result = run(data, "--max_steps=60", "--test_split=test", "--eval_strategy=steps", "--eval_steps=60")
    assert result["task"] == "films"
    assert set(result["metrics"]) == {prefix + name for prefix in ("", "test_") for name in ner.SCORES}
    assert result["metrics"]["f1"] > 0.5
    assert any("rbn_penalty" in entry for entry in result["history"])
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "output").eval()
    assert model.config.id2label == dict(enumerate(NAMES))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    right = total = 0
    for sentence in sentences(10, 1):
        with torch.no_grad():
            tags = model(**tokenizer(sentence, return_tensors="pt")).logits[0, 1:-1].argmax(-1).tolist()
        wanted = tag(sentence.split())
        right, total = right + int(np.sum(np.equal(tags, wanted))), total + len(wanted)
    assert result["metrics"]["accuracy"] == pytest.approx(right / total)


@pytest.mark.parametrize("vocabulary", ["pieces", "words"])
def test_from_scratch(vocabulary, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    options = [f"--dataset_name={write_data(tmp_path / 'films')}", "--model_type=bert", "--norm=rbn", "--use_cpu"]
    options += [f"--config_overrides={json.dumps(sizes)}", "--vocab_size=290", f"--vocabulary={vocabulary}"]
    options += ["--max_length=60", "--max_steps=30", "--learning_rate=0.02", "--disable_tqdm=true"]
    ner.main([*options, f"--output_dir={tmp_path / 'output'}"])
    (result,) = load_results(tmp_path / "output" / "result.json")
    assert result["model"] == "bert from scratch"
    assert result["metrics"]["accuracy"] > 0.8  # two tags in three are O
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    words = ["good", "film"]
    ids = tokenizer(words, is_split_into_words=True)
    first = [index for index, word in enumerate(ids.word_ids()) if word is not None]
    assert ids.word_ids()[first[0]] == 0
    assert tokenizer.decode(ids["input_ids"], skip_special_tokens=True).split() == words


def test_the_first_piece_of_a_word_has_its_tag(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["##s"])
    data = {"train": Dataset.from_dict({"tokens": [["films", "good", "xyz"]], "ner_tags": [[1, 2, 3]]})}
    args = ner.DataArguments(dataset_name="films", max_length=20)

    class Splits(dict):
        def map(self, function, **options):
            return {name: rows.map(function, batched=True) for name, rows in self.items()}

    (row,) = ner.tokenize(Splits(data), tokenizer, args)["train"]
    words = [tokenizer.convert_ids_to_tokens(row["input_ids"]), row["labels"]]
    first = [label for label in words[1] if label != -100]
    assert first == [1, 2, 3]
    assert row["labels"][0] == row["labels"][-1] == -100


def test_tags_may_be_words(run, tmp_path):
    def spell(split, rows):
        return rows | {"ner_tags": [[NAMES[number] for number in row] for row in rows["ner_tags"]]}

    result = run(write_data(tmp_path / "films", tags=List(Value("string")), change=spell))
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "output")
    assert sorted(model.config.label2id) == sorted(NAMES)
    assert 0 <= result["metrics"]["f1"] <= 1


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, assert_resumes, tmp_path):
    assert_resumes(functools.partial(run, write_data(tmp_path / "films")))


def test_cut_words_are_counted(run, tmp_path, caplog):
    ner.logger.parent.propagate = True
    run(write_data(tmp_path / "films"), "--max_length=5")
    assert "are cut off and not scored" in caplog.text


@pytest.mark.parametrize(
    ("options", "change", "tags", "message"),
    [
        ([], lambda split, rows: {name: [] for name in rows} if split == "validation" else rows, None, "is empty"),
        ([], lambda split, rows: rows | {"ner_tags": [row[:-1] for row in rows["ner_tags"]]}, None, "words and"),
        ([], lambda split, rows: rows, List(Value("int64")), "no names of tags"),
        (
            [],
            lambda split, rows: rows | {"ner_tags": [["B-" + split] * len(row) for row in rows["ner_tags"]]},
            List(Value("string")),
            "a tag that is none of B-train",
        ),
        (["--test_split=dev"], lambda split, rows: rows, None, "has no split 'dev'"),
        (["--tags_column=pos_tags"], lambda split, rows: rows, None, "has no column 'pos_tags'"),
        (["--max_length=4000"], lambda split, rows: rows, None, "24 tokens at most"),
    ],
)
def test_bad_input_is_refused(run, refused, options, change, tags, message, tmp_path):
    data = write_data(tmp_path / "films", change=change, tags=tags or TAGS)
    refused(lambda: run(data, *options), message)


@pytest.mark.parametrize(
    ("name", "sizes", "tags"),
    [("leondz/wnut_17", [3394, 1009, 1287], 13), ("strombergnlp/broad_twitter_corpus", [6338, 1001, 2001], 7)],
)
def test_the_real_data_is_read(name, sizes, tags):
    root = os.environ.get("NORMSWAP_DATA")
    if not root or not Path(root, name).is_dir():
        pytest.skip(f"NORMSWAP_DATA names no folder with {name}")
    data, names = ner.load_tags(ner.DataArguments(dataset_name=str(Path(root, name)), test_split="test"))
    assert [len(rows) for rows in data.values()] == sizes
    assert len(names) == tags
    assert "O" in names
