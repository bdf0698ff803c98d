"""No norm, and other linear layers in its sublayer: weight normalisation, and the generalised Hamming network."""

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .registry import register_norm
from .simple import WithoutGain


class ChangedLinear:
    """Mixin in front of `nn.Linear` or `Conv1D`: a linear layer of a sublayer without norm.

    A swap makes the linear layers of a sublayer such ones, and a restoration makes them plain again. The weight and
    the bias are the same parameters, under the same names.
    """

    stands_for: str  # registered name of the norm in whose place it computes

    def begin(self) -> None:
        """Give a plain layer the parameters that it needs besides."""

    def end(self) -> None:
        """Take these parameters away, and keep the function where a plain layer can have it."""

    def initialize(self) -> None:
        """Set these parameters to those of a new layer, except what was just loaded from a checkpoint."""

    def outputs_first(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as `nn.Linear` has it, of shape `(outputs, inputs)`."""
        return weight.T if isinstance(self, Conv1D) else weight


class WithoutNorm(WithoutGain):
    """Base of the norms that compute nothing, in whose place the linear layers of the sublayer compute another thing.

    A subclass says in `linear_classes` which class a linear layer becomes.
    """

    scope = ()

    def normalize(self, x, mask):
        return x

    def obstacle_to_affine(self):
        return "stands for linear layers that are no plain ones"

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class WeightNormalized(ChangedLinear):
    """A linear layer with the weight `w = g v / ‖v‖`, by [`WeightNorm`]; v is its parameter `weight`."""

    stands_for = "weightnorm"

    def begin(self):
        self.weight_gain = nn.Parameter(self._lengths().detach(), requires_grad=self.weight.requires_grad)

    @torch.no_grad()
    def end(self):
        self.weight.copy_(self.normalized_weight())
        del self.weight_gain

    def initialize(self):
        init.copy_(self.weight_gain, self._lengths().detach())

    def _lengths(self):
        """‖v‖ of each output; a direction of zeros stays one."""
        dim = 0 if isinstance(self, Conv1D) else 1
        lengths = torch.linalg.vector_norm(self.weight, dim=dim)
        return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)

    def normalized_weight(self) -> torch.Tensor:
        """w, in the shape of v."""
        ratio = self.weight_gain / self._lengths()  # exactly 1 at first
        return self.weight * (ratio if isinstance(self, Conv1D) else ratio.unsqueeze(1))

    def forward(self, x):
        return functional.linear(x, self.outputs_first(self.normalized_weight()), self.bias)


class WeightNormLinear(WeightNormalized, nn.Linear):
    """`nn.Linear` with the weight `w = g v / ‖v‖`."""


class WeightNormConv1D(WeightNormalized, Conv1D):
    """The linear layer of GPT-2 with the weight `w = g v / ‖v‖`."""


@register_norm("weightnorm")
class WeightNorm(WithoutNorm):
    """Weight normalisation (Salimans and Kingma, NeurIPS 2016, arXiv 1602.07868), in place of norms of activations.

    The norm goes, and each linear layer of its sublayer gets the weight `w = g v / ‖v‖`, a length g and a direction v
    for each output. There is neither gain nor shift in the place of the norm: g and the bias of the linear layers are
    those. At first w is the weight from before, and v is its parameter. [`restore_norm`](hf_normswap.restore_norm)
    gives the linear layers the weight w.

    A pretrained model loses its function, as any model without its norms does.

    Args:
        num_features (`int`): number of channels.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift in the place of the norm.
    """

    linear_classes = {nn.Linear: WeightNormLinear, Conv1D: WeightNormConv1D}


class HammingBiased(ChangedLinear):
    """A linear layer that returns the negative generalised Hamming distance of its weights and a token."""

    stands_for = "hamming"

    def forward(self, x):
        weight = self.outputs_first(self.weight)
        product = functional.linear(x, weight)
        distance = weight.mean(1) + x.mean(-1, keepdim=True) - 2 / x.shape[-1] * product
        return (-distance if self.bias is None else self.bias - distance).to(product.dtype)


class HammingLinear(HammingBiased, nn.Linear):
    """`nn.Linear` that returns the negative generalised Hamming distance."""


class HammingConv1D(HammingBiased, Conv1D):
    """The linear layer of GPT-2 that returns the negative generalised Hamming distance."""


@register_norm("hamming", "ghn")
class Hamming(WithoutNorm):
    """The layers of a generalised Hamming network (Fan, NeurIPS 2017, arXiv 1710.10328), in place of norms.

    The norm goes, and each linear layer of its sublayer computes `y = 2 (w·x − (Σ w + Σ x) / 2) / L`, for each output
    with weights w and each token x of L channels: the bias is computed. y is the negative mean over the channels of
    the generalised Hamming distance `x + w − 2 x w`. The bias that the layer has stays, and is added; the paper has
    none, which is one of 0 that is not trained.

    A pretrained model loses its function.

    Args:
        num_features (`int`): number of channels.
        bias (`bool`, *optional*, defaults to `False`): whether there is a shift in the place of the norm.
    """

    linear_classes = {nn.Linear: HammingLinear, Conv1D: HammingConv1D}
