"""No text names an id on the Hub that nobody here owns: anyone may register it, and readers would run its code."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, get_session
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_normswap import push_model, swap_norm
from hf_normswap.cli import _make_parser
from hf_normswap.reporting.card import card_of_model, render_card
from hf_normswap.reporting.results import write_result
from tests.helpers.hub_ids import (
    KNOWN,
    OTHERS,
    PART,
    PLACEHOLDER,
    unknown_ids,
)
from tests.helpers.models import tiny_model
from tests.helpers.persistence import ROOT, is_one_sentence
from tests.helpers.results import RESULTS
from tests.helpers.trainer import make_trainer


# What is loaded, where it is a literal.
LOADED = re.compile(
    r"(?:(?:from_pretrained|load_dataset|snapshot_download|hf_hub_download|ModelCard\.load)\((?:\w+, )?"
    r"|pipeline\(\"[\w-]+\", |\bmodel_id = )[\"']([^\"'\n]*)[\"']"
)
COMMAND = re.compile(r"normswap\s+(?:inspect|swap|calibrate|tid|fold|push)\s+([\w./\"<][^\s`]*)")


def read(path):
    """The text of a file, without the names of records that it is rendered from; of a notebook, that of its cells."""
    text = re.sub(r"<!-- results .+? -->", "", path.read_text(encoding="utf-8"))
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


GROUPS = {
    "pages": ["*.md", "*.cff", "docs/**/*.md", "docs/*.ipynb", "recipes/*.md", "benchmarks/*.md", "results/*.md"],
    "cards": ["model_cards/*.md", "hf_normswap/templates/*"],
    "configurations": ["recipes/configs/**/*.yaml", "recipes/launch/*"],
    "sources": [
        "hf_normswap/**/*.py",
        "recipes/*.py",
        "results/*.py",
        "benchmarks/*.py",
        "model_cards/*.py",
        "docs/*.py",
    ],
}
TEXTS = {
    group: {path.relative_to(ROOT).as_posix(): read(path) for pattern in patterns for path in ROOT.glob(pattern)}
    for group, patterns in GROUPS.items()
}


@pytest.mark.parametrize("group", GROUPS)
def test_no_text_names_an_id_of_nobody(group):
    found = {path: unknown_ids(text, (ROOT / path).parent) for path, text in TEXTS[group].items()}
    assert len(found) > 5
    assert not {path: names for path, names in found.items() if names}, (
        f"write a folder as ./folder, an id to come as {PLACEHOLDER}name, and put public models and data into KNOWN"
    )


@pytest.mark.parametrize("group", GROUPS)
def test_what_a_text_loads_is_a_known_id_a_placeholder_or_an_explicit_path(group):
    """A bare name is an id, too."""
    loaded = [
        (path, name.strip("\"'"))
        for path, text in TEXTS[group].items()
        for name in [*LOADED.findall(text), *COMMAND.findall(text)]
    ]
    assert group == "configurations" or len(loaded) > 3
    for path, name in loaded:
        # Otherwise it is what the template of the cards fills in, or an argument in capitals.
        assert name in KNOWN or name.startswith(("./", PLACEHOLDER, "{{")) or name.isupper(), f"{path}: {name}"


def test_the_known_ids_are_named():
    everything = "\n".join(text for texts in TEXTS.values() for text in texts.values())
    for name in KNOWN.keys() | OTHERS.keys():
        assert name in everything, f"{name} is named nowhere: remove it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('from_pretrained("r5/btc-rbn-0", trust_remote_code=True)', "r5/btc-rbn-0"),
        ("base_model: outputs/sst2", "outputs/sst2"),
        ("see https://huggingface.co/me/bert-rbn.", "me/bert-rbn"),
        ("normswap push ./outputs/sst2 me/sst2 --private", "me/sst2"),
        ("--model_name_or_path=outputs/sst2-rbn_0.1", "outputs/sst2-rbn_0.1"),
        ('from_pretrained("./outputs/sst2") or "<your-namespace>/sst2" or /srv/sst2 or outputs/sst2-*/x.json', None),
        ("--output_dir r5/btc-rbn-0 --seed 0", None),
        ("google-bert/bert-base-uncased and recipes/glue.py", None),
    ],
)
def test_what_counts_as_an_id(text, expected):
    assert unknown_ids(text) == ({expected} if expected else set())


def test_the_help_of_the_command_line_names_none(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    parser = _make_parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    shown = [each.format_help() for each in (parser, *verbs.choices.values())]
    assert PLACEHOLDER in "".join(shown)
    assert not set().union(*map(unknown_ids, shown))


# Cards


def check_card(card, repo_id=None):
    """What holds for every card: with a push it names that id alone, without one the placeholder."""
    text = str(card)
    assert unknown_ids(text) == ({repo_id} if repo_id else set())
    assert (PLACEHOLDER in text) == (repo_id is None)
    loaded = LOADED.findall(text)
    assert len(loaded) == 2  # with the package and without it
    for name in loaded:
        assert name == repo_id if repo_id else name.startswith(PLACEHOLDER)
    check_metadata(text)


def check_metadata(text):
    """What the Hub checks of the metadata, as far as it concerns names."""
    data = ModelCard(text).data  # refuses a model-index that is none
    assert not re.search("[<>]", text.split("---")[1])
    written = yaml.safe_load(text.split("---")[1])
    for name in [written.get("base_model"), *written.get("datasets", [])]:
        if name is not None:
            validate_repo_id(name)
            assert "/" in name
    assert re.fullmatch(PART, data.model_name)
    if data.eval_results:
        assert [entry["name"] for entry in written["model-index"]] == [data.model_name]
        assert all(result.metric_value is not None for result in data.eval_results)


@pytest.mark.parametrize("name", [name for name in TEXTS["cards"] if re.search(r"cards/.*-", name)])
def test_a_card_of_the_project_has_a_placeholder_and_valid_metadata(name):
    check_card(TEXTS["cards"][name])


def test_a_card_from_results():
    for options, model_name in [({}, "bert-base-uncased-powernorm"), ({"folder": "r5/rte-0"}, "rte-0")]:
        card = render_card(RESULTS, norm="powernorm", **options)
        check_card(card)
        assert card.data.model_name == model_name
        assert card.data.base_model == "google-bert/bert-base-uncased"
    assert "`./r5/rte-0`" in card.text
    pushed = render_card(RESULTS, norm="powernorm", repo_id="user/name")
    check_card(pushed, "user/name")
    assert pushed.data.model_name == "name"


@pytest.mark.parametrize("folder", ["/srv/someone/rte 0", "../runs/rte 0", "./rte 0/", "~/rte 0"])
def test_a_card_names_no_place_on_a_disk(folder):
    card = render_card(RESULTS, norm="powernorm", folder=folder)
    check_card(card)
    assert "`./rte-0`" in card.text
    assert "someone" not in card.text
    assert card.data.model_name == "rte-0"


@pytest.mark.parametrize("option", ["repo_id", "base_model"])
@pytest.mark.parametrize("name", [f"{PLACEHOLDER}name", "./outputs/name", "/outputs/name", "a/b/c", "name", ""])
def test_what_is_no_id_is_no_id_of_a_card(option, name):
    with pytest.raises(ValueError, match=f"{option} '{re.escape(name)}' is no id on the Hub") as caught:
        render_card(RESULTS, norm="powernorm", **{option: name})
    assert is_one_sentence(caught.value)


def test_a_push_to_a_placeholder_is_refused_before_anything_is_written(monkeypatch):
    model = swap_norm(tiny_model("bert"), "rbn")
    monkeypatch.setattr(model, "save_pretrained", lambda *args, **options: pytest.fail("saved"))
    with pytest.raises(ValueError, match="repo_id '<your-namespace>/name' is no id on the Hub"):
        push_model(model, f"{PLACEHOLDER}name")


def test_a_push_that_cannot_complete_a_name_is_refused(monkeypatch):
    def fail(api):
        raise OSError("no token")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", fail)
    with pytest.raises(OSError, match=r"name could not be pushed \(OSError: no token\), and is as it was") as caught:
        push_model(swap_norm(tiny_model("bert"), "rbn"), "name")
    assert is_one_sentence(caught.value)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a swapped model from `outputs/sst2`, as the relative path that is an id too, or as an absolute one."""
    monkeypatch.chdir(tmp_path)
    swap_norm(tiny_model("bert"), "rbn").save_pretrained("outputs/sst2")
    return AutoModelForSequenceClassification.from_pretrained


