"""Data sets and models of the recipes."""

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from common import ModelArguments
from hf_normswap import find_norms, swap_norm
from loading import load_splits, load_swapped
from tests.recipes.conftest import write_task


def test_a_folder_that_changed_is_read_again(tmp_path):
    for count in (4, 6):
        folder = write_task(tmp_path / "data", "rte", {"train": count})
        assert len(load_splits(folder, "rte", ["train"], ["sentence"])["train"]) == count


def test_only_the_splits_asked_for_are_returned(tmp_path):
    folder = write_task(tmp_path / "data", "rte", {"train": 4, "validation": 3, "test": 2})
    assert list(load_splits(folder, "rte", ["validation", "train"], [])) == ["validation", "train"]


def load(path, **options):
    return load_swapped(AutoModelForSequenceClassification, ModelArguments(path, **options))[1]


def test_norms_are_swapped_as_the_arguments_say(model_folder):
    model = load(model_folder, norm="rbn", norm_options={"lambda_mean": 0.3}, where=["attention"])
    kinds = {site.sublayer: site.kind for site in find_norms(model)}
    assert kinds == {"embedding": "layernorm", "attention": "rbn", "ffn": "layernorm"}
    assert {site.module.lambda_mean for site in find_norms(model) if site.kind == "rbn"} == {0.3}


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
