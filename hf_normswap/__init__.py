"""Swap the normalisation layers of Hugging Face models."""

import importlib
import os

from .auto import register_configurations
from .kernels import use_kernels


__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: importing the package costs no more than importing transformers.
_HOMES = {
    "activations": ["ActivationProbe", "ActivationReport", "probe_activations"],
    "batches": ["make_batches"],
    "calibration": ["calibrate", "reestimate_statistics"],
    "centering": ["convert_to_rmsnorm"],
    "conversion": ["CalibrationReport", "NormFit"],
    "distillation": ["distill"],
    "export": ["OnnxReport", "export_onnx"],
    "folding": ["FoldReport", "fold_norms"],
    "gradients": ["DepthSlope", "DepthStudy", "GradientNorm", "GradientReport", "gradient_norms", "study_depth"],
    "hub": ["push_folder", "push_model"],
    "modeling.norms": [
        "Affine",
        "BatchNorm",
        "BatchStatisticNorm",
        "LayerNorm",
        "Moments",
        "Norm",
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
    "modeling.recompute": ["tape_checkpoint"],
    "modeling.sites": ["NormSite", "find_norms"],
    "modeling.swap_config": ["NormSwapConfig"],
    "modeling.swapped": ["swapped_class"],
    "modeling.token_mask": ["padding_mask"],
    "placement": ["set_norm_placement"],
    "progressive": ["ProgressiveSwapCallback"],
    "statistics": [
        "defer_norm_statistics",
        "freeze_norm_statistics",
        "norm_penalty",
        "pause_norm_statistics",
        "sync_norm_statistics",
        "synchronize_norms",
    ],
    "surgery": ["restore_norm", "swap_norm"],
    "tid": ["LayerTid", "TidHistory", "TidReport", "measure_tid"],
    "trainer": ["NormSwapSeq2SeqTrainer", "NormSwapTrainer"],
    "training_args": ["NormSwapSeq2SeqTrainingArguments", "NormSwapTrainingArguments"],
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