@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize("is_absolute", [False, True])
def test_the_folder_of_a_model_is_no_base_model(is_absolute, is_gone, load, tmp_path):
    model = load(tmp_path / "outputs/sst2" if is_absolute else "outputs/sst2")
    if is_gone:
        shutil.rmtree("outputs")
    for repo_id in (None, "user/name"):
        card = card_of_model(model, repo_id)
        check_card(card, repo_id)
        assert card.data.base_model is None
        assert str(tmp_path) not in str(card)
        assert "# sst2 with rbn" in card.text


def test_the_data_set_in_a_folder_is_none_of_the_hub(load):
    result = RESULTS[0] | {"arguments": {"dataset_name": "./data/rte"}}
    card = render_card([result], norm="powernorm")
    check_card(card)
    assert (card.data.datasets, card.data.eval_results[0].dataset_type) == (None, "rte")


@pytest.mark.parametrize("hub_model_id", [None, "user/name"])
def test_the_trainer_names_no_id_before_a_push(hub_model_id, load):
    trainer = make_trainer("r5/run", hub_model_id=hub_model_id)
    write_result(RESULTS[0] | {"norm": "rbn"}, "r5/run/result.json")
    for results in (True, False):
        trainer.create_model_card(license="mit")
        check_card(Path("r5/run/README.md").read_text(encoding="utf-8"))
        assert "`./r5/run`" in Path("r5/run/README.md").read_text(encoding="utf-8")
        if results:
            os.unlink("r5/run/result.json")
    trainer.hub_model_id = "user/name"  # what a push sets
    trainer.create_model_card()
    check_card(Path("r5/run/README.md").read_text(encoding="utf-8"), "user/name")


