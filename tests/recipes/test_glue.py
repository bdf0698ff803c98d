"""The recipe of GLUE, on tiny data."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Value, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from hf_normswap import find_norms
from hf_normswap.reporting.card import render_card
from hf_normswap.reporting.results import load_results
from recipes import glue
from tests.helpers.hub_ids import unknown_ids
from tests.helpers.persistence import ROOT
from tests.helpers.recipes import write_task


PAIRS = ("sentence1", "sentence2")
# The task as https://gluebenchmark.com/tasks has it: columns, classes (0: a similarity), scores.
TASKS = {
    "cola": (("sentence",), 2, {"matthews_correlation"}),
    "sst2": (("sentence",), 2, {"accuracy"}),
    "mrpc": (PAIRS, 2, {"accuracy", "f1"}),
    "qqp": (("question1", "question2"), 2, {"accuracy", "f1"}),
    "stsb": (PAIRS, 0, {"pearson", "spearmanr"}),
    "mnli": (("premise", "hypothesis"), 3, {"matched_accuracy", "mismatched_accuracy"}),
    "qnli": (("question", "sentence"), 2, {"accuracy"}),
    "rte": (PAIRS, 2, {"accuracy"}),
    "wnli": (PAIRS, 2, {"accuracy"}),
}


@pytest.fixture
def run(tmp_path, model_folder):
    def run(task, data, *options, norm="batchnorm", model=model_folder):
        glue.main(
            [
                f"--task_name={task}",
                f"--dataset_name={data}",
                f"--model_name_or_path={model}",
                f"--norm={norm}",
                f"--output_dir={tmp_path / 'output'}",
                "--max_length=20",
                "--max_steps=2",
                "--learning_rate=0.01",
                "--logging_steps=1",
                "--use_cpu",
                "--disable_tqdm=true",
                *options,
            ]
        )
        return load_results(tmp_path / "output" / "result.json")[0]

    return run


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_is_scored_by_its_own_metrics(task, run, tmp_path, capsys):
    columns, classes, scores = TASKS[task]
    splits = {"train": 16, "validation": 8}
    if task == "mnli":
        splits = {"train": 16, "validation_matched": 8, "validation_mismatched": 7}
    data = write_task(
        tmp_path / "glue", task, splits, columns, classes or 1, label_type=None if classes else Value("float32")
    )
    result = run(task, data, "--eval_strategy=steps", "--eval_steps=2")
    assert set(result["metrics"]) == scores
    assert (result["task"], result["norm"], result["seed"]) == (task, "batchnorm", 42)
    assert result["arguments"]["eval_examples"] == sum(splits.values()) - 16
    last = result["history"][-2] if task != "mnli" else result["history"][-3] | result["history"][-2]
    for score, value in result["metrics"].items():
        assert last[f"eval_{score}"] == pytest.approx(value)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    assert model.config.num_labels == (classes or 1)
    printed = capsys.readouterr().out
    assert task in printed
    assert "batchnorm" in printed


def test_the_score_is_that_of_the_saved_model(run, sst2, tmp_path):
    result = run("sst2", sst2, norm="powernorm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    rows = load_dataset(sst2, "sst2", split="validation")
    with torch.no_grad():
        right = [
            int(model(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax()) == row["label"]
            for row in rows
        ]
    assert result["metrics"]["accuracy"] == np.mean(right)
    assert any("tid_var_max" in entry for entry in result["history"])


@pytest.mark.parametrize("precision", ["--bf16=false", "--bf16=true"])
def test_a_model_that_is_converted_after_its_training_is_scored_twice(precision, run, sst2, tmp_path):
    result = run("sst2", sst2, "--convert=24", "--distill=2", precision, norm="layernorm")
    assert set(result["metrics"]) == {"accuracy", "converted_accuracy"}
    assert result["norm"] == "layernorm"
    assert result["conversion"]["norm"] == "batchnorm"
    assert result["conversion"]["distillation"] is not None
    trained, converted = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        for folder in ("output", "output/converted")
    )
    assert {site.kind for site in find_norms(trained)} == {"layernorm"}
    assert {site.kind for site in find_norms(converted)} == {"batchnorm"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output/converted")
    rows = load_dataset(sst2, "sst2", split="validation")
    for name, model in ("accuracy", trained), ("converted_accuracy", converted):
        with torch.no_grad():
            logits = [model.eval()(**tokenizer(row["sentence"], return_tensors="pt")).logits for row in rows]
        right = [int(each.argmax()) == row["label"] for each, row in zip(logits, rows, strict=True)]
        assert result["metrics"][name] == np.mean(right)


def test_statistics_that_are_estimated_once_more_are_those_of_the_training_examples(run, sst2, tmp_path):
    result = run("sst2", sst2, "--reestimate=40", "--bf16=true", norm="batchnorm")
    assert set(result["metrics"]) == {"accuracy", "reestimated_accuracy"}
    texts = load_dataset(sst2, "sst2", split="train")["sentence"][:]
    assert result["reestimation"] == {"examples": len(texts)}
    trained, reestimated = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        for folder in ("output", "output/reestimated")
    )
    for (name, before), after in zip(trained.named_parameters(), reestimated.parameters(), strict=True):
        assert torch.equal(before, after), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output/reestimated")
    inputs, seen = tokenizer(texts, padding=True, return_tensors="pt"), []
    last = find_norms(reestimated)[-1].module
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        reestimated(**inputs)
    torch.testing.assert_close(last.running_mean, seen[0][inputs["attention_mask"].bool()].mean(0))


def test_a_conversion_without_enough_examples_leaves_the_result_of_the_training(run, sst2, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("sst2", sst2, "--convert=1", "--per_device_train_batch_size=2", norm="layernorm")
    assert "error: " in capsys.readouterr().err
    (result,) = load_results(tmp_path / "output" / "result.json")
    assert set(result["metrics"]) == {"accuracy"}
    assert not (tmp_path / "output" / "converted").exists()


@pytest.mark.parametrize(
    ("options", "norm", "message"),
    [
        (["--convert=8"], "rbn", "convert replaces LayerNorms after the training: leave out norm=rbn."),
        (["--distill=8"], "layernorm", "distill trains a converted model: pass convert, too."),
        (
            ["--reestimate=8"],
            "layernorm",
            "layernorm has no running statistics: leave out reestimate, or pass another",
        ),
        (["--reestimate=-1"], "rbn", "reestimate is a number of examples, not -1."),
        (["--convert=-1"], "layernorm", "convert and distill are numbers of examples and steps, not -1 and 0."),
    ],
)
def test_what_cannot_follow_a_training_is_refused(options, norm, message, run, sst2, refused):
    refused(lambda: run("sst2", sst2, *options, norm=norm), message)


def test_the_card_of_a_run_on_folders_names_no_id(run, sst2, model_folder, tmp_path, monkeypatch):
    """Relative paths, with the form of ids of the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "outputs/base")
    shutil.move(sst2, "data/glue")
    argv = ["recipes/glue.py", "--dataset_name", "data/glue", "--model_name_or_path=outputs/base"]
    monkeypatch.setattr(sys, "argv", argv)
    result = run("sst2", "data/glue", model="outputs/base")
    shutil.rmtree("data")
    shutil.rmtree("outputs/base")
    card = render_card([result], norm="batchnorm")
    assert not unknown_ids(str(card))
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "# base with batchnorm" in card.text


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, sst2, assert_resumes):
    assert_resumes(functools.partial(run, "sst2", sst2, norm="rbn"))


