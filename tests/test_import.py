"""Importing the package costs no more than importing transformers, and every public name is there."""

import statistics
import subprocess
import sys
import time

import pytest

import hf_normswap
from tests.persistence import ROOT, run_fresh


def test_the_import_loads_no_model(tmp_path):
    script = """
import sys

import hf_normswap

loaded = sorted(sys.modules)
print(*[name for name in loaded if name.startswith("transformers.models.") and ".modeling_" in name])
print(*[name for name in loaded if name.startswith("hf_normswap")])
print(*[name for name in loaded if name in ("peft", "datasets", "evaluate", "accelerate", "seqeval")])

# Nor does the first configuration of one family load another, while the Auto classes know all of them.
from transformers import AutoConfig

config = AutoConfig.for_model("normswap_bert")
print(type(config).__name__, "transformers.models.gpt2.modeling_gpt2" in sys.modules)
"""
    models, ours, others, config = run_fresh(script, tmp_path).stdout.splitlines()
    families = ("bert", "roberta", "marian", "gpt2")
    assert not [name for name in models.split() if name.split(".")[2] in families]
    assert set(ours.split()) == {
        "hf_normswap",
        "hf_normswap.auto",
        "hf_normswap.kernels",
        "hf_normswap.kernels.ops",
        "hf_normswap.modeling",
        *(
            f"hf_normswap.modeling.{name}"
            for name in ("configuration", "discrepancy", "moments", "passes", "paths", "ranks", "slabs")
        ),
    }
    assert not others
    assert config == "NormSwapBertConfig False"


@pytest.mark.slow
def test_the_import_takes_as_long_as_that_of_transformers():
    """Whole processes, in turns, so that a busy machine slows both."""
    stock, ours = [], []
    for _ in range(5):
        for program, times in (
            ("from transformers import AutoModelForSequenceClassification", stock),
            ("import hf_normswap", ours),
        ):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
            times.append(time.perf_counter() - start)
    assert statistics.median(ours) <= 1.15 * statistics.median(stock)


@pytest.mark.parametrize("name", hf_normswap.__all__)
def test_every_public_name_is_there(name):
    assert getattr(hf_normswap, name) is not None


def test_names_are_sorted_listed_and_star_imported():
    assert hf_normswap.__all__ == sorted(set(hf_normswap.__all__))
    assert set(hf_normswap.__all__) <= set(dir(hf_normswap))
    names = {}
    exec("from hf_normswap import *", names)
    assert set(hf_normswap.__all__) <= names.keys()
    assert names["swap_norm"] is hf_normswap.swap_norm


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="'hf_normswap' has no attribute 'swap_norms'"):
        hf_normswap.swap_norms  # noqa: B018


def test_classes_and_functions_say_where_they_come_from():
    """What is shown in a traceback or a help page leads to the package."""
    for name in hf_normswap.__all__:
        value = getattr(hf_normswap, name)
        if callable(value):
            assert value.__module__.startswith("hf_normswap.")
            assert value.__doc__
