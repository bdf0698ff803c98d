"""The benchmarks, on a few generated sentences."""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, MarianMTModel, PreTrainedTokenizerFast

from hf_normswap import use_kernels
from tests.helpers.checkpoint import TEXTS, save_stock
from tests.helpers.launch import TORCHRUN
from tests.helpers.launch import run as run_command


for folder in ("results", "benchmarks"):  # where Python finds what the scripts share
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import conversion  # noqa: E402
import finetuning  # noqa: E402
import gpu  # noqa: E402
import gpu_phases  # noqa: E402
import inference  # noqa: E402
import norms  # noqa: E402
import render  # noqa: E402
import tables_speed  # noqa: E402
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


@pytest.mark.slow
@pytest.mark.release
def test_a_dry_run_of_all_that_a_gpu_has_to_show(tmp_path):
    """In processes of their own, as on a device: each phase leaves a file, which is shown."""
    words = random.Random(0).choices(WORDS, k=8 * 400)
    text = tmp_path / "words.txt"
    text.write_text(
        "\n".join(" ".join(words[start : start + 8]) for start in range(0, len(words), 8)), encoding="utf-8"
    )
    options = ["--device", "cpu", "--quick", "--output", tmp_path / "output", "--text", text]
    printed = run_command(sys.executable, "benchmarks/gpu.py", *options, "--phases", *gpu.BUDGETS)
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "output").iterdir()}
    assert set(records) == set(gpu.BUDGETS) == set(tables_speed.GPU_TABLES)
    for phase, record in records.items():
        assert (record["device"], record["quick"], record["ended"]) == ("cpu", True, "done"), phase
        assert record["rows"]
        assert not [row["error"] for row in record["rows"] if isinstance(row.get("error"), str)]
        assert f"## {phase} (cpu, dry run" in printed
        assert "| --- |" in tables_speed.table_of_gpu(phase, record)
        assert {"versions", "hardware"} < set(record)
    assert all(row["correct"] for row in records["correctness"]["rows"] if "errors" in row)
    (tests,) = (row for row in records["correctness"]["rows"] if row["norm"] == "tests/gpu")
    assert (tests["exit_code"], tests["failed"]) == (0, 0)
    assert tests["passed"] + tests["skipped"] > 50
    assert {row["path"] for row in records["norms"]["rows"]} == {"kernels", "pytorch", "compile", None}
    assert {(row["norm"], row["compiled"]) for row in records["steps"]["rows"]} > {("rbn", True), ("powernorm", False)}
    assert {(row["task"], row["kind"]) for row in records["inference"]["rows"]} > {("decode", "rmsnorm")}
    assert {row["launch"] for row in records["launch"]["rows"]} > {"plain", "resume", "one process of torchrun"}
    assert all(row["equal"] for row in records["launch"]["rows"])
    assert {row["norm"] for row in records["train"]["rows"]} == {"layernorm", "powernorm", "rbn"}
    assert all(row["validation_loss"] < math.log(len(WORDS)) + 1 for row in records["train"]["rows"])


