"""The first run, cut short."""

import re
import statistics

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_normswap import find_norms
from hf_normswap.reporting.results import load_results
from recipes import first_run, topics


@pytest.fixture(scope="module")
def splits():
    return dict(zip(("train", "dev"), topics.load_data()))


def test_every_topic_is_in_both_splits_and_none_prevails(splits):
    for split in splits.values():
        counts = np.bincount(split["label"], minlength=len(topics.TOPICS))
        assert counts.min() >= 3
        assert counts.max() < 0.3 * len(split)
    assert len(splits["train"]) > 1000
    assert len(splits["dev"]) > 300


def test_no_sentence_of_one_split_is_nearly_one_of_the_other(splits):
    def words(sentence):
        return set(re.findall("[a-z]+", sentence.lower()))

    train = [words(sentence) for sentence in splits["train"]["text"]]
    for sentence in splits["dev"]["text"]:
        own = words(sentence)
        assert max(len(own & other) / len(own | other) for other in train) < 0.6, sentence


def test_the_text_is_prose_without_markup(splits):
    for split in splits.values():
        for sentence in split["text"]:
            assert not re.search(r'::=|>>>|\*|"|===', sentence), sentence
            assert sentence[0].isupper()
            assert sentence[-1] == "."


def test_headings_grammar_and_tables_are_left_out():
    page = """The "pass" statement
********************

   pass_stmt ::= "pass"

"pass" is a null operation, and *nothing* happens when it is executed. It is useful
as a placeholder [1] in a function without a body.

+-----+
| Why is this table of six words here. |

New in version 3.0: The statement that is described in this very sentence.
"""
    assert [sentence for paragraph in topics.paragraphs(page) for sentence in paragraph] == [
        "It is useful as a placeholder  in a function without a body."
    ]


def test_data_and_vocabulary_are_the_same_each_time(splits):
    again = dict(zip(("train", "dev"), topics.load_data()))
    assert all(again[name].to_dict() == split.to_dict() for name, split in splits.items())
    texts = splits["train"]["text"][:]
    vocabularies = [first_run.train_tokenizer(texts).get_vocab() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1]


def test_the_margin_over_the_majority_class():
    scores = [0.50, 0.54]
    results = [
        {"norm": "rbn", "metrics": {"accuracy": score}, "baselines": {"majority class": 0.2}} for score in scores
    ]
    error = (0.52 * 0.48 / 100 + statistics.variance(scores) / 2) ** 0.5
    assert f"rbn, {0.32 / error:.1f} standard errors" in first_run.above_majority(results, 100)


@pytest.fixture
def a_tenth(splits, monkeypatch):
    tenth = [split.select(range(0, len(split), 10)) for split in splits.values()]
    monkeypatch.setattr(first_run, "load_data", lambda: tenth)


def test_a_short_run_leaves_results_curves_and_a_model(a_tenth, tmp_path, capsys):
    options = ["--norms", "layernorm", "PowerNorm", "--seeds", "3", "--num_train_epochs", "2"]
    first_run.main([*options, "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    results = load_results(tmp_path / "results")
    assert [(result["norm"], result["seed"]) for result in results] == [("layernorm", 3), ("powernorm", 3)]
    for result in results:
        assert set(result["baselines"]) == {"majority class", "TF-IDF + logistic regression"}
        assert f"{result['metrics']['accuracy']:.3f}" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "powernorm")
    assert {site.kind for site in find_norms(model)} == {"layernorm", "powernorm"}
    logits = first_run.predict(model, AutoTokenizer.from_pretrained(tmp_path / "powernorm"), first_run.EXAMPLE)
    assert f'step through it.": {model.config.id2label[int(logits.argmax())]}' in printed


def test_the_same_seed_gives_the_same_run(a_tenth, tmp_path):
    for name in ("first", "second"):
        options = ["--norms", "rbn", "--seeds", "0", "--num_train_epochs", "3"]
        first_run.main([*options, "--output_dir", str(tmp_path / name)])
    first, second = (load_results(tmp_path / name / "results")[0] for name in ("first", "second"))
    assert first["metrics"] == second["metrics"]
    losses = [[entry["loss"] for entry in result["history"] if "loss" in entry] for result in (first, second)]
    assert losses[0] == losses[1]


def test_an_unknown_norm_is_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        first_run.main(["--norms", "powrnorm", "--output_dir", str(tmp_path / "output")])
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("error: There is no norm 'powrnorm'")
    assert not (tmp_path / "output").exists()
