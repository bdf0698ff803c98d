"""Models as ONNX graphs, checked in ONNX Runtime against PyTorch."""

import contextlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_normswap.core.files import atomic_directory
from hf_normswap.core.model_state import check_whole, refuse_training

from .equivalence import example_batches, relative_error


# Of what a norm becomes in a graph, whole or in parts.
NORM_OPERATORS = {
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "ReduceL2",
    "ReduceMean",
    "ReduceSumSquare",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
}
# ‖Δ‖₂/‖logits‖₂ against PyTorch; with weights and activations of 8 bits.
TOLERANCE, TOLERANCE_INT8 = 1e-4, 0.1


@dataclass(frozen=True)
class OnnxReport:
    """What was exported.

    Attributes:
        path (`pathlib.Path`): the graph; its weights are beside it.
        opset (`int`): version of ONNX's operators.
        norm_nodes (`int`): nodes of the graph that belong to a norm.
        error (`float`): `‖Δ‖₂ / ‖logits‖₂` of ONNX Runtime against PyTorch, for random tokens of another shape than
            the batch that the graph was traced with.
    """

    path: Path
    opset: int
    norm_nodes: int
    error: float


def export_onnx(model: PreTrainedModel, folder: str | os.PathLike, *, int8: bool = False) -> OnnxReport:
    """Write `model` as an ONNX graph of any batch size and length, by the exporter of transformers.

    A folded model has no norm in its graph. Generation with a cache is that exporter's `export_for_generation`.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode, swapped or not, best folded.
        folder (`str` or `os.PathLike`): for `model.onnx` and what belongs to it; new or empty.
        int8 (`bool`, *optional*, defaults to `False`):
            whether linear layers get weights of 8 bits, and activations that are quantized as they come. In a folded
            post-norm model the channels of the residual stream may have so different scales that they do not fit
            into 8 bits.

    Returns:
        [`OnnxReport`]

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        ValueError: when the model is in training mode, offloaded or not in float32, the folder is not empty, or ONNX
            Runtime does not return what PyTorch returns, to 1e-4, with `int8` to 0.1. Nothing is written then.
    """
    check_whole(model)
    refuse_training(model)
    if model.dtype != torch.float32:
        raise ValueError(f"ONNX Runtime wants float32, and the model is {model.dtype}: call model.float() first.")
    if type(model).__name__.endswith("GPT2ForSequenceClassification") and model.config.pad_token_id is None:
        raise ValueError("The model takes no batch without a padding token: set model.config.pad_token_id first.")
    try:
        import onnxruntime
        from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    except ImportError as error:
        raise ImportError(
            f"The export needs onnx, onnxscript, onnxruntime and a recent transformers ({error}): "
            "pip install 'hf_normswap[onnx]'."
        ) from error
    traced, other, *_ = example_batches(model)
    config = OnnxConfig(dynamic=True)
    if int8:
        config.quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    with atomic_directory(folder) as draft:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # the exporter prints its progress
            warnings.simplefilter("ignore")
            exported = OnnxExporter().export(model, {name: torch.cat([x, x]) for name, x in traced.items()}, config)
        exported.save_pretrained(draft)
        session = onnxruntime.InferenceSession(str(draft / "model.onnx"), providers=["CPUExecutionProvider"])
        error = _error(model, session, other)
        tolerance = TOLERANCE_INT8 if int8 else TOLERANCE
        if not error <= tolerance:
            raise ValueError(
                f"The graph's outputs differ from the model's by {error:.1e}, more than {tolerance}: "
                + ("export without int8." if int8 else "check that the model's own outputs are finite.")
            )
        graph = exported.program.graph
        norm_nodes = sum(node.op_type in NORM_OPERATORS and not _pools_tokens(node) for node in graph)
        # Some norms are none of ours to swap, such as those over channels that come first.
        if norm_nodes and not any("norm" in type(module).__name__.lower() for module in model.modules()):
            raise ValueError(f"The graph has {norm_nodes} nodes of norms, the model has none: report this as a bug.")
    return OnnxReport(Path(folder) / "model.onnx", graph.opset_imports[""], norm_nodes, error)


def _pools_tokens(node) -> bool:
    """Whether a node is a mean over something else than the channels, such as that over the tokens of a text."""
    if not node.op_type.startswith("Reduce") or len(node.inputs) < 2:
        return False
    axes = getattr(node.inputs[1], "const_value", None)
    if axes is None:
        return False
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    return not {-1, None if rank is None else rank - 1} & {int(axis) for axis in axes.numpy().flatten()}


def _error(model, session, batch: dict[str, torch.Tensor]) -> float:
    """Of every output that has a name in both, for three rows: one more than the graph was traced with."""
    batch = {name: torch.cat([values, values.flip(-1), values]) for name, values in batch.items()}
    names = {value.name for value in session.get_inputs()}
    values = session.run(None, {name: value.numpy(force=True) for name, value in batch.items() if name in names})
    outputs = dict(zip([value.name for value in session.get_outputs()], values, strict=True))
    with torch.no_grad():
        wanted = model(**batch, return_dict=True)
    named = [name for name in wanted if name in outputs and isinstance(wanted[name], torch.Tensor)]
    errors = [relative_error(wanted[name].cpu(), torch.from_numpy(outputs[name])) for name in named]
    return torch.tensor(errors).max().item()
