"""Importing the package costs no more than importing transformers, and every public name is there."""

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_normswap
from tests.helpers.persistence import ROOT, run_fresh


def test_the_import_loads_no_model(tmp_path):
    script = """
import sys

from transformers.models.auto import auto_factory  # in 5.17 this loads accelerate by itself

before = set(sys.modules)
import hf_normswap

loaded = sorted(sys.modules)
print(*[name for name in loaded if name.startswith("transformers.models.") and ".modeling_" in name])
print(*[name for name in loaded if name.startswith("hf_normswap")])
others = ("peft", "datasets", "evaluate", "accelerate", "seqeval")
print(*[name for name in loaded if name in others and name not in before])

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
        *(f"hf_normswap.modeling.{name}" for name in ("backends", "configuration_normswap", "discrepancy", "moments")),
    }
    assert not others
    assert config == "NormSwapBertConfig False"


def test_training_needs_no_library_of_data_or_metrics(tmp_path):
    script = """
import sys

sys.modules |= dict.fromkeys(("datasets", "evaluate", "seqeval"))  # an import of them fails

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import hf_normswap
from hf_normswap.reporting.results import describe_environment

for name in hf_normswap.__all__:
    getattr(hf_normswap, name)
describe_environment()
sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
model = BertForSequenceClassification(BertConfig(**sizes)).eval()
rows = [{"input_ids": torch.arange(6), "labels": 0}, {"input_ids": torch.arange(6) + 2, "labels": 1}]
batches = [{"input_ids": torch.stack([row["input_ids"] for row in rows])}]
hf_normswap.swap_norm(model, "rbn", where="all", calibrate_on=batches)
args = hf_normswap.NormSwapTrainingArguments("output", max_steps=2, use_cpu=True, report_to="none", logging_steps=1)
trainer = hf_normswap.NormSwapTrainer(model, args, train_dataset=rows)
trainer.train()
print(trainer.state.global_step, hf_normswap.measure_tid(model, batches))
hf_normswap.fold_norms(model.eval())
gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).eval()
hf_normswap.convert_to_rmsnorm(gpt2, untie=True)
"""
    assert "\n2 " in run_fresh(script, tmp_path).stdout


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


def test_a_type_checker_reads_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(hf_normswap.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    # `as` the same name: only then does a type checker take an imported name for a public one.
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert sorted([*seen, "__version__"]) == hf_normswap.__all__
    assert seen == {name: hf_normswap._HOME.get(name, "kernels") for name in seen}


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
