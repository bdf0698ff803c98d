"""Swap the normalisation layers of Hugging Face models."""

import importlib
import os
from typing import TYPE_CHECKING

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


# What a type checker reads in place of `__getattr__`, which would let every misspelt name pass.
if TYPE_CHECKING:
    from .activations import ActivationProbe as ActivationProbe
    from .activations import ActivationReport as ActivationReport
    from .activations import probe_activations as probe_activations
    from .batches import make_batches as make_batches
    from .calibration import calibrate as calibrate
    from .calibration import reestimate_statistics as reestimate_statistics
    from .centering import convert_to_rmsnorm as convert_to_rmsnorm
    from .conversion import CalibrationReport as CalibrationReport
    from .conversion import NormFit as NormFit
    from .distillation import distill as distill
    from .export import OnnxReport as OnnxReport
    from .export import export_onnx as export_onnx
    from .folding import FoldReport as FoldReport
    from .folding import fold_norms as fold_norms
    from .gradients import DepthSlope as DepthSlope
    from .gradients import DepthStudy as DepthStudy
    from .gradients import GradientNorm as GradientNorm
    from .gradients import GradientReport as GradientReport
    from .gradients import gradient_norms as gradient_norms
    from .gradients import study_depth as study_depth
    from .hub import push_folder as push_folder
    from .hub import push_model as push_model
    from .kernels import use_kernels as use_kernels
    from .modeling.norms import Affine as Affine
    from .modeling.norms import BatchNorm as BatchNorm
    from .modeling.norms import BatchStatisticNorm as BatchStatisticNorm
    from .modeling.norms import LayerNorm as LayerNorm
    from .modeling.norms import Moments as Moments
    from .modeling.norms import Norm as Norm
    from .modeling.norms import PowerNorm as PowerNorm
    from .modeling.norms import PowerNormV as PowerNormV
    from .modeling.norms import RegularizedBatchNorm as RegularizedBatchNorm
    from .modeling.norms import RMSNorm as RMSNorm
    from .modeling.norms import Statistics as Statistics
    from .modeling.norms import available_norms as available_norms
    from .modeling.norms import get_norm as get_norm
    from .modeling.norms import masked_moments as masked_moments
    from .modeling.norms import register_norm as register_norm
    from .modeling.recompute import tape_checkpoint as tape_checkpoint
    from .modeling.sites import NormSite as NormSite
    from .modeling.sites import find_norms as find_norms
    from .modeling.swap_config import NormSwapConfig as NormSwapConfig
    from .modeling.swapped import swapped_class as swapped_class
    from .modeling.token_mask import padding_mask as padding_mask
    from .placement import set_norm_placement as set_norm_placement
    from .progressive import ProgressiveSwapCallback as ProgressiveSwapCallback
    from .statistics import defer_norm_statistics as defer_norm_statistics
    from .statistics import freeze_norm_statistics as freeze_norm_statistics
    from .statistics import norm_penalty as norm_penalty
    from .statistics import pause_norm_statistics as pause_norm_statistics
    from .statistics import sync_norm_statistics as sync_norm_statistics
    from .statistics import synchronize_norms as synchronize_norms
    from .surgery import restore_norm as restore_norm
    from .surgery import swap_norm as swap_norm
    from .tid import LayerTid as LayerTid
    from .tid import TidHistory as TidHistory
    from .tid import TidReport as TidReport
    from .tid import measure_tid as measure_tid
    from .trainer import NormSwapSeq2SeqTrainer as NormSwapSeq2SeqTrainer
    from .trainer import NormSwapTrainer as NormSwapTrainer
    from .training_args import NormSwapSeq2SeqTrainingArguments as NormSwapSeq2SeqTrainingArguments
    from .training_args import NormSwapTrainingArguments as NormSwapTrainingArguments
else:

    def __getattr__(name: str):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return __all__


register_configurations()
use_kernels(os.environ.get("HF_NORMSWAP_KERNELS", "auto"))
