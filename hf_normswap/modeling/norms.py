"""The norms of this package, and what a user's norm is made of. Importing this file registers them."""

import difflib

from .adanorm import AdaNorm
from .affine import Affine
from .attentivenorm import AttentiveNorm
from .base import BatchStatisticNorm, Norm
from .batchnorm import BatchNorm
from .batchrenorm import BatchRenorm
from .discrepancy import Statistics
from .dyt import Derf, DyT
from .fixup import Fixup
from .frn import FRN
from .groupnorm import GroupNorm
from .instancenorm import InstanceNorm
from .layernorm import LayerNorm
from .linears import Hamming, WeightNorm
from .moments import Moments, masked_moments
from .powernorm import PowerNorm, PowerNormV
from .rbn import RegularizedBatchNorm
from .registry import available_norms, get_norm, register_norm
from .repbn import RepBN
from .rmsnorm import RMSNorm
from .scalenorm import ScaleNorm
from .simple import LayerNormSimple, RMSNormSimple
from .switchablenorm import SwitchableNorm
from .windownorm import MABN, UnifiedNorm


__all__ = [
    "FRN",
    "MABN",
    "AdaNorm",
    "Affine",
    "AttentiveNorm",
    "BatchNorm",
    "BatchRenorm",
    "BatchStatisticNorm",
    "Derf",
    "DyT",
    "Fixup",
    "GroupNorm",
    "Hamming",
    "InstanceNorm",
    "LayerNorm",
    "LayerNormSimple",
    "Moments",
    "Norm",
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
]


class NormSwapConfig:
    """A norm and its options, checked when made.

    Args:
        norm (`str`): a registered name, in any spelling.
        options: keyword arguments of the norm's class, for example `group_scaling=False`.

    Raises:
        ValueError: when there is no such norm or no such option.

    Example:

    ```python
    >>> from hf_normswap import NormSwapConfig
    >>> NormSwapConfig("PN", num_groups=4)
    NormSwapConfig('powernorm', num_groups=4)

    ```
    """

    def __init__(self, norm: str, /, **options):
        cls = get_norm(norm)
        known = cls.option_defaults()
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {sorted(known)}."
                raise ValueError(f"The norm {cls.norm_name!r} has no option {name!r}: {hint}")
        # Numbers of NumPy, as a search over options has them, are nothing that a configuration can be saved with.
        numbers = {name: value.item() for name, value in options.items() if getattr(value, "shape", None) == ()}
        self.norm, self.options = cls.norm_name, options | numbers

    @classmethod
    def of(cls, norm: "str | NormSwapConfig") -> "NormSwapConfig":
        """`norm` itself, or the configuration of that name without options."""
        return norm if isinstance(norm, NormSwapConfig) else cls(norm)

    def __eq__(self, other):
        return isinstance(other, NormSwapConfig) and (self.norm, self.options) == (other.norm, other.options)

    def __repr__(self):
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"NormSwapConfig({self.norm!r}{options})"