def test_gpt2_is_padded_with_its_end_of_text(run, sst2, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=4, n_positions=24)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    assert set(run("sst2", sst2, model=tmp_path / "gpt2")["metrics"]) == {"accuracy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name=nowhere/at-all"], "There is no data set 'nowhere/at-all'"),
        (["--dataset_config_name=sts2"], "has no configuration 'sts2'"),
        (["--task_name=mrpc", "--dataset_config_name=sst2"], "has no column 'sentence1', only sentence, label"),
        (["--task_name=mnli", "--dataset_config_name=sst2"], "has no split 'validation_matched', only train"),
        (["--task_name=sst3"], "invalid choice: 'sst3'"),
        (["--norm=powrnorm"], "There is no norm 'powrnorm': did you mean 'powernorm'"),
        (['--norm_options={"momentun": 0.1}'], "did you mean 'momentum'?"),
        (["--where=enkoder"], "where='enkoder' names no norms"),
        (["--model_name_or_path=nowhere/at-all"], "nowhere/at-all cannot be loaded"),
        (["--max_length=4000"], "the model takes 24 tokens at most"),
        (["--max_step=3"], "did you mean 'max_steps'?"),
        (["--resume_from_checkpoint=true"], "no checkpoint to resume from"),
        (["--learning_rate=fast"], "invalid float value: 'fast'"),
        (["--model_type=bert"], "Say either model_name_or_path, to go on, or model_type"),
        (["--early_stopping=2"], "pass load_best_model_at_end"),
        (["--early_stopping=-1"], "early_stopping is a number of evaluations, not -1"),
        (["--validation_share=1.5"], "validation_share is a share of the training split, not 1.5"),
        (["--validation_share=0.1", "--validation_split=validation"], "leave out validation_split"),
        (["--test_split=test"], "has no split 'test', only train"),
        (["--task_name=mnli", "--validation_share=0.1"], "MNLI is scored on its two validation splits"),
        (["--task_name=mnli", "--test_split=validation"], "MNLI is scored on its two validation splits"),
    ],
)
def test_bad_input_is_refused(run, sst2, refused, options, message):
    refused(lambda: run("sst2", sst2, *options), message)


