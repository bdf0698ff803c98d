"""The recipe of translation, on tiny data."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_normswap.reporting.results import load_results
from recipes import translation
from recipes.token_batches import TokenBatches
from tests.helpers.recipes import sentences


SIZES = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
}


@pytest.fixture
def pairs(tmp_path):
    """To translate is to say it backwards."""
    folder = tmp_path / "backwards"
    folder.mkdir()
    for number, (split, count) in enumerate({"train": 60, "validation": 9, "test": 7}.items()):
        rows = [{"de": text, "en": " ".join(reversed(text.split()))} for text in sentences(count, number)]
        Dataset.from_dict({"translation": rows}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def run(tmp_path, pairs):
    def run(*options, norm="rbn"):
        fixed = ["--source=de", "--target=en", f"--config_overrides={json.dumps(SIZES)}", "--vocab_size=290"]
        fixed += ["--max_steps=3", "--learning_rate=0.01", "--logging_steps=1", "--use_cpu", "--max_length=24"]
        names = [f"--dataset_name={pairs}", f"--norm={norm}", f"--output_dir={tmp_path / 'output'}"]
        translation.main([*names, *fixed, "--disable_tqdm=true", *options])
        return load_results(tmp_path / "output" / "result.json")[0]

    return run


def test_from_scratch_and_scored_by_beam_search(run, tmp_path):
    more = ["--label_smoothing_factor=0.1", "--lr_scheduler_type=inverse_sqrt", "--warmup_steps=2"]
    result = run("--generation_num_beams=3", "--test_split=test", "--where=encoder", *more)
    assert result["task"] == "backwards de-en"
    assert set(result["metrics"]) == {"bleu", "chrf", "test_bleu", "test_chrf"}
    found = json.loads((tmp_path / "output" / "translations.json").read_text())
    references = [" ".join(reversed(text.split())) for text in sentences(9, 1)]
    assert result["metrics"]["bleu"] == pytest.approx(BLEU().corpus_score(found["validation"], [references]).score)
    assert result["metrics"]["chrf"] == pytest.approx(CHRF().corpus_score(found["validation"], [references]).score)
    assert "tok:13a" in result["arguments"]["signatures"]["bleu"]
    assert "chrF2" in result["arguments"]["signatures"]["chrf"] or "nc:6" in result["arguments"]["signatures"]["chrf"]
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    inputs = tokenizer(sentences(9, 1)[:1], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, num_beams=3, max_length=24)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == found["validation"][0]


def test_a_model_that_is_converted_after_its_training_leaves_its_own_translations(run, tmp_path):
    result = run("--convert=16", "--where=encoder", "--max_tokens=48", norm="layernorm")
    assert set(result["metrics"]) == {"bleu", "chrf", "converted_bleu", "converted_chrf"}
    assert {norm["name"].split(".")[1] for norm in result["conversion"]["norms"]} == {"encoder"}
    references = [" ".join(reversed(text.split())) for text in sentences(9, 1)]
    for prefix, folder in ("", "output"), ("converted_", "output/converted"):
        found = json.loads((tmp_path / folder / "translations.json").read_text())["validation"]
        assert result["metrics"][f"{prefix}bleu"] == pytest.approx(BLEU().corpus_score(found, [references]).score)


def test_batches_of_so_many_tokens(run):
    result = run("--max_tokens=48", "--max_steps=6", "--ngram=3", norm="powernorm")
    assert result["arguments"]["ngram"] == 3
    assert len([entry for entry in result["history"] if "loss" in entry]) == 6


def test_evaluations_on_the_way_may_do_without_translations(run):
    result = run("--predict_with_generate=false", "--eval_strategy=steps", "--eval_steps=3")
    (evaluation,) = [entry for entry in result["history"] if "eval_loss" in entry]
    assert "eval_bleu" not in evaluation
    assert set(result["metrics"]) == {"bleu", "chrf"}
    (evaluation,) = [
        entry for entry in run("--eval_strategy=steps", "--eval_steps=3")["history"] if "eval_loss" in entry
    ]
    assert evaluation["eval_bleu"] == result["metrics"]["bleu"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_token_batches(ranks):
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = TokenBatches(lengths, 90, seed=3, ranks=ranks)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1]
        assert len(sampler) == len(epochs[-1])
        assert len(sampler) % ranks == 0
        for batch in epochs[-1]:
            assert len(batch) * max(lengths[index] for index in batch) <= 90
        rows = [index for batch in epochs[-1] for index in batch]
        assert len(set(rows)) == len(rows)
        if ranks == 1:
            assert sorted(rows) == list(range(200))
        padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in epochs[-1])
        assert padded < 1.2 * sum(lengths[index] for index in rows)
    assert epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="29 tokens"):
        TokenBatches(lengths, 20, seed=3)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, assert_resumes):
    assert_resumes(run, "--max_tokens=64")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source=fr"], "has no language 'fr', only de, en"),
        (["--test_split=dev"], "has no split 'dev'"),
        (["--config_overrides=[]x"], "no JSON object"),
        (["--ngram=0"], "an ngram of 1 or more"),
        (['--config_overrides={"max_position_embeddings": 8}'], "has 8 positions"),
    ],
)
def test_bad_input_is_refused(run, refused, options, message):
    refused(lambda: run(*options), message)


def test_the_real_data_is_read():
    root = os.environ.get("NORMSWAP_DATA")
    if not root or not Path(root, "bentrevett").is_dir():
        pytest.skip("NORMSWAP_DATA names no folder with bentrevett/multi30k")
    name = str(Path(root, "bentrevett/multi30k"))
    data = translation.load_pairs(translation.DataArguments(name, "de", "en", test_split="test"))
    assert [len(rows) for rows in data.values()] == [29000, 1014, 1000]
    assert set(data["train"].column_names) == {"de", "en"}
