"""The norms of this package, and what a norm of one's own is made of. Importing this file registers them."""

from .affine import Affine
from .batchnorm import BatchNorm
from .discrepancy import Statistics
from .layernorm import LayerNorm
from .moments import Moments, masked_moments
from .norm import BatchStatisticNorm, Norm
from .pnv import PowerNormV
from .powernorm import PowerNorm
from .rbn import RegularizedBatchNorm
from .registry import available_norms, get_norm, register_norm
from .rmsnorm import RMSNorm


__all__ = [
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
]
