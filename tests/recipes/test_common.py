"""What recipes share."""

import importlib
import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from hf_normswap import NormSwapSeq2SeqTrainingArguments, NormSwapTrainingArguments, swap_norm
from recipes import common, image_classification
from tests.helpers.persistence import ROOT


PAGE = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
# What a record has beside the options that were given, and the folder, which configurations named once.
ADDED = {"dataset_name", "output_dir", "train_examples", "eval_examples", "signatures"}
CONFIGS = sorted((Path(common.__file__).parent / "configs").rglob("*.yaml"))


@dataclass
class Options:
    name: str = "a"
    count: int = 1
    flag: bool = False
    sizes: list[int] = field(default_factory=lambda: [1])


def parse(*argv):
    return common.parse_arguments([common.ModelArguments, Options], ["--model_name_or_path=m", *argv])[:2]


def parse_yaml(tmp_path, text, *argv):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    model, options, given = common.parse_arguments([common.ModelArguments, Options], [str(path), *argv])
    return model, options, given


def test_an_option_is_spelled_alike_in_yaml_and_in_the_shell(tmp_path):
    text = "model_name_or_path: m\nnorm_options: {momentum: 0.2}\ncount: 3\nflag: true\nsizes: [4, 5]\n"
    shell = ["--norm_options", '{"momentum": 0.2}', "--count", "3", "--flag", "true", "--sizes", "4", "5"]
    assert parse_yaml(tmp_path, text)[:2] == parse(*shell)
    assert parse(*shell)[0].norm_options == {"momentum": 0.2}
    assert parse(*shell)[1] == Options(count=3, flag=True, sizes=[4, 5])


def test_the_shell_has_the_last_word(tmp_path):
    text = "model_name_or_path: m\ncount: 3\nsizes: [4, 5]\n"
    _, options, given = parse_yaml(tmp_path, text, "--sizes", "6", "--name=b")
    assert options == Options(name="b", count=3, sizes=[6])
    assert given == {"model_name_or_path": "m", "count": 3, "sizes": [6], "name": "b"}


