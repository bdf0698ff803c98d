"""The passes over the tokens that batch norms are made of, in PyTorch.

`x`, `y`, `g`, `dx`: tokens of shape `(..., C)`. `mask`: of shape `(...)`, True at real tokens, or `None`. Statistics
and coefficients: of shape `(C,)`, float32 or float64. With `groups` above 0, z is `x` divided by the root mean square
of each group of channels of its token (the group scaling of PowerNorm), else z is `x`. At pads what has no finite sum
of squares counts as zero, and gets no gradient.
"""

import torch

from .moments import Moments, masked_moments, sum_tokens


class TorchPasses:
    """In plain PyTorch, for every device and dtype, differentiable; what a faster path has to agree with."""

    @staticmethod
    def moments(x: torch.Tensor, mask: torch.Tensor | None) -> Moments:
        """Moments of the real tokens (see [`masked_moments`])."""
        return masked_moments(_promote(x), mask)

    @staticmethod
    def squares(x, mask, groups, eps) -> torch.Tensor:
        """Sum of z² over real tokens."""
        return sum_tokens(scale_groups(_values(x, mask), groups, eps)[0].square(), mask)

    @staticmethod
    def forward(x, mask, center, scale, shift, groups, eps, wants_squares) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`y = scale (z − center) + shift` in the dtype of `x`, and the sum of z² over real tokens if wanted."""
        z, _ = scale_groups(_values(x, mask), groups, eps)
        y = torch.addcmul(shift, z if center is None else z - center, scale)
        return y.to(x.dtype), sum_tokens(z.square(), mask) if wants_squares else None

    @staticmethod
    def sums(g, x, mask, center, groups, eps) -> torch.Tensor:
        """Sums of g and of g (z − center), over real tokens and over pads, of shape `(4, C)`."""
        z, _ = scale_groups(_values(x, mask), groups, eps)
        g = _promote(g)
        products = g * (z if center is None else z - center)
        sums = [sum_tokens(g), sum_tokens(products)]
        if mask is None:
            return torch.stack([*sums, *map(torch.zeros_like, sums)])
        real = [sum_tokens(g, mask), sum_tokens(products, mask)]
        return torch.stack([*real, *(total - part for total, part in zip(sums, real))])

    @staticmethod
    def backward(
        g, x, mask, center, a, b, shift, pad, groups, eps, wants_sums
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`dx`, and [`TorchPasses.sums`] if wanted.

        The gradient of z is `a g + b (z − center) + shift` at real tokens and `pad g` at others; `dx` follows.
        """
        values = _values(x, mask)
        z, inverse = scale_groups(values, groups, eps)
        wide = _promote(g)
        dx = torch.addcmul(wide * a, z if center is None else z - center, b)
        if shift is not None:
            dx = dx + shift
        if mask is not None:
            dx = torch.where(mask.unsqueeze(-1), dx, wide * pad)
        if groups:
            along = _by_group(dx * z, groups).mean(-1, keepdim=True)
            dx = ((_by_group(dx, groups) - _by_group(z, groups) * along) * inverse).flatten(-2)
        if mask is not None:
            dx = torch.where(mask.unsqueeze(-1) | (values == x), dx, 0)
        return dx.to(x.dtype), TorchPasses.sums(g, x, mask, center, groups, eps) if wants_sums else None


def _promote(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _values(x, mask):
    """`x` in the dtype of statistics, with zeros for what a pad may hold and a gradient could not bear."""
    values = _promote(x)
    if mask is None:
        return values
    bound = torch.finfo(values.dtype).max ** 0.5 / x.shape[-1]
    return torch.where(mask.unsqueeze(-1) | (values.abs() < bound), values, 0)


def _by_group(x, groups):
    return x.unflatten(-1, (groups, -1))


def scale_groups(x, groups, eps):
    """z, and 1 / rms of each group."""
    if not groups:
        return x, None
    inverse = torch.rsqrt(_by_group(x, groups).square().mean(-1, keepdim=True) + eps)
    return (_by_group(x, groups) * inverse).flatten(-2), inverse
