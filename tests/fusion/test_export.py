"""Ahead-of-time compilation: a folded model as a package that torch runs without this code."""

import shutil

import pytest
import torch

from hf_normswap import fold_norms
from tests.helpers.folding import relative_error, swapped
from tests.helpers.models import tiny_batch
from tests.helpers.persistence import outputs, run_fresh


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor(tmp_path):
    model = swapped("bert", dtype=torch.float32, num_hidden_layers=1)
    fold_norms(model)
    traced = tiny_batch(model, labels=False)
    any_size = {name: dict.fromkeys(range(2), torch.export.Dim.AUTO) for name in traced}
    with torch.no_grad():
        program = torch.export.export(model, (), traced, dynamic_shapes=any_size)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    other = tiny_batch(model, lengths=(9, 4, 2), labels=False)
    torch.save(other, tmp_path / "batch.pt")
    script = """
import torch, transformers.modeling_outputs  # which tells torch how to make an output
model = torch._inductor.aoti_load_package("model.pt2")
torch.save(model(**torch.load("batch.pt"))["logits"], "logits.pt")
"""
    run_fresh(script, tmp_path, package=False)
    assert relative_error(outputs(model, other), {"logits": torch.load(tmp_path / "logits.pt")}) < 1e-5
