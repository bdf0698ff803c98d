"""Swap the normalisation layers of Hugging Face models."""

import importlib
import os

from .auto import register_configurations
from .kernels import use_kernels


__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: importing the package costs no more than importing transformers.
_HOMES = {
    "diagnostics.activation_stats": ["ActivationProbe", "ActivationReport", "probe_activations"],
    "core.data": ["make_batches"],
    "conversion.calibrate": ["calibrate", "reestimate_statistics"],
    "fusion.rmsnorm": ["convert_to_rmsnorm"],
    "conversion.fitting": ["CalibrationReport", "NormFit"],
    "conversion.distill": ["distill"],
    "fusion.onnx": ["OnnxReport", "export_onnx"],
    "fusion.fold": ["FoldReport", "fold_norms"],
    "diagnostics.gradients": [
        "DepthSlope",
        "DepthStudy",
        "GradientNorm",
        "GradientReport",
        "gradient_norms",
        "study_depth",
    ],
    "reporting.hub": ["push_folder", "push_model"],
    "modeling.norms": [
        "Affine",
        "BatchNorm",
        "BatchStatisticNorm",
        "LayerNorm",
        "Moments",
        "Norm",
        "NormSwapConfig",
        "PowerNorm",
        "PowerNormV",
        "RMSNorm",
        "RegularizedBatchNorm",
        "Statistics",
        "available_norms",
        "get_norm",
        "masked_moments",
        "register_norm",
    ],
    "modeling.activation_checkpointing": ["checkpoint_norms"],
    "modeling.norm_sites": ["NormSite", "find_norms"],
    "modeling.modeling_normswap": ["swapped_class"],
    "modeling.padding_mask": ["padding_mask"],
    "placement": ["set_norm_placement"],
    "training.progressive": ["ProgressiveSwapCallback"],
    "core.statistics": [
        "accumulate_norm_statistics",
        "freeze_norm_statistics",
        "norm_penalty",
        "pause_norm_statistics",
        "update_norm_statistics",
        "set_norm_process_group",
    ],
    "swap": ["restore_norm", "swap_norm"],
    "diagnostics.tid": ["LayerTid", "TidHistory", "TidReport", "measure_tid"],
    "training.trainer": ["NormSwapSeq2SeqTrainer", "NormSwapTrainer"],
    "training.training_args": ["NormSwapSeq2SeqTrainingArguments", "NormSwapTrainingArguments"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", "use_kernels", *_HOME])  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return __all__


register_configurations()
use_kernels(os.environ.get("HF_NORMSWAP_KERNELS", "auto"))