@pytest.mark.parametrize("text", ["cuont: 3", "norm_option: {}"])
def test_an_unknown_key_names_the_closest(tmp_path, text):
    key = text.split(":")[0]
    closest = {"cuont": "count", "norm_option": "norm_options"}[key]
    with pytest.raises(ValueError, match=f"no option '{key}': did you mean '{closest}'"):
        parse_yaml(tmp_path, f"model_name_or_path: m\n{text}\n")
    with pytest.raises(ValueError, match=f"no option '{key}': did you mean '{closest}'"):
        parse(f"--{key}", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "three"], "count.*invalid int"),
        (["--norm_options", "momentum=0.2"], "norm_options is no JSON"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_value_is_a_value_error(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_a_configuration_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="no YAML file of options"):
        parse_yaml(tmp_path, "- just\n- a list\n")
    with pytest.raises(FileNotFoundError):
        common.parse_arguments([Options], [str(tmp_path / "absent.yaml")])


def groups_of(recipe):
    """The dataclasses of a recipe."""
    data_class = importlib.import_module(f"recipes.{recipe}").DataArguments
    if recipe == "translation":
        return [common.TextScratchArguments, data_class, NormSwapSeq2SeqTrainingArguments]
    if recipe == "image_classification":
        return [image_classification.ModelArguments, data_class, NormSwapTrainingArguments]
    return [common.FamilyArguments, data_class, NormSwapTrainingArguments]


def read_records():
    """The runs of the recipes, by their paths in the folder of results."""
    for path in sorted(ROOT.glob("results/*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if re.match(r"python -m recipes\.(glue|ner|image_classification|lm|translation) ", record.get("command", "")):
            yield f"{path.parent.name}/{path.name}", record


RECORDS = dict(read_records())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_can_be_read(path):
    recipe = path.parent.name
    more = ["--model_name_or_path=m"] if recipe in ("glue", "ner") else []
    argv = [str(path), "--use_cpu", "--norm=rbn", "--placement=pre", "--seed=7", *more]
    *parsed, given = common.parse_arguments(groups_of(recipe), argv)
    assert yaml.safe_load(path.read_text()).keys() <= given.keys()
    assert common.name_output(*parsed, argv) == f"./outputs/{path.stem}-rbn-pre-7"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_says_whether_it_was_run(path):
    used = any(f" recipes/configs/{path.parent.name}/{path.name} " in run["command"] for run in RECORDS.values())
    assert path.read_text().startswith("# Never run here. ") == (not used)
    row = re.search(rf"\(configs/{path.parent.name}/{path.name}\) .*\| (yes|no) \|$", PAGE, re.MULTILINE)
    assert row
    assert row[1] == ("yes" if used else "no")


@pytest.mark.parametrize("name", RECORDS)
def test_the_command_of_a_record_gives_its_arguments(name):
    """Whatever the configuration has become since."""
    record = RECORDS[name]
    words = shlex.split(record["command"])
    *parsed, given = common.parse_arguments(groups_of(words[2].partition(".")[2]), [str(ROOT / words[3]), *words[4:]])
    told = {name: value for name, value in record["arguments"].items() if name not in ADDED}
    found = {name: getattr(group, name) for group in parsed for name in vars(group) if name in told}
    assert {name: found[name] for name in told} == told
    # What an earlier version said by its defaults: that a run is of LayerNorm, the weights of RBN's penalty.
    assert given.keys() - {"norm", "norm_options", "output_dir"} <= record["arguments"].keys()


def test_the_default_folder_of_a_run():
    def name(*argv):
        argv = ["--model_name_or_path=m", *argv]
        *parsed, _ = common.parse_arguments(groups_of("glue"), argv)
        return common.name_output(*parsed, argv)

    assert name("--task_name=mrpc") == "./outputs/mrpc-42"
    assert name("--task_name=mrpc", "--norm=Power-Norm", "--seed=3") == "./outputs/mrpc-powernorm-3"
    text = ["--dataset_name=stanfordnlp/imdb", "--text_columns", "text", "--placement=post"]
    assert name(*text) == "./outputs/imdb-post-42"


def test_an_error_is_one_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit, common.one_sentence_errors():
        raise ValueError("What is wrong.\nAnd a page of explanation.")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: What is wrong.\n"


@pytest.mark.parametrize(
    ("options", "variable", "is_shown"),
    [
        ([], None, False),
        ([], "0", False),
        ([], "1", True),
        (["--debug"], None, True),
        (["--debug", "--count=2"], None, True),
        (["--debug", "underflow_overflow"], None, False),  # of the Trainer
    ],
)
def test_the_traceback_behind_an_error(options, variable, is_shown, monkeypatch, capsys):
    monkeypatch.setenv("HF_NORMSWAP_DEBUG", variable or "")  # set, so that it is as before after the test
    groups = [common.ModelArguments, Options, NormSwapTrainingArguments]
    *_, given = common.parse_arguments(groups, ["--model_name_or_path=m", "--output_dir=o", "--use_cpu", *options])
    assert ("debug" in given) == ("underflow_overflow" in options)
    with pytest.raises(SystemExit) as exit, common.one_sentence_errors():
        common.read_json_object("norm_options", "no JSON")
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: norm_options is no JSON object")
    assert (lines[0] == "Traceback (most recent call last):") == is_shown
    assert any("json/decoder.py" in line for line in lines) == is_shown  # what caused it, too


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(TypeError), common.one_sentence_errors():
        len(3)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    arguments = NormSwapTrainingArguments(str(tmp_path), use_cpu=True)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    common.check_processes(arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched but 1 would train together"):
        common.check_processes(arguments)


def test_a_launcher_that_starts_one_process_of_several_is_refused(tmp_path, monkeypatch):
    # The environment that `accelerate launch --cpu --num_processes 2` gives to the one process that it starts.
    arguments = NormSwapTrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="one process of several"):
        common.check_processes(arguments)


def test_the_checkpoint_to_resume_from(tmp_path, model_folder):
    output = tmp_path / "output"

    def find(path):
        return common.find_checkpoint(
            NormSwapTrainingArguments(str(output), use_cpu=True, resume_from_checkpoint=path)
        )

    assert find(None) is None
    assert find("auto") is None
    for path in ("true", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match="no checkpoint to resume from"):
            find(path)
    weights = Path(model_folder, "model.safetensors").read_bytes()
    for step in (2, 10):
        (output / f"checkpoint-{step}").mkdir(parents=True)
        (output / f"checkpoint-{step}" / "model.safetensors").write_bytes(weights)
        (output / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert find("true") == find("auto") == str(output / "checkpoint-10")
    (output / "checkpoint-10" / "model.safetensors").write_bytes(weights[:-1000])
    assert find("true") == str(output / "checkpoint-2")
    with pytest.raises(ValueError, match="is damaged"):
        find(str(output / "checkpoint-10"))
    (output / "checkpoint-2" / "trainer_state.json").write_text('{"epoch"')
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        find("true")
    with pytest.raises(ValueError, match="was not written to its end"):
        find(str(output / "checkpoint-2"))


def test_a_result_names_no_folder_of_the_machine(model_folder):
    class FakeTrainer:
        model = swap_norm(AutoModelForSequenceClassification.from_pretrained(model_folder), "rbn")
        args = NormSwapTrainingArguments("output", use_cpu=True, seed=7)
        state = type("State", (), {"log_history": [{"loss": 1.0, "step": 1}]})

    result = common.make_result("rte", model_folder, FakeTrainer, {"accuracy": 0.5}, {"max_steps": 1})
    assert result["model"] == Path(model_folder).name
    assert (result["task"], result["norm"], result["seed"]) == ("rte", "rbn", 7)
    assert model_folder not in json.dumps(result)


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        (["--model_name_or_path=models/bert"], ["--model_name_or_path=./models/bert"]),
        (["--model-name-or-path", "models/bert"], ["--model-name-or-path", "./models/bert"]),
        (["--model_name_or_path", "./models/bert"], ["--model_name_or_path", "./models/bert"]),
        (["--model_name_or_path", "models/gone"], ["--model_name_or_path", "models/gone"]),
        (
            ["--model_name_or_path", "models/bert", "--name", "models"],
            ["--model_name_or_path", "./models/bert", "--name", "models"],
        ),
    ],
)
def test_a_folder_is_recorded_as_no_id_of_the_hub(given, recorded, tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    os.symlink(model_folder, "models/bert")
    monkeypatch.setattr("sys.argv", ["recipes/glue.py", *given])
    model_args, _, options = common.parse_arguments([common.ModelArguments, Options])
    model = swap_norm(AutoModelForSequenceClassification.from_pretrained(model_folder), "rbn")
    run = common.describe_run(model, model_args.model_name_or_path, 0, 1)
    assert run["command"] == " ".join(["python -m recipes.glue", *recorded])
    path = model_args.model_name_or_path
    assert options["model_name_or_path"] == path == ("models/gone" if "models/gone" in given else "./models/bert")
    assert run["model"] == ("models/gone" if "models/gone" in given else "bert")
