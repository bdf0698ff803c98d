"""Models as ONNX graphs, checked in ONNX Runtime against PyTorch."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_normswap.core.data import complete_batches, make_batches, split_data
from hf_normswap.core.files import atomic_directory
from hf_normswap.core.model_state import check_whole, outside_modes, refuse_training, run_model

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
        error (`float`): `‖Δ‖₂ / ‖logits‖₂` of ONNX Runtime against PyTorch, on the data that was given, or on random
            tokens of another shape than the batch that the graph was traced with.
    """

    path: Path
    opset: int
    norm_nodes: int
    error: float


@outside_modes
def export_onnx(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    int8: bool | Literal["dynamic", "static"] = False,
    data: Iterable | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_float: Iterable[str] = (),
    tolerance: float | None = None,
) -> OnnxReport:
    """Write `model` as an ONNX graph of any batch size and length, by the exporter of transformers.

    A folded model has no norm in its graph. Generation with a cache is that exporter's `export_for_generation`.

    Args:
        model ([`~transformers.PreTrainedModel`]): in evaluation mode, swapped or not, best folded.
        folder (`str` or `os.PathLike`): for `model.onnx` and what belongs to it; new or empty.
        int8 (`bool` or `str`, *optional*, defaults to `False`):
            `"dynamic"` or `True`: linear layers and embeddings get weights of 8 bits, linear layers with a scale for
            each output channel, and the inputs of linear layers are quantized as they come. `"static"`: the ranges of
            these inputs are those of `data`. A post-norm model is best folded with `affine_every=4`.
        data (*optional*):
            texts, a data set or batches, as [`make_batches`] takes them. The graph then reads what the data has, such
            as `token_type_ids`. The error is measured on this data, and not on random tokens. With `"static"` a fifth
            of the data is held out for it.
        tokenizer (*optional*): for texts, and to pad a data set.
        keep_float (iterable of `str`, *optional*): names of modules whose layers stay in float32.
        tolerance (`float`, *optional*): the largest error that is allowed; 1e-4 by default, 0.1 with `int8`.

    Returns:
        [`OnnxReport`]

    Raises:
        ImportError: without onnx, onnxscript and onnxruntime.
        ValueError: when the model is in training mode, offloaded or not in float32, the folder is not empty, the data
            is missing or does not fit, a name of `keep_float` is no module with linear layers or embeddings, or the
            outputs of ONNX Runtime differ from those of PyTorch by more than `tolerance`. Nothing is written then.
    """
    mode = "dynamic" if int8 is True else int8 or None
    keep_float = [keep_float] if isinstance(keep_float, str) else list(keep_float)
    _check_options(model, mode, data, keep_float)
    try:
        import onnxruntime
        from transformers.exporters import OnnxConfig, OnnxExporter

        from .quantization import make_quantizer
    except ImportError as error:
        raise ImportError(
            f"The export needs onnx, onnxscript, onnxruntime and a recent transformers ({error}): "
            "pip install 'hf_normswap[onnx]'."
        ) from error
    seen, unseen = _divide(model, mode, data, tokenizer)
    traced = max(seen, key=lambda batch: next(iter(batch.values())).shape[-1])
    config = OnnxConfig(dynamic=True)
    if mode:
        config.quantizer = make_quantizer(mode, seen, keep_float)
    with atomic_directory(folder) as draft:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # the exporter prints its progress
            warnings.simplefilter("ignore")
            two_rows = {name: torch.cat([values[:1], values[:1]]) for name, values in traced.items()}
            exported = OnnxExporter().export(model, two_rows, config)
        exported.save_pretrained(draft)
        session = onnxruntime.InferenceSession(str(draft / "model.onnx"), providers=["CPUExecutionProvider"])
        error = _error(model, session, unseen)
        limit = tolerance if tolerance is not None else TOLERANCE_INT8 if mode else TOLERANCE
        if not error <= limit:
            raise ValueError(
                f"The graph's outputs differ from the model's by {error:.1e}, more than {limit}: "
                + (
                    "fold with affine_every=4, name layers in keep_float, raise tolerance, or export without int8."
                    if mode
                    else "check that the model's own outputs are finite."
                )
            )
        graph = exported.program.graph
        norm_nodes = sum(node.op_type in NORM_OPERATORS and not _pools_tokens(node) for node in graph)
        # Some norms are none of ours to swap, such as those over channels that come first.
        if norm_nodes and not any("norm" in type(module).__name__.lower() for module in model.modules()):
            raise ValueError(f"The graph has {norm_nodes} nodes of norms, the model has none: report this as a bug.")
    return OnnxReport(Path(folder) / "model.onnx", graph.opset_imports[""], norm_nodes, error)


