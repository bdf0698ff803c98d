"""The benchmarks, on a few generated sentences."""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, MarianMTModel, PreTrainedTokenizerFast

from tests.distributed.launch import TORCHRUN
from tests.distributed.launch import run as run_command
from tests.test_cli import TEXTS, save_stock


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # where Python finds what the scripts share

import conversion  # noqa: E402
import finetuning  # noqa: E402
import inference  # noqa: E402
import norms  # noqa: E402
import render_speed  # noqa: E402
import timing  # noqa: E402
import training  # noqa: E402


# GPT-2: two in the block and the final one. RoBERTa: embedding, two, head. Marian: two and three.
NORMS = {"gpt2": 3, "roberta": 4, "marian": 5}
KINDS = {"gpt2": ("blocks", "lines"), "roberta": ("masked lines", "lines"), "marian": ("pairs", "sources")}
WORDS = "ein the hund dog läuft runs über over rote red wiese meadow . , <unk> N".split()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder laid out like each data set, and a cache that has not seen another one of its name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rng = random.Random(0)

    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))

    for split, count in {"train": 150, "validation": 20, "test": 40}.items():
        texts = [sentence() for _ in range(count)]
        pairs = [{"de": text, "en": sentence()} for text in texts]
        for name, rows in {"lines": {"text": texts}, "pairs": {"translation": pairs}}.items():
            path = tmp_path / name / "data" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(rows).to_parquet(path)
    return tmp_path


def run(family, data, *options):
    conversion.main(
        [
            f"--family={family}",
            f"--dataset_name={data / ('pairs' if family == 'marian' else 'lines')}",
            f"--output_dir={data / 'output'}",
            *"--norms BatchNorm --examples 4 8 --vocab_size 300 --hidden_size 16 --layers 1 --heads 2".split(),
            *"--batch_size 4 --max_steps 3 --distillation_steps 3 --learning_rate 0.01 --no_bf16".split(),
            *options,
        ]
    )
    files = sorted((data / "output" / family / "results").glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


@pytest.mark.parametrize("family", NORMS)
def test_a_conversion_is_on_record(family, data, capsys, monkeypatch):
    results = run(family, data)
    usual, other = (kind.replace(" ", "-") for kind in KINDS[family])
    ways = {f"{usual}-4", f"{usual}-8", f"{usual}-8-distilled", f"{other}-8"}
    assert set(results) == {f"batchnorm-{way}" for way in ways}
    for result in results.values():
        before, after = result["before"], result["metrics"]
        assert set(before) == ({"bleu", "validation_loss"} if family == "marian" else {"perplexity", "loss"})
        for name, percent in result["relative_loss_percent"].items():
            worse = before[name] - after[name] if name == "bleu" else after[name] - before[name]
            if before[name]:
                assert percent == pytest.approx(100 * worse / before[name])
            else:
                assert percent is None
        if family != "marian":
            assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
        (swapped,) = result["norm_swap"]["norms"]
        assert (swapped["norm"], len(swapped["modules"])) == ("batchnorm", NORMS[family])
        assert result["worst_r2"] == min(result["norm_swap"]["calibration"].values()) <= 1
        assert result["calibration"]["inputs"] in KINDS[family]
        assert result["calibration"]["seconds"] > 0
        assert {"versions", "hardware"} < set(result)
    first = next(iter(results.values()))
    assert all(result["before"] == first["before"] for result in results.values())
    assert (
        len({result["metrics"]["validation_loss" if family == "marian" else "loss"] for result in results.values()})
        == 4
    )
    printed = capsys.readouterr().out
    assert "| layernorm | – |" in printed
    for result in results.values():
        calibration = result["calibration"]
        assert f"| batchnorm | {calibration['examples']} {calibration['inputs']}" in printed

    monkeypatch.setattr(conversion, "Trainer", None)  # what is trained stays
    again = run(family, data, "--examples", "4")
    assert again[f"batchnorm-{usual}-4"]["metrics"] == results[f"batchnorm-{usual}-4"]["metrics"]
    with pytest.raises(SystemExit, match="other options"):
        run(family, data, "--max_steps", "4")


def test_the_loss_is_that_of_every_token_alike(data):
    """As without batches and padding."""
    before = run("marian", data)["batchnorm-pairs-4"]["before"]["validation_loss"]
    model = MarianMTModel.from_pretrained(data / "output" / "marian")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "output" / "marian")
    losses = []
    for row in Dataset.from_parquet(str(data / "pairs/data/validation-00000-of-00001.parquet"))["translation"]:
        source, target = (tokenizer(row[language], return_tensors="pt")["input_ids"] for language in ("de", "en"))
        read = torch.cat([torch.full((1, 1), tokenizer.pad_token_id), target[:, :-1]], dim=1)
        with torch.no_grad():
            chances = model(input_ids=source, decoder_input_ids=read).logits.log_softmax(-1)
        losses += (-chances[0].gather(-1, target[0][:, None])[:, 0]).tolist()
    assert before == pytest.approx(sum(losses) / len(losses), rel=1e-5)  # float32, summed in another order


