"""Folded models outside of PyTorch's eager mode: ONNX Runtime, torch.export, torch.compile."""

import pytest
import torch
from torch import nn

from hf_normswap import export_onnx, fold_norms, swap_norm
from hf_normswap.core.data import split_data
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


def fine_model(**options):
    """Folded after a calibration, so that its channels are as large as those of a LayerNorm."""
    model = tiny_model("bert", num_hidden_layers=2).eval()
    swap_norm(model, "batchnorm", where="all", calibrate_on=batches_of(model))
    fold_norms(model, **options)
    return model


def batches_of(model, count=6):
    batches = [tiny_batch(model, lengths=(7, 5, 4), labels=False, seed=seed) for seed in range(count)]
    return [{**batch, "token_type_ids": torch.arange(7).remainder(2).expand(3, 7)} for batch in batches]


def graph_in(folder):
    import onnx

    return onnx.load(folder / "model.onnx").graph


@needs_the_exporter
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_on_data(mode, tmp_path):
    """The graph reads what the data has, and its error is that of plain ONNX Runtime on the data."""
    import onnxruntime

    model = fine_model(affine_every=2)
    batches = batches_of(model)
    report = export_onnx(model, tmp_path / "onnx", int8=mode, data=batches, tolerance=0.5)
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(batches[0])
    measured = split_data(batches, [0.2])[1] if mode == "static" else batches
    found, wanted = [], []
    for batch in measured:
        found.append(torch.from_numpy(session.run(["logits"], {key: x.numpy() for key, x in batch.items()})[0]))
        with torch.no_grad():
            wanted.append(model(**batch).logits)
    error = relative_error({"logits": torch.cat(wanted)}, {"logits": torch.cat(found)})
    assert 0 < report.error < 0.5
    assert report.error == pytest.approx(error, rel=1e-4)


@needs_the_exporter
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_int8_weights(mode, tmp_path):
    """Each output channel has a scale, and its 8 bits are the float64 rounding of the weights of the model."""
    from onnx.numpy_helper import to_array

    model = fine_model()
    export_onnx(model, tmp_path, int8=mode, data=batches_of(model), keep_float=["bert.encoder.layer.0"], tolerance=0.5)
    values = {value.name: torch.from_numpy(to_array(value).copy()) for value in graph_in(tmp_path).initializer}
    matrices = [value for name, value in values.items() if value.dim() == 2 and "quantized" in name]
    linears = [(name, x) for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    kept = [x for name, x in linears if name.startswith("bert.encoder.layer.0.")]
    others = [x for name, x in linears if name.startswith("bert.encoder.layer.")]
    for linear in others:
        weight = linear.weight.detach().double()
        scale = weight.abs().amax(1, keepdim=True) / 127
        rounded = (weight / scale).round().T
        is_rounded = any(
            value.shape == rounded.shape and (value.double() - rounded).abs().max() <= 1 for value in matrices
        )
        is_exact = any(torch.equal(value, linear.weight.T) for value in values.values())
        assert (is_rounded, is_exact) == ((False, True) if any(linear is x for x in kept) else (True, False))


@needs_the_exporter
@pytest.mark.slow
def test_a_static_graph_rounds_the_inputs_of_linear_layers_alone(tmp_path):
    """Neither products of two activations nor outputs in front of a bias."""
    model = fine_model()
    export_onnx(model, tmp_path, int8="static", data=batches_of(model), tolerance=0.5)
    nodes = list(graph_in(tmp_path).node)
    constants = {value.name for value in graph_in(tmp_path).initializer}
    producer = {output: node for node in nodes for output in node.output}
    products = [node for node in nodes if node.op_type == "MatMul"]
    with_weight = [node for node in products if producer.get(node.input[1], node).op_type == "DequantizeLinear"]
    assert len(with_weight) == 6 * 2
    for node in products:
        is_rounded = [producer.get(name, node).op_type == "DequantizeLinear" for name in node.input]
        assert is_rounded == ([True, True] if node in with_weight else [False, False])
        readers = [other.op_type for other in nodes if node.output[0] in other.input]
        assert "QuantizeLinear" not in readers
    assert all(producer[node.input[1]].input[0] in constants for node in with_weight)


@needs_the_exporter
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"int8": "half"}, "no quantization 'half'"),
        ({"int8": "static"}, "pass data"),
        ({"keep_float": ["classifier"]}, "keep_float is for"),
        ({"int8": True, "keep_float": ["bert.nothing"]}, "bert.nothing of keep_float"),
        ({"int8": True, "keep_float": "bert.encoder.layer.0.attention.output.dropout"}, "dropout of keep_float"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refusal:
        export_onnx(tiny_model("bert").eval(), tmp_path / "onnx", **options)
    assert is_one_sentence(refusal.value)
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("family", "head", "fold"),
    [
        ("bert", "BertModel", True),
        ("bert", "BertForTokenClassification", False),
        ("roberta", "RobertaForMaskedLM", False),
        ("gpt2", "GPT2LMHeadModel", False),
        ("bert", "BertForMaskedLM", True),
    ],
)
def test_the_batch_size_of_an_exported_model_is_free(family, head, fold):
    """Norms that remain look for the mask, which must not fix the batch size at that of the trace."""
    model = swapped(family, head, dtype=torch.float32)
    model.config.use_cache = False
    if fold:
        fold_norms(model)
    lengths = (7, 5)
    batch = tiny_batch(model, lengths=lengths, labels=False)
    sizes = {name: dict.fromkeys(range(2), torch.export.Dim.AUTO) for name in batch}
    program = torch.export.export(model, (), kwargs=batch, dynamic_shapes=sizes)
    other = tiny_batch(model, lengths=(9, 6, 4, 3), labels=False)
    with torch.no_grad():
        assert relative_error(dict(model(**other)), dict(program.module()(**other))) < 1e-5


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