def _check_options(model, mode: str | None, data, keep_float: list[str]) -> None:
    check_whole(model)
    refuse_training(model)
    if model.dtype != torch.float32:
        raise ValueError(f"ONNX Runtime wants float32, and the model is {model.dtype}: call model.float() first.")
    if type(model).__name__.endswith("GPT2ForSequenceClassification") and model.config.pad_token_id is None:
        raise ValueError("The model takes no batch without a padding token: set model.config.pad_token_id first.")
    if mode not in (None, "dynamic", "static"):
        raise ValueError(f"There is no quantization {mode!r}: pass int8='dynamic' or int8='static'.")
    if mode == "static" and data is None:
        raise ValueError("Static quantization needs ranges of activations: pass data, or int8='dynamic'.")
    if keep_float and mode is None:
        raise ValueError("keep_float is for a graph in 8 bits: pass int8, or leave it out.")
    for name in keep_float:
        part = dict(model.named_modules()).get(name)
        if part is None or not any(isinstance(layer, nn.Linear | Conv1D | nn.Embedding) for layer in part.modules()):
            raise ValueError(f"{name} of keep_float is no module with linear layers or embeddings: name such a one.")


def _divide(model, mode: str | None, data, tokenizer) -> tuple[list[dict], list[dict]]:
    """Batches that the graph is traced and its ranges are found with, and those that its error is measured on."""
    if data is None:
        traced, other, *_ = example_batches(model)
        # One row more than the graph is traced with, and another length.
        return [traced], [{name: torch.cat([values, values.flip(-1), values]) for name, values in other.items()}]
    parts = split_data(data, [0.2]) if mode == "static" else [data]
    batches = [complete_batches(model, make_batches(model, part, tokenizer)) for part in parts]
    batches = [[_without_labels(model, batch) for batch in part] for part in batches]
    return batches[0], batches[-1]


def _without_labels(model, batch: dict) -> dict:
    """A batch with the tokens that the decoder reads in place of the labels."""
    rest = {name: values for name, values in batch.items() if name != "labels"}
    if "labels" in batch and model.config.is_encoder_decoder:
        rest["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return rest


def _pools_tokens(node) -> bool:
    """Whether a node is a mean over something else than the channels, such as that over the tokens of a text."""
    if not node.op_type.startswith("Reduce") or len(node.inputs) < 2:
        return False
    axes = getattr(node.inputs[1], "const_value", None)
    if axes is None:
        return False
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    return not {-1, None if rank is None else rank - 1} & {int(axis) for axis in axes.numpy().flatten()}


@torch.no_grad()
def _error(model, session, batches: list[dict]) -> float:
    """The largest of all outputs that have a name in both; of outputs for tokens, those for real ones count."""
    names = {value.name for value in session.get_inputs()}
    pairs: dict = {}
    for batch in batches:
        batch = {name: values for name, values in batch.items() if name in names}
        values = session.run(None, {name: value.numpy(force=True) for name, value in batch.items()})
        outputs = dict(zip([value.name for value in session.get_outputs()], values, strict=True))
        wanted = run_model(model, batch)
        mask = None if model.config.is_encoder_decoder else batch.get("attention_mask")
        for name in wanted:
            if name in outputs and isinstance(wanted[name], torch.Tensor):
                pair = wanted[name].cpu(), torch.from_numpy(outputs[name])
                if mask is not None and pair[0].shape[:2] == mask.shape and pair[0].dim() == 3:
                    pair = tuple(value[mask.cpu().bool()] for value in pair)
                pairs.setdefault(name, []).append([value.flatten() for value in pair])
    errors = [relative_error(*map(torch.cat, zip(*values, strict=True))) for values in pairs.values()]
    return torch.tensor(errors).max().item()
