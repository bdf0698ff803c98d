"""The command line, end to end on tiny checkpoints."""

import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperProcessor,
)

import hf_normswap.cli.calibrate as verb
from hf_normswap import TidHistory, calibrate, find_norms, measure_tid, set_norm_placement, swap_norm
from hf_normswap.cli import main
from hf_normswap.cli.checkpoints import load_checkpoint
from hf_normswap.cli.reports import print_json
from hf_normswap.reporting.results import compare_results, load_results, write_result
from tests.helpers.architectures import tiny_architecture
from tests.helpers.checkpoint import TEXTS, save_stock
from tests.helpers.models import tiny_model
from tests.helpers.persistence import ROOT, outputs, run_fresh, same
from tests.helpers.versions import BEFORE_5_23, NO_EXPORTER


AUTO_CLASSES = {
    "bert": AutoModelForSequenceClassification,
    "roberta": AutoModelForMaskedLM,
    "marian": AutoModelForSeq2SeqLM,
    "gpt2": AutoModelForCausalLM,
}


def save_dataset(folder, columns):
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(columns).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n  \n", encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache")


def refusal(capsys, *arguments):
    """The one sentence that a command ends with."""
    assert main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert not said.out
    last = said.err.splitlines()[-1]  # progress bars may stand before it
    assert last.startswith("error: ")
    assert "Traceback" not in said.err
    return last


def distance(model, stock):
    """Relative distance of what two models return for other inputs than they were calibrated on."""
    ours, theirs = outputs(model)["logits"], outputs(stock)["logits"]
    return ((ours - theirs).norm() / theirs.norm()).item()


def in_python(auto_class, stock, norm):
    """What the command line shall make of a checkpoint and TEXTS."""
    tokenizer = AutoTokenizer.from_pretrained(stock)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sample = Dataset.from_dict({"text": TEXTS}).shuffle(seed=0)
    return swap_norm(auto_class.from_pretrained(stock), norm, calibrate_on=sample, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("family", "norm"), [("bert", "rbn"), ("roberta", "batchnorm"), ("marian", "rbn"), ("gpt2", "powernorm")]
)
def test_the_saved_model_is_that_of_python(family, norm, tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock", family)
    assert main(["calibrate", stock, str(tmp_path / "made" / "rbn"), "--norm", norm, "--texts", texts]) == 0

    auto = AUTO_CLASSES[family]
    model = auto.from_pretrained(tmp_path / "made" / "rbn")
    assert type(model).__name__ == f"NormSwap{type(tiny_model(family)).__name__}"
    python = in_python(auto, stock, norm)
    assert model.config.norm_swap == python.config.norm_swap
    assert same(model.state_dict(), python.state_dict())
    assert distance(model, python) < 1e-6  # weights that came from a file may be aligned differently

    untouched = auto.from_pretrained(stock)
    assert distance(model, untouched) < 0.7 * distance(swap_norm(auto.from_pretrained(stock), norm), untouched)

    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["R²", "error", "tokens", "sinks", "name"]
    assert len(table) == 2 + sum(len(entry["modules"]) for entry in model.config.norm_swap["norms"])
    assert table[-1] == f"saved in {tmp_path / 'made' / 'rbn'}"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".cache") == ["made", "stock", "texts.txt"]


def test_a_process_of_its_own(tmp_path):
    """Texts from standard input, JSON and nothing else to standard output, and a model for plain Auto classes."""
    stock = save_stock(tmp_path / "stock")
    (tmp_path / "new").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hf_normswap", "calibrate", stock, "new", *"--norm RBN --texts - --json".split()],
        input="\n".join(TEXTS),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "without calibration" not in done.stderr
    report = json.loads(done.stdout)
    assert report["output"] == "new"
    assert [fit["name"] for fit in report["fits"]] == [
        f"bert.encoder.layer.{layer}.{norm}.LayerNorm" for layer in (0, 1) for norm in ("attention.output", "output")
    ]
    for fit in report["fits"]:
        assert fit.keys() == {"name", "r2", "error", "tokens", "sinks", "is_last"}
        assert fit["tokens"] == sum(len(text.split()) for text in TEXTS)
        assert 0.5 < fit["r2"] <= 1

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    assert distance(model, in_python(AutoModelForSequenceClassification, stock, "rbn")) < 1e-5  # of float32
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_where_and_norm_options(tmp_path, texts):
    stock = save_stock(tmp_path / "stock", "gpt2")
    options = '{"alpha_fwd": 0.8, "group_scaling": true}'
    command = ["calibrate", stock, str(tmp_path / "pn"), "--texts", texts, "--norm", "pn", "--norm_options", options]
    assert main([*command, "--where", "final", "ffn"]) == 0
    (entry,) = AutoConfig.from_pretrained(tmp_path / "pn").norm_swap["norms"]
    assert entry["norm"] == "powernorm"
    assert entry["options"]["alpha_fwd"] == 0.8
    assert entry["options"]["group_scaling"] is True
    assert entry["modules"] == ["transformer.h.0.ln_2", "transformer.h.1.ln_2", "transformer.ln_f"]