@pytest.fixture
def stand_in(tmp_path):
    """A copy of `gpu.py` whose phases take no time, and whose norms break the device once."""
    (tmp_path / "gpu.py").write_text(Path(gpu.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "tables_speed.py").write_text("def render_folder(folder):\n    return 'rendered'\n")
    (tmp_path / "gpu_phases.py").write_text("""
import json, os, sys, time
from gpu import write_json
options = json.loads(sys.argv[1])
path = options["path"]
if options["phase"] == "train":
    sys.exit(3)
record = json.load(open(path)) if os.path.exists(path) else {"rows": []}
for row in range(len(record["rows"]), 20):
    write_json(path, {**record, "running": {"row": row}, "ended": None})
    if options["phase"] == "norms" and row == 3:
        os.abort()
    if options["phase"] == "inference" and row == 4:
        time.sleep(60)
    record["rows"].append({"row": row, "filler": "x" * 10000})
    time.sleep(0.002)
write_json(path, {**{k: v for k, v in record.items() if k != "running"}, "ended": "done"})
""")
    return [sys.executable, str(tmp_path / "gpu.py"), "--output", str(tmp_path / "output"), "--quick"]


def read_records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("last", ["facts", "correctness", "norms", "steps"])
def test_a_kill_leaves_the_files_of_the_phases_before(last, stand_in, tmp_path):
    process = subprocess.Popen(stand_in, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    phases = list(gpu.BUDGETS)
    following = tmp_path / "output" / f"{phases[phases.index(last) + 1]}.json"
    deadline = time.monotonic() + 30
    while not following.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    records = read_records(tmp_path / "output")  # and each of them is whole JSON
    assert set(records) == set(phases[: phases.index(last) + 2])
    for phase in phases[: phases.index(last) + 1]:
        assert records[phase]["ended"] == "done"
        assert [row["row"] for row in records[phase]["rows"]] == list(range(20))


def test_a_phase_goes_on_behind_a_broken_device_and_ends_with_its_budget(stand_in, tmp_path):
    script = Path(stand_in[1])
    small = 'BUDGETS["inference"], GRACE = 0.4, 1\nif __name__'
    script.write_text(script.read_text().replace("if __name__", small))
    done = subprocess.run(stand_in, capture_output=True, text=True, check=True)
    assert "rendered" in done.stdout
    records = read_records(tmp_path / "output")
    norms = records["norms"]
    assert norms["ended"] == "done"
    assert len(norms["rows"]) == 20
    assert {**norms["rows"][3], "error": norms["rows"][3]["error"].partition(" with")[0]} == {
        "row": 3,
        "error": "the process died",
    }
    assert records["inference"]["ended"].startswith("killed after")
    assert len(records["inference"]["rows"]) == 4  # a later command tries the next one again
    assert records["launch"]["ended"] == "done"
    assert "inference: killed" in done.stdout
    before = (tmp_path / "output" / "steps.json").read_bytes()
    subprocess.run([*stand_in, "--phases", "steps"], capture_output=True, check=True)
    assert (tmp_path / "output" / "steps.json").read_bytes() == before


def test_a_phase_that_does_not_start_is_on_record(stand_in, tmp_path):
    command = [*stand_in, "--phases", "train", "--text", "words.txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train: the process died with exit code 3, 0 rows" in done.stdout
    shown = tables_speed.render_folder(tmp_path / "output")
    assert "## train (cuda, dry run, 0 s, the process died with exit code 3)" in shown
    assert "Not measured." in shown


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def phase(args):
        for index in range(4):
            yield {"case": index}, lambda index=index: measured.append(index) or {"value": 1 / (index - 1)}

    def measure(seconds):
        options = {"phase": "facts", "path": str(tmp_path / "facts.json"), "device": "cpu", "quick": True}
        gpu_phases.main(json.dumps({**options, "seconds": seconds}))
        return json.loads((tmp_path / "facts.json").read_text())

    monkeypatch.setitem(gpu_phases.PHASES, "facts", phase)
    assert measure(-1)["ended"] == "the budget is used up"
    assert measured == []
    record = measure(60)
    assert [row.get("value") for row in record["rows"]] == [-1, None, 1, 0.5]
    assert record["rows"][1]["error"] == "ZeroDivisionError: division by zero"
    assert record["ended"] == "done"
    assert "running" not in record
    assert measure(60)["rows"] == record["rows"]
    assert measured == [0, 1, 2, 3]


def test_a_dry_run_is_never_shown_as_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_speed, "GPU", tmp_path)
    page = "<!-- results gpu_facts -->\n<!-- end -->"
    assert "Not measured." in render.fill(page)
    row = {"fact": "device", "bandwidth": 4.3e12, "name": "NVIDIA H200", "took": 1.0}
    for device, quick, is_shown in (("cuda", False, True), ("cuda", True, False), ("cpu", False, False)):
        gpu.write_json(tmp_path / "facts.json", {"device": device, "quick": quick, "rows": [row]})
        if is_shown:
            assert "| copy, read and written | 4.300 TB/s |" in render.fill(page)
        else:
            with pytest.raises(ValueError, match="dry run"):
                render.fill(page)


def test_the_splits_of_a_text(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text("".join(f"{path.name} {index}\n\n" for index in range(40)), encoding="utf-8")
    train, validation, test = gpu_phases.read_words(paths[:1])
    assert (len(train), len(validation), len(test)) == (36, 2, 2)
    assert [*train, *validation, *test] == [f"a {index}" for index in range(40)]
    assert [lines[0] for lines in gpu_phases.read_words(paths)] == ["a 0", "b 0", "c 0"]


def test_the_error_of_a_norm_is_found():
    """One that is as good as LayerNorm, and one that is off by a thousandth."""
    args = argparse.Namespace(device="cpu", compiler="aot_eager", quick=True)
    found = gpu_phases.compare_with_float64("batchnorm", "pytorch", "float32", (4, 16, 64), args)
    assert found["correct"]
    assert 0 < found["errors"]["y"] < 1e-6
    make_run = norms.make_run

    def make_wrong(norm, masks, compiler=None):
        run = make_run(norm, masks, compiler)
        is_right = norm.weight.dtype == torch.float64 or isinstance(norm, torch.nn.LayerNorm)
        return run if is_right else lambda x: [y * 1.001 for y in run(x)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "make_run", make_wrong)
        found = gpu_phases.compare_with_float64("batchnorm", "pytorch", "float32", (4, 16, 64), args)
    assert not found["correct"]
    assert found["errors"]["y"] == pytest.approx(1e-3, rel=0.01)
    use_kernels("auto")


def test_the_page_on_speed_shows_the_figures():
    page = (render.ROOT / "docs/speed.md").read_text(encoding="utf-8")
    figures = json.loads((render.FOLDER / "speed/cpu-4096.json").read_text(encoding="utf-8"))["rows"]
    row = next(row for row in figures if row["norm"] == "batchnorm")
    assert "{:.2f} [{:.2f}, {:.2f}]".format(row["ratio"], *row["interval"]) in page
    changed = page.replace("<!-- results cpu-norms -->", "<!-- results cpu-norms -->\nold")
    assert render.fill(changed) == page
