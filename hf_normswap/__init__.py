"""Swap the normalisation layers of Hugging Face models."""

import importlib
import os
from typing import TYPE_CHECKING

from .auto import register_configurations
from .kernels import use_kernels


__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: importing the package costs no more than importing transformers.
_HOMES = {
    "conversion.calibrate": ["calibrate", "reestimate_statistics"],
    "conversion.distill": ["distill"],
    "conversion.fitting": ["CalibrationReport", "NormFit"],
    "conversion.measure": ["Estimate"],
    "convert": ["ConversionReport", "ConvertedNorm", "convert_norms"],
    "core.data": ["make_batches", "sample_batches"],
    "core.files": ["copy_sentence_modules"],
    "core.statistics": [
        "accumulate_norm_statistics",
        "freeze_norm_statistics",
        "norm_penalty",
        "pause_norm_statistics",
        "set_norm_process_group",
        "update_norm_statistics",
    ],
    "diagnostics.activation_stats": ["ActivationProbe", "ActivationReport", "probe_activations"],
    "diagnostics.depth_study": ["DepthSlope", "DepthStudy", "study_depth"],
    "diagnostics.gradients": ["GradientNorm", "GradientReport", "gradient_norms"],
    "diagnostics.inspection": ["InspectReport", "NormAudit", "inspect_model"],
    "diagnostics.tid": ["LayerTid", "TidHistory", "TidReport", "measure_tid"],
    "fusion.fold": ["FoldReport", "fold_norms"],
    "fusion.gains": ["fold_gains"],
    "fusion.onnx": ["OnnxReport", "export_onnx"],
    "fusion.rmsnorm": ["convert_to_rmsnorm"],
    "fusion.stock": ["StockReport", "save_stock"],
    "initialization": ["initialize_fixup", "initialize_weightnorm"],
    "modeling.activation_checkpointing": ["checkpoint_norms"],
    "modeling.modeling_normswap": ["swapped_class"],
    "core.norm_sites": ["NormSite", "find_norms"],
    "modeling.norms": [
        "AdaNorm",
        "Affine",
        "AttentiveNorm",
        "BatchNorm",
        "BatchRenorm",
        "BatchStatisticNorm",
        "Derf",
        "DyT",
        "FRN",
        "Fixup",
        "GroupNorm",
        "Hamming",
        "InstanceNorm",
        "LayerNorm",
        "LayerNormSimple",
        "MABN",
        "Moments",
        "Norm",
        "NormSwapConfig",
        "PowerNorm",
        "PowerNormV",
        "RMSNorm",
        "RMSNormSimple",
        "RegularizedBatchNorm",
        "RepBN",
        "ScaleNorm",
        "Statistics",
        "SwitchableNorm",
        "UnifiedNorm",
        "WeightNorm",
        "available_norms",
        "get_norm",
        "masked_moments",
        "register_norm",
    ],
    "modeling.padding_mask": ["padding_mask"],
    "placement": ["set_norm_placement"],
    "reporting.hub": ["push_folder", "push_model"],
    "swap": ["restore_norm", "swap_norm"],
    "training.progressive": ["ProgressiveSwapCallback"],
    "training.trainer": ["NormSwapSeq2SeqTrainer", "NormSwapTrainer"],
    "training.training_args": ["NormSwapSeq2SeqTrainingArguments", "NormSwapTrainingArguments"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", "use_kernels", *_HOME])  # noqa: PLE0605


# What a type checker reads in place of `__getattr__`, which would let every misspelt name pass.
if TYPE_CHECKING:
    from .conversion.calibrate import calibrate as calibrate
    from .conversion.calibrate import reestimate_statistics as reestimate_statistics
    from .conversion.distill import distill as distill
    from .conversion.fitting import CalibrationReport as CalibrationReport
    from .conversion.fitting import NormFit as NormFit
    from .conversion.measure import Estimate as Estimate
    from .convert import ConversionReport as ConversionReport
    from .convert import ConvertedNorm as ConvertedNorm
    from .convert import convert_norms as convert_norms
    from .core.data import make_batches as make_batches
    from .core.data import sample_batches as sample_batches
    from .core.files import copy_sentence_modules as copy_sentence_modules
    from .core.norm_sites import NormSite as NormSite
    from .core.norm_sites import find_norms as find_norms
    from .core.statistics import accumulate_norm_statistics as accumulate_norm_statistics
    from .core.statistics import freeze_norm_statistics as freeze_norm_statistics
    from .core.statistics import norm_penalty as norm_penalty
    from .core.statistics import pause_norm_statistics as pause_norm_statistics
    from .core.statistics import set_norm_process_group as set_norm_process_group
    from .core.statistics import update_norm_statistics as update_norm_statistics
    from .diagnostics.activation_stats import ActivationProbe as ActivationProbe
    from .diagnostics.activation_stats import ActivationReport as ActivationReport
    from .diagnostics.activation_stats import probe_activations as probe_activations
    from .diagnostics.depth_study import DepthSlope as DepthSlope
    from .diagnostics.depth_study import DepthStudy as DepthStudy
    from .diagnostics.depth_study import study_depth as study_depth
    from .diagnostics.gradients import GradientNorm as GradientNorm
    from .diagnostics.gradients import GradientReport as GradientReport
    from .diagnostics.gradients import gradient_norms as gradient_norms
    from .diagnostics.inspection import InspectReport as InspectReport
    from .diagnostics.inspection import NormAudit as NormAudit
    from .diagnostics.inspection import inspect_model as inspect_model
    from .diagnostics.tid import LayerTid as LayerTid
    from .diagnostics.tid import TidHistory as TidHistory
    from .diagnostics.tid import TidReport as TidReport
    from .diagnostics.tid import measure_tid as measure_tid
    from .fusion.fold import FoldReport as FoldReport
    from .fusion.fold import fold_norms as fold_norms
    from .fusion.gains import fold_gains as fold_gains
    from .fusion.onnx import OnnxReport as OnnxReport
    from .fusion.onnx import export_onnx as export_onnx
    from .fusion.rmsnorm import convert_to_rmsnorm as convert_to_rmsnorm
    from .fusion.stock import StockReport as StockReport
    from .fusion.stock import save_stock as save_stock
    from .initialization import initialize_fixup as initialize_fixup
    from .initialization import initialize_weightnorm as initialize_weightnorm
    from .kernels import use_kernels as use_kernels
    from .modeling.activation_checkpointing import checkpoint_norms as checkpoint_norms
    from .modeling.modeling_normswap import swapped_class as swapped_class
    from .modeling.norms import FRN as FRN
    from .modeling.norms import MABN as MABN
    from .modeling.norms import AdaNorm as AdaNorm
    from .modeling.norms import Affine as Affine
    from .modeling.norms import AttentiveNorm as AttentiveNorm
    from .modeling.norms import BatchNorm as BatchNorm
    from .modeling.norms import BatchRenorm as BatchRenorm
    from .modeling.norms import BatchStatisticNorm as BatchStatisticNorm
    from .modeling.norms import Derf as Derf
    from .modeling.norms import DyT as DyT
    from .modeling.norms import Fixup as Fixup
    from .modeling.norms import GroupNorm as GroupNorm
    from .modeling.norms import Hamming as Hamming
    from .modeling.norms import InstanceNorm as InstanceNorm
    from .modeling.norms import LayerNorm as LayerNorm
    from .modeling.norms import LayerNormSimple as LayerNormSimple
    from .modeling.norms import Moments as Moments
    from .modeling.norms import Norm as Norm
    from .modeling.norms import NormSwapConfig as NormSwapConfig
    from .modeling.norms import PowerNorm as PowerNorm
    from .modeling.norms import PowerNormV as PowerNormV
    from .modeling.norms import RegularizedBatchNorm as RegularizedBatchNorm
    from .modeling.norms import RepBN as RepBN
    from .modeling.norms import RMSNorm as RMSNorm
    from .modeling.norms import RMSNormSimple as RMSNormSimple
    from .modeling.norms import ScaleNorm as ScaleNorm
    from .modeling.norms import Statistics as Statistics
    from .modeling.norms import SwitchableNorm as SwitchableNorm
    from .modeling.norms import UnifiedNorm as UnifiedNorm
    from .modeling.norms import WeightNorm as WeightNorm
    from .modeling.norms import available_norms as available_norms
    from .modeling.norms import get_norm as get_norm
    from .modeling.norms import masked_moments as masked_moments
    from .modeling.norms import register_norm as register_norm
    from .modeling.padding_mask import padding_mask as padding_mask
    from .placement import set_norm_placement as set_norm_placement
    from .reporting.hub import push_folder as push_folder
    from .reporting.hub import push_model as push_model
    from .swap import restore_norm as restore_norm
    from .swap import swap_norm as swap_norm
    from .training.progressive import ProgressiveSwapCallback as ProgressiveSwapCallback
    from .training.trainer import NormSwapSeq2SeqTrainer as NormSwapSeq2SeqTrainer
    from .training.trainer import NormSwapTrainer as NormSwapTrainer
    from .training.training_args import NormSwapSeq2SeqTrainingArguments as NormSwapSeq2SeqTrainingArguments
    from .training.training_args import NormSwapTrainingArguments as NormSwapTrainingArguments
else:

    def __getattr__(name: str):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return __all__


register_configurations()
use_kernels(os.environ.get("HF_NORMSWAP_KERNELS", "auto"))