def test_a_damaged_checkpoint_is_refused(run, sst2, refused, model_folder, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in Path(model_folder).iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:-1000] if file.suffix == ".safetensors" else content)
    refused(lambda: run("sst2", sst2, model=damaged), f"{damaged} cannot be loaded")


def test_an_unlabelled_split_is_refused_though_a_labelled_one_is_in_the_cache(run, refused, tmp_path):
    data = write_task(tmp_path / "glue", "sst2", {"train": 8, "validation": 8})
    rows = load_dataset(data, "sst2", split="validation").map(lambda row: {"label": -1})
    rows.to_parquet(tmp_path / "glue" / "sst2" / "validation-00000-of-00001.parquet")
    refused(lambda: run("sst2", data), "The split 'validation'")


def start(*command, **environment):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def script(sst2, model_folder, tmp_path):
    config = ROOT / "recipes" / "configs" / "glue" / "sst2.yaml"
    options = [
        "--norm",
        "powernorm",
        "--dataset_name",
        sst2,
        "--model_name_or_path",
        model_folder,
        "--output_dir",
        tmp_path / "output",
    ]
    options += [
        "--max_steps=4",
        "--eval_strategy=steps",
        "--eval_steps=2",
        "--logging_steps=2",
        "--max_length=20",
        "--use_cpu",
    ]
    return ["-m", "recipes.glue", config.relative_to(ROOT), *options]