def test_worse_is_up_for_losses_and_down_for_bleu():
    loss = conversion.relative_loss({"bleu": 20.0, "loss": 2.0}, {"bleu": 19.0, "loss": 2.2})
    assert loss == pytest.approx({"bleu": 5.0, "loss": 10.0})


def test_paired_differences():
    """Against the textbook: the interval of a mean difference, and none where the runs are the same."""
    generator = np.random.default_rng(1)
    reference = {seed: generator.random(2000) < 0.8 for seed in range(3)}
    flipped = generator.random(2000) < 0.05
    worse = {seed: right & ~flipped for seed, right in reference.items()}
    correct = {
        ("sst2", "layernorm", "naive"): reference,
        ("sst2", "rbn", "calibrated"): worse,
        ("rte", "layernorm", "naive"): {0: reference[0][:500]},
        ("rte", "rbn", "calibrated"): {0: reference[0][:500], 7: reference[1][:500]},  # one seed has no counterpart
    }
    rows = {(row["task"], row["way"]): row for row in finetuning.compare(correct, seed=0)}
    assert set(rows) == {("sst2", "calibrated"), ("rte", "calibrated"), ("all", "calibrated")}
    row = rows["sst2", "calibrated"]
    difference = np.mean([worse[seed].astype(float) - reference[seed] for seed in range(3)], axis=0)
    assert row["difference"] == pytest.approx(100 * difference.mean())
    spread = 100 * difference.std() / 2000**0.5
    low, high = row["interval"]
    assert low < row["difference"] < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.25)  # seeds add a little
    assert rows["rte", "calibrated"]["interval"] == [0, 0]
    assert list(rows["rte", "calibrated"]["accuracy"]) == ["0"]
    assert rows["all", "calibrated"]["difference"] == pytest.approx(row["difference"] / 2)
    assert "| rte | rbn | calibrated |" in finetuning.table(list(rows.values()))


def test_correct_predictions_of_a_saved_model(tmp_path):
    path = save_stock(tmp_path / "stock")
    rows = Dataset.from_dict({"sentence": TEXTS, "label": [0, 1, 2] * 20, "idx": range(60)})
    right = finetuning.find_correct(path, rows)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for index in (0, 7, 31):
        predicted = model.eval()(**tokenizer(TEXTS[index], return_tensors="pt")).logits.argmax().item()
        assert right[index] == (predicted == rows[index]["label"])


@pytest.mark.slow
def test_inference_without_norms(tmp_path, capsys):
    path = tmp_path / "inference.json"
    sizes = "--hidden_size 64 --layers 1 --batch_sizes 2 --length 4 --rounds 3 --ways eager"
    inference.main([*sizes.split(), "--output_file", str(path)])
    rows = json.loads(path.read_text())["rows"]
    kinds = [("encode", "layernorm"), ("encode", "folded")]
    kinds += [("decode", "layernorm"), ("decode", "folded"), ("decode", "rmsnorm")]
    assert [(row["task"], row["variant"]) for row in rows] == [(task, f"{kind} eager") for task, kind in kinds]
    for row in rows:
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        assert row["peak_bytes"] > 2**20