@pytest.mark.parametrize("is_gone", [False, True])
def test_the_card_of_an_adapter_names_no_folder_as_its_base(is_gone, load):
    peft = pytest.importorskip("peft", minversion="0.21")
    trainer = make_trainer("r5/run", save_strategy="no")
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"])
    trainer.model = peft.get_peft_model(load("outputs/sst2"), config)
    trainer.save_model()
    if is_gone:
        shutil.rmtree("outputs")
    trainer.create_model_card()
    text = Path("r5/run/README.md").read_text(encoding="utf-8")
    assert not unknown_ids(text)
    assert set(ModelCard(text).data.tags) == {"lora", "transformers"}
    assert ModelCard(text).data.base_model is None


# What a reader does


@pytest.fixture
def no_network(monkeypatch):
    """Clients of the Hub are not told that they are offline, and a request fails the test before it is sent."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(type(get_session()), "send", lambda *args, **options: pytest.fail("the Hub was asked"))


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoTokenizer])
@pytest.mark.parametrize("trust", [False, True])
def test_a_placeholder_and_a_missing_folder_load_nothing(auto, trust, no_network):
    for name in (f"{PLACEHOLDER}sst2", "./outputs/sst2"):
        with pytest.raises((OSError, ValueError)):
            auto.from_pretrained(name, trust_remote_code=trust)
    # A relative path without the dot does ask the Hub.
    with pytest.raises(pytest.fail.Exception, match="the Hub was asked"):
        auto.from_pretrained("outputs/sst2", trust_remote_code=trust)
