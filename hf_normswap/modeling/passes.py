"""The passes over the tokens that batch norms and RMSNorm are made of, and what they add up to, in PyTorch.

`x`, `y`, `g`, `dx`: tokens of shape `(..., C)`. `mask`: of shape `(...)`, True at real tokens, or `None`. Statistics
and coefficients: of shape `(C,)`, float32 or float64. With `groups` above 0, z is `x` divided by the root mean square
of each group of channels of its token (the group scaling of PowerNorm), else z is `x`. At pads what has no finite sum
of squares counts as zero, and gets no gradient.
"""

import torch

from .discrepancy import penalize
from .moments import Moments, count_tokens, masked_moments, merge_moments, merge_over_ranks, sum_tokens
from .ranks import sum_over_ranks


class TorchPasses:
    """In plain PyTorch, for every device and dtype; what a faster path has to agree with, and may inherit from.

    First the passes over the tokens, then what is made of them. All is differentiable but the penalty, which brings
    its gradient along, and what works in place.
    """

    @staticmethod
    def moments(x: torch.Tensor, mask: torch.Tensor | None) -> Moments:
        """Moments of the real tokens (see [`masked_moments`])."""
        return masked_moments(promote(x), mask)

    @staticmethod
    def squares(x, mask, groups, eps) -> torch.Tensor:
        """Sum of z² over real tokens."""
        return sum_tokens(scale_groups(_values(x, mask), groups, eps)[0].square(), mask)

    @staticmethod
    def forward(x, mask, center, scale, shift, groups, eps, wants_squares) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`y = scale (z − center) + shift` in the dtype of `x`, and the sum of z² over real tokens if wanted."""
        z, _ = scale_groups(_values(x, mask), groups, eps)
        y = torch.addcmul(shift, z if center is None else z - center, scale)
        if y.dtype != x.dtype:  # else y.to() is y, and the gradient that torch 2.11 compiles is zero (pytorch #180642)
            y = y.to(x.dtype)
        return y, sum_tokens(z.square(), mask) if wants_squares else None

    @staticmethod
    def sums(g, x, mask, center, groups, eps) -> torch.Tensor:
        """Sums of g and of g (z − center), over real tokens and over pads, of shape `(4, C)`."""
        z, _ = scale_groups(_values(x, mask), groups, eps)
        g = promote(g)
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
        wide = promote(g)
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

    @classmethod
    def batch_moments(cls, x, mask, centered) -> Moments:
        """What a batch is standardized by: its moments, those about zero where it is not `centered`."""
        return cls.moments(x, mask) if centered else power_moments(x, mask, cls.squares(x, mask, 0, 0.0))

    @classmethod
    def standardize(cls, x, weight, bias, mask, eps, centered, group) -> tuple[torch.Tensor, Moments]:
        """`y = γ (x − c) / √(v + ε) + β`, and moments of the batch, that of all ranks of `group` together.

        c and v are mean and variance where it is `centered`, else 0 and the mean square (with moments about zero).
        """
        moments = cls.batch_moments(x, mask, centered)
        if group is not None:
            moments = merge_over_ranks(moments, group)
        y, _ = cls._scale(x, weight, bias, mask, moments.mean if centered else None, moments.var, 0, eps, False)
        return y, moments

    @classmethod
    def standardize_backward(cls, g, x, weight, mask, moments, of_moments, eps, centered, group):
        """Gradients of x, γ and β from those of y and of the moments, packed as these or `None`."""
        center = moments.mean if centered else None
        inverse = torch.rsqrt(moments.var + eps)
        sums = cls.sums(g, x, mask, center, 0, eps)
        total, products = sums[0], sums[1]
        if group is not None:
            if of_moments is None:
                of_moments = torch.zeros_like(moments.packed)
            pooled = sum_over_ranks(torch.cat([total, products, of_moments]), group)
            total, products, of_moments = pooled.split((len(total), len(total), len(of_moments)))
        # dx = scale g + b (x − center) + shift: through the affine map, through σ and through μ.
        scale, count = weight * inverse, moments.count.clamp(min=1)
        share = scale / -count
        b = share * products * inverse.square()
        shift = share * total if centered else torch.zeros_like(b)
        if of_moments is not None:
            shift = shift + Moments(of_moments).mean / count
            b = b + 2 * Moments(of_moments).m2
        dx, _ = cls.backward(g, x, mask, center, scale, b, shift, scale, 0, eps, False)
        return dx, *gradients_of_affine(sums, inverse)

    @classmethod
    def rescale(cls, x, weight, bias, mask, power, groups, eps) -> tuple[torch.Tensor, Moments]:
        """`y = γ z / √(power + ε) + β`, and the moments of z about zero."""
        y, squares = cls._scale(x, weight, bias, mask, None, power, groups, eps, True)
        return y, power_moments(x, mask, squares)

    @classmethod
    def rescale_backward(cls, g, x, weight, mask, power, of_power, nu, moments, groups, eps):
        """Gradients of x, γ and β for `x̂ = z / √(power + ε)`; and `(n, Σ x̂², Σ γ g x̂)` over real tokens, `(2C + 1,)`.

        That of z is `(γ g − ν x̂) / √(of_power + ε)` at real tokens and `γ g / √(power + ε)` at pads; that of x
        follows. `moments` are those of z about zero; without `of_power` it is `power`.
        """
        inverse = torch.rsqrt(power + eps)
        of_inverse = inverse if of_power is None else torch.rsqrt(of_power + eps)
        pad = weight * inverse
        a, b = pad if of_power is None else weight * of_inverse, -nu * inverse * of_inverse
        dx, sums = cls.backward(g, x, mask, None, a, b, None, pad, groups, eps, True)
        of_batch = Moments.of(moments.count, inverse.square() * moments.m2, pad * sums[1])
        return dx, *gradients_of_affine(sums, inverse), of_batch.packed

    @classmethod
    def _scale(cls, x, weight, bias, mask, center, variance, groups, eps, wants_squares):
        inverse = torch.rsqrt(variance + eps)
        shift = torch.zeros_like(inverse) if bias is None else bias.to(inverse.dtype)
        return cls.forward(x, mask, center, weight * inverse, shift, groups, eps, wants_squares)

    @staticmethod
    def update(running: dict[str, torch.Tensor], moments: Moments, updates: torch.Tensor, weight) -> None:
        """`r ← (1 − weight) r + weight · value` in place, and one more of `updates`.

        `running` names the property of `moments` that a buffer follows: `mean`, `var`, `power`. Nothing where there
        are no tokens or a value is not finite.
        """
        values, valid = {name: getattr(moments, name) for name in running}, moments.count > 0
        # A sum is finite where all its terms are, but for those near the largest number. One sum for each: with a
        # stack of them inductor (torch 2.13) computes other outputs, in a graph of several norms.
        for value in values.values():
            valid = valid & value.sum().isfinite()
        for name, buffer in running.items():
            buffer.lerp_(torch.where(valid, values[name].to(buffer.dtype), buffer), weight)
        updates.add_(valid)

    @staticmethod
    def update_nu(nu, largest_gamma, of_batch, weight, loss_scale) -> None:
        """PowerNorm's `ν ← ν (1 − s Γ) + s Λ`, `s = min(weight, 1 / Γ)`, in place, and the largest Γ so far.

        `of_batch` is that of [`TorchPasses.rescale_backward`], with gradients of a loss times `loss_scale`.
        """
        sums = Moments(of_batch)  # of the same layout
        count = sums.count
        number = count.clamp(min=1)
        gamma = sums.mean / number
        lambda_ = sums.m2 / (number * loss_scale)  # ν carries the units of the unscaled loss
        step = gamma.reciprocal().clamp(max=weight)
        new = torch.addcmul(nu, step, torch.addcmul(lambda_, nu, gamma, value=-1))
        # One overflow under a loss scale must not make ν NaN for good.
        valid = (count > 0) & (gamma.sum() + lambda_.sum()).isfinite()
        nu.copy_(torch.where(valid, new, nu))
        largest_gamma.copy_(torch.where(valid, torch.maximum(largest_gamma, gamma.max()), largest_gamma))

    @staticmethod
    def merge(pooled: torch.Tensor, moments: Moments) -> None:
        """Take `moments` into the `pooled` ones, packed, in place."""
        pooled.copy_(merge_moments(Moments(torch.stack([pooled, moments.packed]))).packed)

    @staticmethod
    def penalize(moments: Moments, *options) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`penalize`](hf_normswap.modeling.discrepancy.penalize)."""
        return penalize(moments, *options)


def power_moments(x, mask, squares):
    """Moments about zero, those of norms without a mean, from the sum of squares over real tokens."""
    return Moments.of(count_tokens(x, mask), torch.zeros_like(squares), squares)


def gradients_of_affine(sums, inverse):
    """Gradients of γ and β of `y = γ z · inverse + β` from the sums over real tokens and pads."""
    return inverse * (sums[1] + sums[3]), sums[0] + sums[2]


def promote(x):
    """`x` in the dtype of statistics: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _values(x, mask):
    """`x` in the dtype of statistics, with zeros for what a pad may hold and a gradient could not bear."""
    values = promote(x)
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
    by_group = _by_group(x, groups)
    inverse = torch.rsqrt(torch.linalg.vector_norm(by_group, dim=-1, keepdim=True).square() / by_group.shape[-1] + eps)
    return (_by_group(x, groups) * inverse).flatten(-2), inverse
