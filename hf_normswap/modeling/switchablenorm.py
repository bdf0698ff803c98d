"""Switchable normalisation."""

import torch
from torch import nn

from .backends import promote
from .batchnorm import BatchNorm
from .moments import masked_moments, spread, standardize
from .registry import register_norm


@register_norm("switchablenorm", "sn")
class SwitchableNorm(BatchNorm):
    """Switchable normalisation (Luo et al., ICLR 2019, arXiv 1806.10779): `y = γ (x − Σ w μ) / √(Σ w' σ² + ε) + β`.

    The sums are over three pairs of mean and variance: of the sentence and of the batch for each channel (instance and
    batch normalisation, over real tokens), and of the channels of each token (layer normalisation; the paper takes it
    over all positions of an image). w and w' are two softmaxes of three trained numbers each, in this order, equal at
    the start. In evaluation running values take the place of the statistics of the batch.

    Args:
        num_features (`int`): number of channels.
        eps (`float`, *optional*, defaults to 1e-5): added to the mixed variance.
        momentum (`float`, *optional*, defaults to 0.1): weight of a batch in the running values.
        bias (`bool`, *optional*, defaults to `True`): whether there is a shift.
    """

    scope = ("token", "sentence", "batch")

    def __init__(self, num_features: int, *, device=None, dtype=None, **kwargs):
        super().__init__(num_features, device=device, dtype=dtype, **kwargs)
        self.mean_logits = nn.Parameter(torch.zeros(3, device=device, dtype=dtype))
        self.var_logits = nn.Parameter(torch.zeros(3, device=device, dtype=dtype))

    @classmethod
    def option_defaults(cls):
        return {name: default for name, default in super().option_defaults().items() if name != "center_tokens"}

    def normalize(self, x, mask):
        return self._mix(x, mask, self.running_mean, self.running_var)

    def forward_train(self, x, mask):
        values = self.select_finite(promote(x), mask)
        _, moments, _ = self.standardize_batch(values, mask)
        return self.scale_and_shift(self._mix(values, mask, moments.mean, moments.var)).to(x.dtype)

    def _mix(self, x, mask, batch_mean, batch_var):
        of_sentence = masked_moments(x, mask, by_sentence=True)
        token_var, token_mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        means = spread(of_sentence.mean, x), batch_mean, token_mean
        variances = spread(of_sentence.var, x), batch_var, token_var
        mean_weights, var_weights = (logits.to(x.dtype).softmax(0) for logits in (self.mean_logits, self.var_logits))
        mean = sum(weight * value for weight, value in zip(mean_weights, means, strict=True))
        variance = sum(weight * value for weight, value in zip(var_weights, variances, strict=True))
        return standardize(x, mean, torch.rsqrt(variance + self.eps), mask)

    def affine_map(self):
        return None
