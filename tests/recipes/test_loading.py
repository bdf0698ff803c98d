"""Data sets and models of the recipes."""

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from hf_normswap import find_norms, swap_norm
from recipes.common import ModelArguments
from recipes.loading import load_splits, load_swapped
from tests.helpers.recipes import write_task


def test_a_folder_that_changed_is_read_again(tmp_path):
    for count in (4, 6):
        folder = write_task(tmp_path / "data", "rte", {"train": count})
        assert len(load_splits(folder, "rte", ["train"], ["sentence"])["train"]) == count


def test_only_the_splits_asked_for_are_returned(tmp_path):
    folder = write_task(tmp_path / "data", "rte", {"train": 4, "validation": 3, "test": 2})
    assert list(load_splits(folder, "rte", ["validation", "train"], [])) == ["validation", "train"]


def load(path, **options):
    texts = Dataset.from_dict({"sentence": ["the plot was good", "a dull film", "very bright", "the film is not bad"]})
    return load_swapped(AutoModelForSequenceClassification, ModelArguments(path, **options), texts)[1]


def test_norms_are_swapped_as_the_arguments_say(model_folder):
    model = load(model_folder, norm="rbn", norm_options={"lambda_mean": 0.3}, where=["attention"])
    kinds = {site.sublayer: site.kind for site in find_norms(model)}
    assert kinds == {"embedding": "layernorm", "attention": "rbn", "ffn": "layernorm"}
    assert {site.module.lambda_mean for site in find_norms(model) if site.kind == "rbn"} == {0.3}


def test_norms_are_calibrated_on_training_texts(model_folder):
    model = load(model_folder, norm="rbn", where=["all"], calibrate=3)
    assert len(model.config.norm_swap["calibration"]) == len(find_norms(model))
    assert "calibration" not in load(model_folder, calibrate=3).config.norm_swap  # the LayerNorm baseline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": -1}, "calibrate"),
        ({"progressive": 1.5}, "progressive"),
        ({"calibrate": 4, "progressive": 0.5}, "choose one"),
    ],
)
def test_ways_to_swap_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments("some model", **options)


def test_without_a_norm_the_model_is_the_layernorm_baseline(model_folder):
    model = load(model_folder)
    assert [entry["norm"] for entry in model.config.norm_swap["norms"]] == ["layernorm"]


def test_a_swapped_checkpoint_keeps_its_norms(model_folder, tmp_path):
    stock = AutoModelForSequenceClassification.from_pretrained(model_folder)
    swap_norm(stock, "powernorm").save_pretrained(tmp_path / "swapped")
    for file in Path(model_folder).glob("token*"):
        (tmp_path / "swapped" / file.name).write_bytes(file.read_bytes())
    path = str(tmp_path / "swapped")
    for norm in (None, "powernorm", "Power-Norm"):
        assert {site.kind for site in find_norms(load(path, norm=norm))} == {"layernorm", "powernorm"}
    for options in ({"norm": "rbn"}, {"where": ["attention"]}, {"norm_options": {"num_groups": 1}}):
        with pytest.raises(ValueError, match="swapped already, to powernorm"):
            load(path, **options)


def test_a_data_set_with_a_script_is_refused(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "old.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(ValueError, match="'.*old' cannot be read without running its code"):
        load_splits(str(folder), None, ["train"], ["text"])
