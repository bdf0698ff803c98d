"""Folded models outside of PyTorch's eager mode: ONNX Runtime, torch.export, torch.compile."""

import pytest
import torch
from torch import nn

from hf_normswap import export_onnx, fold_norms, swap_norm
from tests.helpers.folding import norms_in, relative_error, swapped
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence, outputs
from tests.helpers.versions import BEFORE_5_23, NO_EXPORTER


pytest.importorskip("onnxruntime")
needs_the_exporter = pytest.mark.skipif(BEFORE_5_23, reason=NO_EXPORTER)
HEADS = [
    ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForMaskedLM"),
    ("marian", "MarianMTModel"),
    ("gpt2", "GPT2LMHeadModel"),
]


def folded(family, head):
    model = swapped(family, head, dtype=torch.float32)
    model.config.use_cache = False
    fold_norms(model, untie=True)
    assert norms_in(model) == []
    return model


@needs_the_exporter
@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_onnx(family, head, tmp_path):
    model = folded(family, head)
    report = export_onnx(model, tmp_path / "onnx")
    assert report.path.exists()
    assert report.norm_nodes == 0
    assert report.error < 1e-5
    assert report.opset >= 18
    if family in ("bert", "gpt2"):
        assert_same_in_openvino(model, report.path)


def assert_same_in_openvino(model, path):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    batch = tiny_batch(model, lengths=(9, 4, 2), labels=False)
    found = compiled({name: values.numpy() for name, values in batch.items()})["logits"]
    assert relative_error(outputs(model, batch), {"logits": torch.from_numpy(found)}) < 1e-5


@needs_the_exporter
@pytest.mark.slow
def test_a_layernorm_leaves_its_nodes(tmp_path):
    """The count can find something."""
    report = export_onnx(tiny_model("bert").eval(), tmp_path / "onnx")
    assert report.norm_nodes == 5


@needs_the_exporter
@pytest.mark.slow
def test_int8(tmp_path):
    """A pre-norm model bears it; a stream of scales from 1 to 1e8 does not, and nothing is written."""
    assert export_onnx(folded("gpt2", None), tmp_path / "gpt2", int8=True).error < 0.1
    model = swapped("bert", dtype=torch.float32)
    norm = model.bert.encoder.layer[0].attention.output.LayerNorm
    norm.weight.data *= torch.logspace(0, -8, 16)
    fold_norms(model, dtype=torch.float32)  # by default it keeps an affine map, and bears it, too
    with pytest.raises(ValueError, match="without int8") as error:
        export_onnx(model, tmp_path / "bert", int8=True)
    assert is_one_sentence(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]


@needs_the_exporter
def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training mode"):
        export_onnx(tiny_model("bert"), tmp_path / "onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="no empty folder"):
        export_onnx(tiny_model("bert").eval(), tmp_path / "full")
    with pytest.raises(ValueError, match="call model.float"):
        export_onnx(tiny_model("bert").half().eval(), tmp_path / "deep" / "onnx")
    model = tiny_model("gpt2", "GPT2ForSequenceClassification", pad_token_id=None).eval()
    with pytest.raises(ValueError, match="pad_token_id"):
        export_onnx(model, tmp_path / "onnx")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_torch_export(family, head):
    model = folded(family, head)
    batch = tiny_batch(model, labels=False)
    if family == "marian":
        batch["decoder_input_ids"] = batch.pop("labels", batch["input_ids"]).clamp(min=0)
    program = torch.export.export(model, (), kwargs=batch)
    assert not any("norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    with torch.no_grad():
        error = relative_error(dict(model(**batch)), dict(program.module()(**batch)))
    assert error < 1e-6


@pytest.mark.slow
def test_torch_compile():
    model = folded("bert", None)
    batch = tiny_batch(model, labels=False)
    with torch.no_grad():
        expected = dict(model(**batch))
        compiled = torch.compile(model, fullgraph=True)
        assert relative_error(expected, dict(compiled(**batch))) < 1e-5


def test_linear_layers_of_gpt2_are_not_transposed_twice():
    """Conv1D keeps its weights as (in, out)."""
    model = swap_norm(tiny_model("gpt2").double().eval(), "affine", where="all")
    before = model(input_ids=torch.arange(6)[None]).logits
    fold_norms(model, untie=True)
    assert not isinstance(model.transformer.h[0].attn.c_attn, nn.Linear)
    torch.testing.assert_close(model(input_ids=torch.arange(6)[None]).logits, before, rtol=1e-10, atol=1e-12)