def test_the_command_of_the_readme_runs(script, tmp_path):
    done = start(*script, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "powernorm" in done.stdout
    (result,) = load_results(tmp_path / "output" / "result.json")
    assert result["command"].startswith("python -m recipes.glue recipes/configs/glue/sst2.yaml --norm powernorm")
    assert [entry["step"] for entry in result["history"] if "eval_accuracy" in entry] == [2, 4]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_score_every_example_once(script, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = start(*launcher, *script, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    (result,) = load_results(tmp_path / "output" / "result.json")
    assert result["command"].startswith("accelerate launch --num_processes 2 -m recipes.glue")
    assert (result["metrics"]["accuracy"] * 10) == pytest.approx(round(result["metrics"]["accuracy"] * 10))
    assert done.stdout.count("runs") == 1


@pytest.mark.parametrize(("task", "labels"), [("cola", 2), ("sst2", 2), ("mrpc", 2), ("rte", 2), ("stsb", 1)])
def test_the_real_data_is_read(real_glue, task, labels):
    data, head = glue.load_task(glue.DataArguments(task_name=task, dataset_name=real_glue))
    assert head["num_labels"] == labels
    sizes = {"cola": 8551, "sst2": 67349, "mrpc": 3668, "rte": 2490, "stsb": 5749}
    assert len(data["train"]) == sizes[task]
    assert set(json.loads(json.dumps(head))) >= {"num_labels"}


def test_any_data_set_of_labelled_texts(tmp_path, model_folder):
    columns = ("headline", "body")
    data = write_task(tmp_path / "news", "default", {"train": 24, "test": 10}, columns=columns, classes=4)
    options = [f"--dataset_name={data}", f"--model_name_or_path={model_folder}", "--norm=batchnorm", "--use_cpu"]
    options += ["--text_columns", *columns, "--validation_split=test", "--max_length=20", "--max_steps=2"]
    glue.main([*options, f"--output_dir={tmp_path / 'output'}"])
    (result,) = load_results(tmp_path / "output" / "result.json")
    assert result["task"] == "news"
    assert set(result["metrics"]) == {"accuracy"}
    with pytest.raises(SystemExit):
        glue.main([*options, "--task_name=sst2", f"--output_dir={tmp_path / 'output'}"])


def test_placement_without_warm_up(run, sst2, tmp_path):
    result = run("sst2", sst2, "--placement=pre", "--where=all", "--warmup_steps=0")
    assert result["placement"] == "pre"
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output")
    assert {site.placement for site in find_norms(loaded)} == {"pre", None}
    assert {site.kind for site in find_norms(loaded)} == {"batchnorm"}


def test_the_progressive_swap_ends_as_the_norm(run, tmp_path, model_folder):
    result = run("sst2", write_task(tmp_path / "data", "sst2", {"train": 8, "validation": 4}), "--progressive=1.0")
    assert "layer_norm_share" not in result["norm_swap"]
    shares = [entry["layer_norm_share"] for entry in result["history"] if "layer_norm_share" in entry]
    assert shares == [1.0, 0.5]


SCRATCH = ["--model_type=bert", "--vocab_size=300"]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def run_scratch(tmp_path):
    """Two columns of text, so that pairs are encoded; a validation split is made, and the test split is scored."""

    def run_scratch(*options):
        data = tmp_path / "pairs"
        if not data.exists():
            write_task(data, "default", {"train": 40, "test": 10}, columns=PAIRS)
        fixed = [f"--dataset_name={data}", "--text_columns", *PAIRS, *SCRATCH, "--max_length=24", "--use_cpu"]
        fixed += [f"--config_overrides={json.dumps(TINY)}", "--validation_share=0.25", "--test_split=test"]
        fixed += ["--norm=rbn", "--placement=pre", "--learning_rate=0.01", "--disable_tqdm=true"]
        glue.main([*fixed, f"--output_dir={tmp_path / 'output'}", *options])
        return load_results(tmp_path / "output" / "result.json")[0]

    return run_scratch


def test_from_scratch_with_a_part_of_the_training_split_held_out(run_scratch, tmp_path):
    result = run_scratch("--max_steps=2")
    assert set(result["metrics"]) == {"accuracy", "test_accuracy"}
    assert (result["model"], result["placement"]) == ("bert from scratch", "pre")
    assert result["arguments"]["train_examples"] == 30
    assert result["arguments"]["eval_examples"] == 20
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "output").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    whole = load_dataset(str(tmp_path / "pairs"), cache_dir=tmp_path / "cache")
    held_out = whole["train"].train_test_split(0.25, seed=0)["test"]
    for prefix, rows in {"": held_out, "test_": whole["test"]}.items():
        with torch.no_grad():
            right = [
                model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits.argmax().item()
                == row["label"]
                for row in rows
            ]
        assert result["metrics"][f"{prefix}accuracy"] == np.mean(right)


def test_the_text_of_a_pair_is_told_from_the_other(run_scratch, tmp_path):
    run_scratch("--max_steps=1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    ids = tokenizer("good film", "bad plot")["input_ids"]
    assert tokenizer.decode(ids).replace(" ", "") == "<s>goodfilm</s>badplot</s>"


def give_scores(monkeypatch, *scores):
    """Evaluations, and then the scores of the end, have these `scores`."""
    scores = iter(scores)
    metric = SimpleNamespace(compute=lambda **kwargs: {"accuracy": next(scores)})
    monkeypatch.setattr(glue, "GlueMetric", lambda task: metric)


def test_training_stops_early_and_a_resumed_run_where_it_had_stopped(run_scratch, tmp_path, monkeypatch):
    """The score of every evaluation but the second is the same or worse: two after it end the training."""
    give_scores(monkeypatch, 0.4, 0.6, 0.5, 0.6, *[0.3] * 4)
    epochs = ["--eval_strategy=epoch", "--save_strategy=epoch", "--num_train_epochs=6"]
    options = [*epochs, "--load_best_model_at_end", "--metric_for_best_model=accuracy", "--early_stopping=2"]
    result = run_scratch(*options)
    assert [entry["eval_accuracy"] for entry in result["history"] if "eval_accuracy" in entry] == [0.4, 0.6, 0.5, 0.6]
    weights = tmp_path / "output" / "model.safetensors"
    best = weights.read_bytes()
    assert best == (tmp_path / "output" / "checkpoint-8" / weights.name).read_bytes()
    weights.unlink()
    give_scores(monkeypatch, *[0.9] * 9)
    again = run_scratch(*options, "--resume_from_checkpoint=auto")
    assert weights.read_bytes() == best
    assert [entry for entry in again["history"] if "eval_accuracy" in entry] == [
        entry for entry in result["history"] if "eval_accuracy" in entry
    ]


def test_a_resumed_run_counts_on(run_scratch, tmp_path, monkeypatch):
    options = ["--eval_strategy=epoch", "--save_strategy=epoch", "--num_train_epochs=6", "--load_best_model_at_end"]
    options += ["--metric_for_best_model=accuracy", "--early_stopping=3"]
    give_scores(monkeypatch, 0.6, 0.5, 0.5, 0.5, *[0.3] * 4)
    run_scratch(*options)
    give_scores(monkeypatch, 0.5, *[0.3] * 9)
    result = run_scratch(*options, f"--resume_from_checkpoint={tmp_path}/output/checkpoint-12")  # of three epochs
    assert [entry["eval_accuracy"] for entry in result["history"] if "eval_accuracy" in entry] == [0.6, 0.5, 0.5, 0.5]