def test_rmsnorms_get_the_shift_that_python_gives_them(tmp_path, texts):
    stock = save_stock(tmp_path / "stock")
    tiny_architecture("llama")[0].save_pretrained(stock)
    assert main(["calibrate", stock, str(tmp_path / "new"), "--norm", "batchnorm", "--texts", texts]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    python = in_python(AutoModelForCausalLM, stock, "batchnorm")
    assert model.config.norm_swap == python.config.norm_swap
    assert same(model.state_dict(), python.state_dict())
    assert model.model.layers[0].input_layernorm.bias is not None


def test_the_tokenizer_is_saved_as_it_came(tmp_path, texts):
    stock = save_stock(tmp_path / "stock", "gpt2")
    assert main(["calibrate", stock, str(tmp_path / "new"), "--norm", "rbn", "--texts", texts]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.pad_token is None
    assert tokenizer(TEXTS).input_ids == AutoTokenizer.from_pretrained(stock)(TEXTS).input_ids


def test_a_swapped_checkpoint_is_calibrated_as_it_is(tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock", "roberta")
    model = swap_norm(AutoModelForMaskedLM.from_pretrained(stock), "batchnorm", where="ffn")
    model.save_pretrained(tmp_path / "swapped")
    AutoTokenizer.from_pretrained(stock).save_pretrained(tmp_path / "swapped")

    command = ["calibrate", str(tmp_path / "swapped"), str(tmp_path / "new"), "--texts", texts]
    assert main(command) == 0
    calibrated = AutoModelForMaskedLM.from_pretrained(tmp_path / "new")
    assert set(calibrated.config.norm_swap["calibration"]) == set(model.config.norm_swap["norms"][0]["modules"])
    untouched = AutoModelForMaskedLM.from_pretrained(stock)
    assert distance(calibrated, untouched) < 0.7 * distance(model, untouched)

    capsys.readouterr()
    command[2] = str(tmp_path / "other")
    assert "swapped already, to batchnorm" in refusal(capsys, *command, "--norm", "rbn")
    command[1] = str(tmp_path / "new")
    assert "calibrated already" in refusal(capsys, *command)
    assert not (tmp_path / "other").exists()


def test_a_data_set_is_sampled_by_a_seed(tmp_path, capsys):
    stock = save_stock(tmp_path / "stock")
    data = save_dataset(tmp_path / "data", {"text": TEXTS, "source": ["a"] * 60, "label": [0, 1] * 30, "note": TEXTS})

    def run(name, *more):
        command = ["calibrate", stock, str(tmp_path / name), "--norm", "rbn", "--dataset_name", data, "--json"]
        assert main([*command, *more]) == 0
        return json.loads(capsys.readouterr().out)["fits"]

    first = run("first", "--columns", "text", "--examples", "9")
    assert run("second", "--columns", "text", "--examples", "9") == first
    sizes = [len(text.split()) for text in TEXTS]
    assert 9 * min(sizes) <= first[0]["tokens"] <= 9 * max(sizes)
    assert first[0]["tokens"] != sum(sizes[:9])  # not the first ones
    assert run("pairs", "--columns", "text", "note", "--split", "train[:20]")[0]["tokens"] == 2 * sum(sizes[:20])

    refused = ["calibrate", stock, tmp_path / "no", "--norm", "rbn", "--dataset_name", data]
    assert "'txt'" in refusal(capsys, *refused, "--columns", "txt")
    assert "test" in refusal(capsys, *refused, "--split", "test")
    assert "columns" in refusal(capsys, *refused)

    # The same folder, but other files: not what an earlier run left in a cache.
    save_dataset(tmp_path / "data", {"text": ["w5 w6"] * 4})
    assert run("third")[0]["tokens"] == 8


def test_translations(tmp_path, capsys):
    """`datasets` sorts languages, so that only the columns tell which one is the source."""
    stock = save_stock(tmp_path / "stock", "marian")
    pairs = [{"de": " ".join(reversed(text.split())) + " w7", "en": text} for text in TEXTS]
    nested = save_dataset(tmp_path / "nested", {"translation": pairs})
    flat = save_dataset(tmp_path / "flat", {"de": [p["de"] for p in pairs], "en": [p["en"] for p in pairs]})

    def run(name, data, *columns):
        command = ["calibrate", stock, str(tmp_path / name), "--norm", "rbn", "--dataset_name", data, "--json"]
        assert main([*command, "--columns", *columns]) == 0
        fits = json.loads(capsys.readouterr().out)["fits"]
        return {fit["name"].split(".")[1]: fit["tokens"] for fit in fits}

    words = sum(len(text.split()) for text in TEXTS)
    assert run("forth", nested, "en", "de") == {"encoder": words, "decoder": words + 60}
    assert run("back", nested, "de", "en") == {"encoder": words + 60, "decoder": words}
    assert run("flat_forth", flat, "en", "de") == {"encoder": words, "decoder": words + 60}

    said = refusal(capsys, "calibrate", stock, tmp_path / "no", "--norm", "rbn", "--dataset_name", nested)
    assert "--columns de en" in said


def full_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return tmp_path / "full"


def text_file(tmp_path, content):
    (tmp_path / "given.txt").write_bytes(content)
    return tmp_path / "given.txt"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: {"--texts": p / "missing.txt"}, "missing.txt"),
        (lambda p: {"--texts": text_file(p, b"\n  \n")}, "given.txt has no text"),
        (lambda p: {"--texts": text_file(p, b"\xff\xfe\x00")}, "given.txt cannot be read"),
        (lambda p: {"OUTPUT": full_folder(p)}, "full exists and is no empty folder"),
        (lambda p: {"OUTPUT": text_file(p, b"a")}, "given.txt exists and is no empty folder"),
        (lambda p: {"MODEL": p / "nothing"}, "nothing cannot be read"),
        (lambda p: {"--norm": "bachnorm"}, "did you mean 'batchnorm'"),
        (lambda p: {"--norm": "layernorm"}, "no norms to calibrate"),
        (lambda p: {"--norm": None}, "--norm rbn"),
        (lambda p: {"--norm_options": '{"momentun": 1}'}, "did you mean 'momentum'"),
        (lambda p: {"--norm_options": "momentum"}, "is no JSON object"),
        (lambda p: {"--where": "blokcs"}, "where='blokcs' names no norms"),
        (lambda p: {"--where": "decoder"}, "No norm of this BertForSequenceClassification matches"),
        (lambda p: {"--examples": "0"}, "is no number above 0"),
        (lambda p: {"--split": "test"}, "leave them out with texts"),
        (lambda p: {"--dataset_name": "x"}, "not allowed with argument"),
        (lambda p: {"--texts": None}, "--texts --images --audio --dataset_name is required"),
        (lambda p: {"--texts": None, "--dataset_name": p / "nothing"}, "nothing cannot be read"),
        (lambda p: {"--nrom": "rbn"}, "--nrom"),
    ],
)
def test_what_the_user_can_cure(change, said, tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock")
    given = {"MODEL": stock, "OUTPUT": tmp_path / "new", "--norm": "rbn", "--texts": texts, **change(tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    model, output = given.pop("MODEL"), given.pop("OUTPUT")
    options = [str(part) for item in given.items() if item[1] is not None for part in item]
    assert said in refusal(capsys, "calibrate", model, output, *options)
    assert [path for path in sorted(tmp_path.rglob("*")) if ".cache" not in path.parts] == before


def test_checkpoints_that_cannot_be_used(tmp_path, texts, capsys):
    folder = Path(save_stock(tmp_path / "stock"))
    command = ["calibrate", folder, tmp_path / "new", "--norm", "rbn", "--texts", texts]
    config = json.loads((folder / "config.json").read_text())
    for architectures in (None, ["pipeline"], ["BertForEverything"]):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        assert f"no model of transformers, but architectures {architectures}" in refusal(capsys, *command)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert "stock cannot be read" in refusal(capsys, *command)
    assert not (tmp_path / "new").exists()


def test_a_calibration_that_fails_writes_nothing(tmp_path, texts, capsys):
    def spoil(model):
        torch.nn.init.constant_(model.bert.encoder.layer[1].output.dense.weight, math.nan)

    stock = save_stock(tmp_path / "stock", change=spoil)
    said = refusal(capsys, "calibrate", stock, tmp_path / "deep" / "new", "--norm", "rbn", "--texts", texts)
    assert "not finite" in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".cache") == ["stock", "texts.txt"]


@pytest.mark.parametrize(
    ("argv", "variable", "is_shown"),
    [
        (["inspect", "./absent"], None, False),
        (["inspect", "./absent"], "0", False),
        (["inspect", "./absent"], "1", True),
        (["inspect", "./absent"], "true", True),
        (["--debug", "inspect", "./absent"], None, True),
        (["inspect", "./absent", "--debug"], None, True),
        (["inspect", "--debug", "--no-such-option"], None, True),  # the parser fails
    ],
)
def test_the_traceback_behind_an_error(argv, variable, is_shown, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_NORMSWAP_DEBUG", raising=False)
    if variable:
        monkeypatch.setenv("HF_NORMSWAP_DEBUG", variable)
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert ("Traceback (most recent call last):" in lines) == is_shown
    assert any("hf_normswap" in line and line.startswith("  File ") for line in lines) == is_shown


def test_an_interruption(tmp_path, texts, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "load_to_convert", interrupt)
    assert main(["calibrate", "stock", str(tmp_path / "new"), "--norm", "rbn", "--texts", texts]) == 130
    assert not capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == ["texts.txt"]


@pytest.mark.parametrize("has_rich", [True, False])
def test_the_table_of_a_terminal(has_rich, tmp_path, texts, capsys, monkeypatch):
    stock = save_stock(tmp_path / "stock")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["calibrate", stock, str(tmp_path / "new"), "--norm", "rbn", "--texts", texts]) == 0
    shown = capsys.readouterr().out
    assert ("┃" in shown) is has_rich
    assert "R²" in shown


def test_help_costs_no_more_than_importing_the_package(tmp_path):
    script = """
import sys
import hf_normswap
before = set(sys.modules)
from hf_normswap.cli import main
from hf_normswap.cli.checkpoints import load_checkpoint
from hf_normswap.reporting.results import compare_results, load_results, write_result
for arguments in (["--help"], ["calibrate", "--help"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
loaded = {name.split(".")[0] for name in set(sys.modules) - before if not name.startswith("hf_normswap")}
print("LOADED", *sorted(loaded - set(sys.stdlib_module_names)))
"""
    shown = run_fresh(script, tmp_path).stdout
    assert shown.splitlines()[-1].split() == ["LOADED"]
    assert "usage: normswap calibrate MODEL OUTPUT" in shown
    assert "normswap calibrate textattack/bert-base-uncased-SST-2" in shown


def test_the_console_script(capsys):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["normswap"].partition(":")
    with pytest.raises(SystemExit, match="0"):
        getattr(importlib.import_module(module), function)(["--help"])
    assert "calibrate" in capsys.readouterr().out
    assert "VERB" in refusal(capsys)
    assert "invalid choice: 'calibrat'" in refusal(capsys, "calibrat")


def test_defaults_are_those_of_python(tmp_path):
    parameters = inspect.signature(calibrate).parameters
    parser = verb.argparse.ArgumentParser()
    verb.add_arguments(parser)
    args = vars(parser.parse_args(["model", "output", "--texts", "-"]))
    for name in ("batch_size", "memory_budget"):
        assert args[name] == parameters[name].default


def test_fold(tmp_path, texts, capsys):
    """A checkpoint with LayerNorms becomes one without norms in one command, and a calibrated one does."""
    stock, swapped, folded = (str(tmp_path / name) for name in ("stock", "swapped", "folded"))
    save_stock(stock)
    options = ["--norm", "batchnorm", "--where", "all", "--texts", texts]
    assert main(["calibrate", stock, swapped, *options]) == 0
    assert main(["fold", swapped, folded]) == 0
    shown = capsys.readouterr().out
    assert "relative error of the outputs" in shown
    assert main(["fold", stock, str(tmp_path / "at-once"), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["folded"]) == 5
    assert report["kept"] == {}
    assert report["error"] < 1e-5
    auto = AUTO_CLASSES["bert"]
    before, *after = (auto.from_pretrained(folder) for folder in (swapped, folded, report["output"]))
    for model in after:
        assert find_norms(model) == []
        assert distance(model, before) < 1e-5
    assert AutoTokenizer.from_pretrained(folded)("w7")["input_ids"] == [7]


def test_fold_gains(tmp_path, capsys):
    """The norms stay, and the class."""
    stock, folded = (str(tmp_path / name) for name in ("stock", "folded"))
    save_stock(stock, "gpt2")
    assert main(["fold", stock, folded, "--gains", "--untie", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["folded"]) == 5
    before, after = (AUTO_CLASSES["gpt2"].from_pretrained(each) for each in (stock, folded))
    assert type(after) is type(before)
    norms = [site.module for site in find_norms(after)]
    assert all((norm.weight == 1).all() for norm in norms)
    assert [bool((norm.bias == 0).all()) for norm in norms] == [True, True, True, True, False]  # the head has no bias
    assert distance(after, before) < 1e-5


def test_distillation_brings_it_nearer(tmp_path, texts):
    stock = save_stock(tmp_path / "stock")
    options = ["--norm", "batchnorm", "--where", "all", "--texts", texts]
    original, errors = AUTO_CLASSES["bert"].from_pretrained(stock), []
    for name, more in (("calibrated", []), ("distilled", ["--distillation_steps", "60"])):
        assert main(["calibrate", stock, str(tmp_path / name), *options, *more]) == 0
        errors.append(distance(AUTO_CLASSES["bert"].from_pretrained(tmp_path / name), original))
    assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norm", "rbn"], "which needs data"),
        (["--distillation_steps", "5"], "which needs data"),
        (["--int8"], "int8 is for the ONNX graph: pass --onnx too"),
        (["--tolerance", "0.2"], "tolerance is for the ONNX graph: pass --onnx too"),
        (["--keep_float", "bert"], "keep_float is for the ONNX graph: pass --onnx too"),
        (["--onnx", "--int8", "static"], "needs data for the ranges"),
        (["--gains", "--affine_every", "4"], "leave it out with --gains"),
        (["--gains", "--norm", "rbn"], "leave the options of a conversion out"),
        (["--gains", "--texts", "TEXTS"], "leave the options of a conversion out"),
        ([], "has LayerNorms: pass --norm"),
        (["--norm", "rmsnorm", "--texts", "TEXTS"], "statistics of each token"),
    ],
)
def test_what_cannot_be_folded_is_not_written(options, message, tmp_path, texts, capsys):
    stock = save_stock(tmp_path / "stock")
    options = [texts if option == "TEXTS" else option for option in options]
    assert message in refusal(capsys, "fold", stock, tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(BEFORE_5_23, reason=NO_EXPORTER)
def test_fold_to_onnx(tmp_path, texts, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    stock = save_stock(tmp_path / "stock", "gpt2")
    options = ["--norm", "powernorm", "--where", "all", "--texts", texts, "--untie", "--onnx", "--json"]
    assert main(["fold", stock, str(tmp_path / "new"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onnx"]["path"] == str(tmp_path / "new" / "onnx" / "model.onnx")
    operators = {node.op_type for node in onnx.load(report["onnx"]["path"]).graph.node}
    assert not operators & {"LayerNormalization", "ReduceMean", "BatchNormalization"}


def test_a_baseline_of_the_recipes_is_one_with_layer_norms(tmp_path, texts):
    stock = save_stock(tmp_path / "stock")
    swap_norm(AUTO_CLASSES["bert"].from_pretrained(stock), "layernorm").save_pretrained(tmp_path / "baseline")
    AutoTokenizer.from_pretrained(stock).save_pretrained(tmp_path / "baseline")
    for name in ("stock", "baseline"):
        options = [str(tmp_path / name), str(tmp_path / f"{name}-rbn"), "--norm", "rbn", "--texts", texts]
        assert main(["calibrate", *options]) == 0
    of_stock, of_baseline = (
        AUTO_CLASSES["bert"].from_pretrained(tmp_path / f"{name}-rbn") for name in ("stock", "baseline")
    )
    assert same(of_stock.state_dict(), of_baseline.state_dict())
    assert of_stock.config.norm_swap == of_baseline.config.norm_swap


def save_calibrated(tmp_path, texts, norm="batchnorm"):
    stock, output = save_stock(tmp_path / "stock"), str(tmp_path / "calibrated")
    assert main(["calibrate", stock, output, "--norm", norm, "--where", "all", "--texts", texts]) == 0
    return output


def test_inspect_lists_every_norm(tmp_path, texts, capsys):
    output = save_calibrated(tmp_path, texts)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "stock")]) == 0
    heading, columns, *printed = capsys.readouterr().out.splitlines()
    assert heading == "BertForSequenceClassification (bert): 5 layernorm"
    assert columns.split()[:6] == ["norm", "stack", "sublayer", "layer", "placement", "width"]
    assert [line.split()[2:4] for line in printed[:3]] == [["embedding", "-"], ["attention", "0-1"], ["ffn", "0-1"]]
    assert main(["inspect", str(tmp_path / "stock"), "--all"]) == 0
    assert capsys.readouterr().out.count("\nlayernorm ") == 5
    assert main(["inspect", output, "--texts", texts, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert report["class"] == "NormSwapBertForSequenceClassification"
    for norm, site in zip(report["norms"], find_norms(model), strict=True):
        assert (norm["name"], norm["norm"], norm["placement"]) == (site.name, "batchnorm", site.placement)
        assert norm["sigma_max"] == pytest.approx(site.module.running_var.max().sqrt().item())
        assert norm["r2"] == model.config.norm_swap["calibration"][site.path]
        assert norm["batches"] == site.module.num_batches_tracked
        assert norm["tid_mean"] > 0


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None])
def test_inspect_needs_nothing_but_a_configuration(tmp_path, capsys, architectures):
    config = LlamaConfig(num_hidden_layers=32, architectures=architectures)  # seven billion parameters
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("(llama): 65 rmsnorm")
    assert sum(line.startswith("rmsnorm") for line in printed) == 3
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["norms"]) == 65
    config.architectures = ["NoSuchModel"]
    config.save_pretrained(tmp_path)
    assert "names no model of transformers" in refusal(capsys, "inspect", tmp_path)


def test_tid_is_that_of_python(tmp_path, texts, capsys):
    output = save_calibrated(tmp_path, texts, "powernorm")
    capsys.readouterr()
    assert main(["tid", output, "--texts", texts, "--batch_size", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["batch_size"] == 8
    model = AutoModelForSequenceClassification.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    sample = Dataset.from_dict({"text": TEXTS}).shuffle(seed=0)
    expected = measure_tid(model, sample, tokenizer=tokenizer, batch_size=8)
    for norm, tid in zip(report["norms"], expected, strict=True):
        assert (norm["name"], norm["mean"]) == (tid.name, None)
        assert norm["variance"] == pytest.approx(tid.variance)
    assert main(["tid", output, "--texts", texts]) == 0
    assert "TID of variance" in capsys.readouterr().out


def test_the_tid_of_a_training_is_drawn_and_printed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert "nothing to measure or to draw" in refusal(capsys, "tid", tmp_path)
    assert "no history of the TID" in refusal(capsys, "tid", tmp_path, "--plot", tmp_path / "tid.png")
    history = TidHistory(["a", "b"])
    for step in (10, 20):
        history.add(step, torch.tensor([[math.nan, 0.25], [0.5, 2.0 / step]]))
    history.write(tmp_path)
    assert main(["tid", str(tmp_path), "--plot", str(tmp_path / "tid.png")]) == 0
    assert (tmp_path / "tid.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["-", "0.5000", "a"], ["0.2500", "0.1000", "b"]]
    assert main(["tid", str(tmp_path), "--plot", str(tmp_path / "tid.svg"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [10, 20]


def test_depth(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["depth", "--norms", "layernorm", "--depths", "1", "2", "--width", "16", "--seeds", "2"]
    assert main([*command, "--plot", str(tmp_path / "depth.png")]) == 0
    assert capsys.readouterr().out.split("\n")[0].split() == ["norm", "placement", "slope", "L=1", "L=2"]
    assert (tmp_path / "depth.png").exists()
    assert main([*command, "--placements", "pre", "--json"]) == 0
    (slope,) = json.loads(capsys.readouterr().out)["slopes"]
    assert slope["placement"] == "pre"
    assert [len(values) for values in slope["gradients"].values()] == [2, 2]
    assert "placement is one of" in refusal(capsys, *command, "--placements", "sandwich")


@pytest.mark.parametrize(("family", "norm"), [("bert", "rbn"), ("marian", "powernorm")])
def test_swap(family, norm, tmp_path, capsys):
    stock, output = save_stock(tmp_path / "stock", family), tmp_path / "new"
    command = ["swap", stock, str(output), "--norm", norm, "--where", "encoder", "--placement", "pre"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = AUTO_CLASSES[family].from_pretrained(output)
    expected = set_norm_placement(AUTO_CLASSES[family].from_pretrained(stock), "pre")
    swap_norm(expected, norm, where="encoder")
    assert model.config.norm_swap == expected.config.norm_swap
    assert same(model.state_dict(), expected.state_dict())
    assert [norm["name"] for norm in report["norms"]] == [site.name for site in find_norms(model)]
    assert {norm["norm"] for norm in report["norms"]} == {norm, "layernorm"}
    assert AutoTokenizer.from_pretrained(output)("w7")["input_ids"][0] == 7

    command[2] = str(tmp_path / "other")
    assert "--norm" in refusal(capsys, *command[:3])
    assert "placement is one of" in refusal(capsys, *command[:-1], "middle")
    assert "already swapped to" in refusal(capsys, "swap", output, *command[2:-2])
    assert not (tmp_path / "other").exists()


def test_compare(tmp_path, capsys):
    for norm in ("layernorm", "rbn"):
        run = {"task": "rte", "model": "bert", "norm": norm, "seed": 0, "metrics": {"accuracy": 0.5, "loss": 1.0}}
        write_result(run, tmp_path / f"{norm}.json")
    table = compare_results(load_results(tmp_path))
    assert main(["compare", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{table}\n"
    assert main(["compare", str(tmp_path), "--markdown", "--metrics", "accuracy"]) == 0
    only_accuracy = compare_results(load_results(tmp_path), ["accuracy"])
    assert capsys.readouterr().out == f"{only_accuracy.to_markdown()}\n"
    assert main(["compare", str(tmp_path), "--against", "rbn"]) == 0
    assert "loss − rbn" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table.to_dict()
    (tmp_path / "empty").mkdir()
    assert "run a recipe first" in refusal(capsys, "compare", tmp_path / "empty")


def test_the_backends_of_this_machine(capsys, monkeypatch):
    assert main(["kernels"]) == 0
    heading, cpu, cuda = capsys.readouterr().out.splitlines()
    assert heading.split() == ["device", "runs", "as", "when", "state"]
    assert cpu.split()[0] == "cpu"
    assert "by default" in cpu
    assert cuda.split()[0] == "cuda"
    monkeypatch.setattr("hf_normswap.kernels.load_backend", refuse_backend)
    assert main(["kernels"]) == 0
    assert "PyTorch" in (line := capsys.readouterr().out.splitlines()[1])
    assert "does not work here: there is no compiler" in line


def refuse_backend(device):
    raise OSError("there is no compiler\nand more lines")


# Images and recordings


def save_vit(folder):
    model = tiny_architecture("vit")[0]
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """A folder of classes, with a file that is no image."""
    for number in range(12):
        path = tmp_path / "pictures" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(colours).save(path)
    (tmp_path / "pictures" / "notes.txt").write_text("none")
    return str(tmp_path / "pictures")


def test_calibrate_on_images(tmp_path, pictures, capsys):
    """A folder, its files and a data set give what `calibrate` gives on the same images."""
    stock = save_vit(tmp_path / "stock")
    files = sorted(str(path) for path in Path(pictures).rglob("*.png"))
    sources = {"folder": ["--images", pictures], "files": ["--images", *files], "set": ["--dataset_name", pictures]}
    options = ["--norm", "batchnorm", "--where", "all", "--batch_size", "5"]
    for name, source in sources.items():
        assert main(["calibrate", stock, str(tmp_path / name), *options, *source]) == 0
    capsys.readouterr()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    expected = swap_norm(AutoModelForImageClassification.from_pretrained(stock), "batchnorm", where="all")
    sample = Dataset.from_dict({"image": files}).cast_column("image", datasets.Image()).shuffle(seed=0)
    calibrate(expected, sample, tokenizer=processor, batch_size=5)
    batch = processor(images=[Image.open(file) for file in files], return_tensors="pt")
    for name in sources:
        found = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert torch.equal(found(**batch).logits, expected(**batch).logits), name
    assert main(["inspect", str(tmp_path / "folder"), "--images", pictures, "--json"]) == 0
    assert all(norm["tid_mean"] is not None for norm in json.loads(capsys.readouterr().out)["norms"])
    assert main(["tid", str(tmp_path / "folder"), "--images", pictures, "--batch_size", "6"]) == 0
    assert main(["swap", stock, str(tmp_path / "swapped"), "--norm", "rbn"]) == 0
    assert main(["fold", stock, str(tmp_path / "folded"), *options, "--images", pictures]) == 0
    assert AutoImageProcessor.from_pretrained(tmp_path / "folded").size == processor.size


def test_data_that_the_model_does_not_read(tmp_path, texts, pictures, capsys):
    vit, bert = save_vit(tmp_path / "vit"), save_stock(tmp_path / "bert")
    empty = tmp_path / "empty"
    empty.mkdir()

    def said(model, *options):
        return refusal(capsys, "calibrate", model, tmp_path / "new", "--norm", "rbn", *options)

    assert "keep the one of images with select_columns" in said(vit, "--texts", texts)
    assert "keep the one or two of text" in said(bert, "--images", pictures)
    assert "nowhere cannot be read: there is no such file" in said(vit, "--images", tmp_path / "nowhere")
    assert "empty has no image file in it" in said(vit, "--images", empty)
    assert "notes.txt has no image file" in said(vit, "--images", f"{pictures}/notes.txt")
    assert "pictures has no audio file in it" in said(vit, "--audio", pictures)
    assert "leave them out with images" in said(vit, "--images", pictures, "--split", "test")
    (empty / "torn.png").write_bytes(b"torn")
    assert "torn.png" in said(vit, "--images", empty)
    assert not (tmp_path / "new").exists()


def test_processors_of_each_kind_are_loaded(tmp_path):
    """Of Whisper and CLIP all parts, as what is saved beside the model has to be whole."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_stock(tmp_path / "bert"))
    sounds, pixels = Wav2Vec2FeatureExtractor(), ViTImageProcessorPil(size={"height": 16, "width": 16})
    made = {
        "wav2vec2": (sounds, "Wav2Vec2FeatureExtractor"),
        "vit": (pixels, "ViTImageProcessorPil"),
        "clip": (CLIPProcessor(pixels, tokenizer), "CLIPProcessor"),
        "whisper": (WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer), "WhisperProcessor"),
    }
    for name, (processor, kind) in made.items():
        tiny_architecture(name)[0].save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        assert type(load_checkpoint(str(tmp_path / name))[1]).__name__ == kind


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is not None, reason="torchcodec is here")
def test_sound_without_its_decoder(tmp_path, capsys):
    tiny_architecture("wav2vec2")[0].save_pretrained(tmp_path / "stock")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "stock")
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "one.wav").write_bytes(b"RIFF")
    options = ["--norm", "batchnorm", "--audio", tmp_path / "sounds"]
    assert "install 'torchcodec'" in refusal(capsys, "calibrate", tmp_path / "stock", tmp_path / "new", *options)


# Norms


def test_norms_are_listed(capsys):
    assert main(["norms"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "norm"
    assert {row.split()[0] for row in rows} >= {"batchnorm", "layernorm", "dyt", "frn", "unifiednorm"}
    assert main(["norms", "--markdown"]) == 0
    assert "| frn | sentence | always | no | threshold (C) |" in capsys.readouterr().out
    assert main(["norms", "--json"]) == 0
    norms = json.loads(capsys.readouterr().out)
    properties = {"statistics": "batch", "later": "in training", "affine": "yes", "parameters": "-"}
    assert norms["batchnorm"] == {"name": "batchnorm", **properties}
    assert norms["powernorm"]["affine"] == "with group_scaling=False"
    assert norms["powernorm"]["later"] == norms["layernorm"]["later"] == "no"
    assert norms["scalenorm"]["parameters"] == "in place of both: gain (1)"


def test_a_checkpoint_of_16_bits_converts_in_float32(tmp_path, texts, capsys):
    save_stock(tmp_path / "stock", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    model.bfloat16().save_pretrained(tmp_path / "stock")
    convert = ("convert", tmp_path / "stock", tmp_path / "out", "--texts", texts, "--distill", 3)
    assert "distill wants float32" in refusal(capsys, *convert)
    assert not (tmp_path / "out").exists()
    assert main([*map(str, convert), "--dtype", "float32"]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").dtype == torch.float32
    capsys.readouterr()
    fold = ("fold", tmp_path / "stock", tmp_path / "folded", "--norm", "batchnorm", "--texts", texts, "--onnx")
    assert "onnx wants float32" in refusal(capsys, *fold)
    assert (
        main(
            ["calibrate", *map(str, (tmp_path / "stock", tmp_path / "half", "--norm", "batchnorm", "--texts", texts))]
        )
        == 0
    )
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_numbers_of_a_report_that_are_not_finite_are_null(capsys):
    print_json({"scores": {"accuracy": (math.nan, 0.5)}, "list": [math.inf, {"deep": (1, math.nan)}]})
    assert json.loads(capsys.readouterr().out) == {
        "scores": {"accuracy": [None, 0.5]},
        "list": [None, {"deep": [1, None]}],
    }