@pytest.mark.parametrize("compare", ["layernorm", "logging"])
def test_training_steps_are_compared_in_pairs(compare, tmp_path):
    output = tmp_path / "training.json"
    sizes = ["--hidden_size=64", "--layers=1", "--batch_size=4", "--length=8", "--pairs=3"]
    training.main([f"--compare={compare}", "--norm=rbn", f"--output_file={output}", *sizes])
    result = json.loads(output.read_text())
    low, high = result["interval"]
    assert 0 < low <= result["ratio"] <= high
    assert (result["norm"], result["processes"]) == ("rbn", 1)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_steps_of_models_with_checkpointing(family, tmp_path):
    output = tmp_path / "training.json"
    sizes = ["--hidden_size=64", "--layers=2", "--batch_size=4", "--length=8", "--pairs=3", "--checkpointing"]
    training.main(["--compare=layernorm", "--norm=rbn", f"--family={family}", f"--output_file={output}", *sizes])
    result = json.loads(output.read_text())
    assert (result["family"], result["checkpointing"]) == (family, True)
    model = training.make_model(argparse.Namespace(**result))
    assert model.config.model_type == family


@pytest.mark.distributed
def test_synchronization_is_measured_on_two_processes(tmp_path):
    output = tmp_path / "training.json"
    sizes = ["--hidden_size=64", "--layers=1", "--batch_size=4", "--length=8", "--pairs=3"]
    run_command(*TORCHRUN, "benchmarks/training.py", "--compare=synchronization", f"--output_file={output}", *sizes)
    assert json.loads(output.read_text())["processes"] == 2


def test_norms_against_layer_norm(tmp_path, capsys):
    options = ["--channels", "64", "--tokens", "128", "--pairs", "3", "--peers", "ln=torch.nn:LayerNorm"]
    output = tmp_path / "norms.json"
    norms.main([*options, "--output_file", str(output), "--dtypes", "float32", "--memory", "false"])
    result = json.loads(output.read_text())
    assert [row["norm"] for row in result["rows"]] == [*norms.NORMS, *norms.PEERS, "ln"]
    for row in result["rows"]:
        assert 0 < row["interval"][0] <= row["ratio"] <= row["interval"][1]
    assert len(capsys.readouterr().out.splitlines()) == len(result["rows"])

    # A few pairs on a busy machine have no narrow intervals: these are made.
    rows = [{**row, "interval": [0.9 * row["ratio"], 1.1 * row["ratio"]]} for row in result["rows"]]
    slow = [{**row, "ratio": 2 * row["ratio"], "interval": [2 * end for end in row["interval"]]} for row in rows]
    assert norms.find_slower(rows, rows) == []
    assert len(norms.find_slower(slow, rows)) == len(slow)
    assert norms.find_slower(rows, slow) == []


def test_memory_is_that_of_the_process_which_runs(tmp_path):
    held = torch.ones(2**27)  # half a GiB
    base = timing.peak_memory("cpu", torch.ones, 8)
    assert timing.peak_memory("cpu", torch.ones, 2**26) - base == pytest.approx(2**28, rel=0.1)
    assert base < held.nbytes * 2


def test_the_page_on_speed_shows_the_figures(tmp_path):
    page = render_speed.PAGE.read_text(encoding="utf-8")
    assert render_speed.render(page) == page
    figures = json.loads((render_speed.RESULTS / "cpu-4096.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in figures if row["norm"] == "batchnorm")
    assert "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["interval"]) in page
    changed = page.replace("<!-- table norms -->", "<!-- table norms -->\nold")
    assert render_speed.render(changed) == page
