"""Graphs in 8 bits, by ONNX Runtime: of which nodes, and with which ranges."""

import ast
from typing import Any

from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig


# The node's place among the modules, in the metadata that torch.onnx writes.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Of these a static graph has 8 bits. Attention multiplies two activations, and these, like outputs that are rounded
# before the bias or the residual sum, cost most of the accuracy, with LayerNorms too.
_STATIC = {
    "op_types_to_quantize": ["MatMul", "Gemm", "Gather"],
    "extra_options": {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
}


def make_quantizer(mode: str, batches: list[dict[str, Any]], keep_float: list[str]) -> "Quantizer":
    """A quantizer of the exporter; the batches are those that give a static graph its ranges."""
    if mode == "static":
        return Quantizer(OnnxRuntimeStaticConfig(per_channel=True, **_STATIC), batches, keep_float)
    return Quantizer(OnnxRuntimeDynamicConfig(per_channel=True), None, keep_float)


class Quantizer(OnnxRuntimeQuantizer):
    """ONNX Runtime's quantizer, which leaves the nodes of some modules in float.

    Args:
        config: as in [`~transformers.exporters.OnnxRuntimeQuantizer`].
        calibration_dataset (list of dict, *optional*): batches that give a static graph its ranges.
        keep_float (list of `str`): names of these modules.
    """

    def __init__(self, config, calibration_dataset: list[dict[str, Any]] | None, keep_float: list[str]):
        super().__init__(config, calibration_dataset)
        self.keep_float = set(keep_float)

    def quantize(self, model, sample_inputs, export_format):
        """Quantize the graph, as its name says."""
        self.config.nodes_to_exclude = [
            node.name
            for node in model.graph
            if self.keep_float & set(ast.literal_eval(node.metadata_props.get(_SCOPES, "[]")))
            # ONNX Runtime has an option for this, which a static graph does not heed (1.32).
            or node.op_type == "MatMul"
            and not any(map(_is_constant, node.inputs))
        ]
        return super().quantize(model, sample_inputs, export_format)


def _is_constant(value) -> bool:
    """Whether a value of the graph is a weight, or made of weights alone."""
    producer = value.producer()
    return value.const_value is not None or producer is not None and all(map(_is_constant, producer.inputs))
