"""What computes the norms: the interface of a backend, its reference in PyTorch, and the choice of one for each call.

`x`, `y`, `g`, `dx`: tokens of shape `(..., C)`. `mask`: of shape `(...)`, True at real tokens, or `None`. Statistics
and coefficients: of shape `(C,)`, float32 or float64. With `groups` above 0, z is `x` divided by the root mean square
of each group of channels of its token (the group scaling of PowerNorm), else z is `x`. At pads NaN, infinity and
values of at least √max / C, whose squares would overflow, count as zero and get no gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .discrepancy import penalty_with_grad
from .moments import Moments, count_tokens, masked_moments, merge_moments, merge_over_ranks, sum_over_ranks, sum_tokens


class GradCoefficients(NamedTuple):
    """Coefficients of the gradient of z in a backward, each of shape `(C,)`.

    At real tokens the gradient of z is `grad_scale · g + input_scale · (z − center) + offset`. At pads, whose output
    is an affine map of z, it is `pad_grad_scale · g`. The gradient of x follows through the group scaling.
    """

    grad_scale: torch.Tensor
    input_scale: torch.Tensor
    offset: torch.Tensor | None
    pad_grad_scale: torch.Tensor


class ReferenceBackend:
    """Plain PyTorch, for every device and dtype. A native backend derives from it and returns the same up to rounding.

    The interface has two parts. The passes over the tokens are `moments`, `sum_squares`, `affine_fwd`, `grad_sums` and
    `affine_bwd`: synchronisation over ranks comes between two of them. The norms are made of these: `batch_norm_fwd`,
    `batch_norm_bwd`, `power_norm_fwd`, `power_norm_bwd`, `rms_norm_fwd`, `rms_norm_bwd`, and the updates of their
    statistics. All can be differentiated, except `penalty_with_grad`, which returns the gradient for the moments, and
    the updates in place.

    Attributes:
        dtypes (`tuple` of `torch.dtype`): of the tokens that a native backend takes; the reference takes all.
    """

    dtypes: tuple[torch.dtype, ...] = ()

    @staticmethod
    def load() -> None:
        """Compile what the backend needs; raises `OSError` or `ImportError` where it does not work here."""

    @staticmethod
    def moments(x: torch.Tensor, mask: torch.Tensor | None) -> Moments:
        """Moments of the real tokens (see [`masked_moments`])."""
        return masked_moments(promote(x), mask)

    @staticmethod
    def sum_squares(x, mask, groups, eps) -> torch.Tensor:
        """Sum of z² over real tokens."""
        return sum_tokens(scale_groups(_values(x, mask), groups, eps)[0].square(), mask)

    @staticmethod
    def affine_fwd(
        x, mask, center, scale, shift, groups, eps, wants_squares
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`y = scale (z − center) + shift` in the dtype of `x`, and the sum of z² over real tokens if wanted.

        A `center` of `None` is zero.
        """
        z, _ = scale_groups(_values(x, mask), groups, eps)
        y = torch.addcmul(shift, z if center is None else z - center, scale)
        if y.dtype != x.dtype:  # else y.to() is y, and the gradient that torch 2.11 compiles is zero (pytorch #180642)
            y = y.to(x.dtype)
        return y, sum_tokens(z.square(), mask) if wants_squares else None

    @staticmethod
    def grad_sums(g, x, mask, center, groups, eps) -> torch.Tensor:
        """Four sums, of shape `(4, C)`: of g and g (z − center) over real tokens, then of the same over pads."""
        z, _ = scale_groups(_values(x, mask), groups, eps)
        g = promote(g)
        products = g * (z if center is None else z - center)
        sums = [sum_tokens(g), sum_tokens(products)]
        if mask is None:
            return torch.stack([*sums, *map(torch.zeros_like, sums)])
        real = [sum_tokens(g, mask), sum_tokens(products, mask)]
        return torch.stack([*real, *(total - part for total, part in zip(sums, real))])

    @staticmethod
    def affine_bwd(
        g, x, mask, center, coefficients, groups, eps, wants_sums
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of `x`, with the [`GradCoefficients`] of the gradient of z; and the `grad_sums` if wanted."""
        grad_scale, input_scale, offset, pad_grad_scale = coefficients
        values = _values(x, mask)
        z, inverse = scale_groups(values, groups, eps)
        wide = promote(g)
        dx = torch.addcmul(wide * grad_scale, z if center is None else z - center, input_scale)
        if offset is not None:
            dx = dx + offset
        if mask is not None:
            dx = torch.where(mask.unsqueeze(-1), dx, wide * pad_grad_scale)
        if groups:
            along = _by_group(dx * z, groups).mean(-1, keepdim=True)
            dx = ((_by_group(dx, groups) - _by_group(z, groups) * along) * inverse).flatten(-2)
        if mask is not None:
            dx = torch.where(mask.unsqueeze(-1) | (values == x), dx, 0)
        return dx.to(x.dtype), ReferenceBackend.grad_sums(g, x, mask, center, groups, eps) if wants_sums else None

    @classmethod
    def batch_moments(cls, x, mask, centered) -> Moments:
        """What a batch is standardized by: its moments, those about zero where it is not `centered`."""
        return cls.moments(x, mask) if centered else power_moments(x, mask, cls.sum_squares(x, mask, 0, 0.0))

    @classmethod
    def batch_norm_fwd(cls, x, weight, bias, mask, eps, centered, group) -> tuple[torch.Tensor, Moments]:
        """`y = γ (x − c) / √(v + ε) + β`, and moments of the batch, that of all ranks of `group` together.

        c and v are mean and variance where it is `centered`, else 0 and the mean square (with moments about zero).
        """
        moments = cls.batch_moments(x, mask, centered)
        if group is not None:
            moments = merge_over_ranks(moments, group)
        y, _ = cls._scale(x, weight, bias, mask, moments.mean if centered else None, moments.var, 0, eps, False)
        return y, moments

    @classmethod
    def batch_norm_bwd(cls, g, x, weight, mask, moments, grad_moments, eps, centered, group):
        """Gradients of x, γ and β from those of y and of the packed moments, the latter `None` without one."""
        center = moments.mean if centered else None
        inverse = torch.rsqrt(moments.var + eps)
        sums = cls.grad_sums(g, x, mask, center, 0, eps)
        total, products = sums[0], sums[1]
        if group is not None:
            if grad_moments is None:
                grad_moments = torch.zeros_like(moments.packed)
            pooled = sum_over_ranks(torch.cat([total, products, grad_moments]), group)
            total, products, grad_moments = pooled.split((len(total), len(total), len(grad_moments)))
        # The gradient of x has three parts: through the affine map, through σ (input_scale) and through μ (offset).
        scale, count = weight * inverse, moments.count.clamp(min=1)
        share = scale / -count
        input_scale = share * products * inverse.square()
        offset = share * total if centered else torch.zeros_like(input_scale)
        if grad_moments is not None:
            offset = offset + Moments(grad_moments).mean / count
            input_scale = input_scale + 2 * Moments(grad_moments).m2
        coefficients = GradCoefficients(scale, input_scale, offset, pad_grad_scale=scale)
        dx, _ = cls.affine_bwd(g, x, mask, center, coefficients, 0, eps, False)
        return dx, *gradients_of_affine(sums, inverse)

    @classmethod
    def power_norm_fwd(cls, x, weight, bias, mask, power, groups, eps) -> tuple[torch.Tensor, Moments]:
        """`y = γ z / √(power + ε) + β`, and the moments of z about zero."""
        y, squares = cls._scale(x, weight, bias, mask, None, power, groups, eps, True)
        return y, power_moments(x, mask, squares)

    @classmethod
    def power_norm_bwd(cls, g, x, weight, mask, power, grad_power, nu, moments, groups, eps):
        """Gradients of x, γ and β for `x̂ = z / √(power + ε)`; and `(n, Σ x̂², Σ γ g x̂)` over real tokens, `(2C + 1,)`.

        That of z is `(γ g − ν x̂) / √(grad_power + ε)` at real tokens and `γ g / √(power + ε)` at pads; that of x
        follows. `moments` are those of z about zero; without `grad_power` it is `power`.
        """
        inverse = torch.rsqrt(power + eps)
        grad_inverse = inverse if grad_power is None else torch.rsqrt(grad_power + eps)
        scale = weight * inverse
        grad_scale, input_scale = weight * grad_inverse, -nu * inverse * grad_inverse
        coefficients = GradCoefficients(grad_scale, input_scale, None, pad_grad_scale=scale)
        dx, sums = cls.affine_bwd(g, x, mask, None, coefficients, groups, eps, True)
        batch_sums = Moments.of(moments.count, inverse.square() * moments.m2, scale * sums[1])
        return dx, *gradients_of_affine(sums, inverse), batch_sums.packed

    @classmethod
    def rms_norm_fwd(cls, x, weight, bias, mask, eps) -> torch.Tensor:
        """`y = γ x / √(mean_c x² + ε) + β`, the mean over the channels of each token."""
        scale, shift = promote(weight), promote(torch.zeros_like(weight) if bias is None else bias)
        return cls.affine_fwd(x, mask, None, scale, shift, 1, eps, False)[0]

    @classmethod
    def rms_norm_bwd(cls, g, x, weight, mask, eps):
        """Gradients of x, γ and β."""
        scale = promote(weight)
        coefficients = GradCoefficients(scale, torch.zeros_like(scale), None, pad_grad_scale=scale)
        dx, sums = cls.affine_bwd(g, x, mask, None, coefficients, 1, eps, True)
        return dx, *gradients_of_affine(sums, 1)

    @classmethod
    def _scale(cls, x, weight, bias, mask, center, variance, groups, eps, wants_squares):
        inverse = torch.rsqrt(variance + eps)
        shift = torch.zeros_like(inverse) if bias is None else bias.to(inverse.dtype)
        return cls.affine_fwd(x, mask, center, weight * inverse, shift, groups, eps, wants_squares)

    @staticmethod
    def update_running(running: dict[str, torch.Tensor], moments: Moments, updates: torch.Tensor, weight) -> None:
        """`r ← (1 − weight) r + weight · value` in place.

        `running` names the property of `moments` that a buffer follows: `mean`, `var`, `power`. `updates` grows by
        one. Nothing changes where there are no tokens or a value is not finite.
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
    def update_nu(nu, largest_gamma, batch_sums, weight, loss_scale) -> None:
        """PowerNorm's `ν ← ν (1 − s Γ) + s Λ`, `s = min(weight, 1 / Γ)`, in place, and the largest Γ so far.

        Γ is the mean of x̂², Λ that of γ g x̂. `batch_sums` is that of [`ReferenceBackend.power_norm_bwd`], with
        gradients of a loss times `loss_scale`.
        """
        sums = Moments(batch_sums)  # of the same layout
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
    def merge_pending(pooled: torch.Tensor, moments: Moments) -> None:
        """Merge `moments` into the packed `pooled` ones, in place."""
        pooled.copy_(merge_moments(Moments(torch.stack([pooled, moments.packed]))).packed)

    @staticmethod
    def penalty_with_grad(moments: Moments, *options) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`penalty_with_grad`](hf_normswap.modeling.discrepancy.penalty_with_grad)."""
        return penalty_with_grad(moments, *options)


def power_moments(x, mask, squares):
    """Moments about zero, for norms without a mean: `mean` is 0, and `m2` the sum of squares over real tokens."""
    return Moments.of(count_tokens(x, mask), torch.zeros_like(squares), squares)


def gradients_of_affine(sums, inverse):
    """Gradients of γ and β of `y = γ z · inverse + β` from the sums over real tokens and pads."""
    return inverse * (sums[1] + sums[3]), sums[0] + sums[2]


def promote(x):
    """`x` in the dtype of statistics: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def select_finite(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeroes pads of no finite sum of squares, whose gradients would be NaN; leaves all other positions alone."""
    if mask is None:
        return x
    bound = torch.finfo(torch.promote_types(x.dtype, torch.float32)).max ** 0.5 / x.shape[-1]
    return torch.where(mask.unsqueeze(-1) | (x.abs() < bound), x, 0)


def _values(x, mask):
    """`x` in the dtype of statistics, with finite pads."""
    return select_finite(promote(x), mask)


def _by_group(x, groups):
    return x.unflatten(-1, (groups, -1))


def scale_groups(x, groups, eps):
    """z, and 1 / rms of each group."""
    if not groups:
        return x, None
    by_group = _by_group(x, groups)
    inverse = torch.rsqrt(torch.linalg.vector_norm(by_group, dim=-1, keepdim=True).square() / by_group.shape[-1] + eps)
    return (_by_group(x, groups) * inverse).flatten(-2), inverse


# A device type, or a device type and the name of a norm: the function that returns the backend for given tokens, or
# `None`. `hf_normswap.kernels` enters its backends here; a model that is loaded without the package has none.
BACKENDS: dict[str | tuple[str, str], Callable[[torch.Tensor], type | None]] = {}
# A device type: the backend of compiled graphs, whose methods are operators.
COMPILED_BACKENDS: dict[str, type] = {}


def is_traced() -> bool:
    """Whether a tracer, a transform or a mode records single operations: a native backend is invisible to it."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def get_backend(
    x: torch.Tensor, *others: torch.Tensor, norm: str | None = None, differentiable: bool = False
) -> type[ReferenceBackend]:
    """The backend that computes with `x` and `others`.

    A backend for the norm of that name goes before the one of the device. Native backends take plain tensors of
    floating point on one device; everything else is for the reference.

    Args:
        x (`torch.Tensor` of shape `(..., C)`): tokens.
        others (`torch.Tensor`): the other tensors of the computation.
        norm (`str`, *optional*): registered name of the norm.
        differentiable (`bool`, *optional*, defaults to `False`):
            whether autograd has to follow the operations, as in a backward with `create_graph=True`. Only the
            reference can be followed.
    """
    if torch.compiler.is_compiling():
        return COMPILED_BACKENDS.get(x.device.type, ReferenceBackend)
    device = x.device
    find = BACKENDS.get((device.type, norm)) or BACKENDS.get(device.type)
    if differentiable or find is None or not x.is_floating_point() or x.numel() == 0 or is_traced():
        return ReferenceBackend
    for tensor in (x, *others):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device != device:
            return ReferenceBackend
    return find(x) or ReferenceBackend
