"""The passes of batch norms as operators of PyTorch: opaque to `torch.compile` and `torch.export`, one node each."""

import torch

from hf_normswap.modeling.backends import GradCoefficients, ReferenceBackend, get_backend
from hf_normswap.modeling.moments import Moments


class OperatorBackend(ReferenceBackend):
    """The [`ReferenceBackend`](hf_normswap.modeling.backends.ReferenceBackend) in operators: a pass is one of them."""

    @staticmethod
    def moments(x, mask):
        return Moments(torch.ops.hf_normswap.moments(x, mask))

    @staticmethod
    def sum_squares(x, mask, groups, eps):
        return torch.ops.hf_normswap.sum_squares(x, mask, groups, eps)

    @staticmethod
    def affine_fwd(x, mask, center, scale, shift, groups, eps, wants_squares):
        y, squares = torch.ops.hf_normswap.affine_fwd(x, mask, center, scale, shift, groups, eps, wants_squares)
        return y, squares if wants_squares else None

    @staticmethod
    def grad_sums(g, x, mask, center, groups, eps):
        return torch.ops.hf_normswap.grad_sums(g, x, mask, center, groups, eps)

    @staticmethod
    def affine_bwd(g, x, mask, center, coefficients, groups, eps, wants_sums):
        dx, sums = torch.ops.hf_normswap.affine_bwd(g, x, mask, center, *coefficients, groups, eps, wants_sums)
        return dx, sums if wants_sums else None


def _like_tokens(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _statistic(x, *shape):
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _finish(
    x: torch.Tensor, tokens: torch.Tensor, statistic: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fakes promise, whatever the passes return: no `None`, contiguous tokens, and the dtypes of `x`."""
    none = _statistic(x, 0)
    return tokens.contiguous(), none if statistic is None else statistic.to(none.dtype)


if not hasattr(torch.ops.hf_normswap, "affine_fwd"):  # the file may be imported twice

    @torch.library.custom_op("hf_normswap::moments", mutates_args=())
    def _moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return get_backend(x).moments(x, mask).packed

    @_moments.register_fake
    def _(x, mask):
        return _statistic(x, 2 * x.shape[-1] + 1)

    @torch.library.custom_op("hf_normswap::sum_squares", mutates_args=())
    def _squares(x: torch.Tensor, mask: torch.Tensor | None, groups: int, eps: float) -> torch.Tensor:
        return get_backend(x).sum_squares(x, mask, groups, eps)

    @_squares.register_fake
    def _(x, mask, groups, eps):
        return _statistic(x, x.shape[-1])

    @torch.library.custom_op("hf_normswap::affine_fwd", mutates_args=())
    def _forward(
        x: torch.Tensor,
        mask: torch.Tensor | None,
        center: torch.Tensor | None,
        scale: torch.Tensor,
        shift: torch.Tensor,
        groups: int,
        eps: float,
        wants_squares: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _finish(x, *get_backend(x).affine_fwd(x, mask, center, scale, shift, groups, eps, wants_squares))

    @_forward.register_fake
    def _(x, mask, center, scale, shift, groups, eps, wants_squares):
        return _like_tokens(x), _statistic(x, x.shape[-1] if wants_squares else 0)

    @torch.library.custom_op("hf_normswap::grad_sums", mutates_args=())
    def _sums(
        g: torch.Tensor,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        center: torch.Tensor | None,
        groups: int,
        eps: float,
    ) -> torch.Tensor:
        return get_backend(x).grad_sums(g, x, mask, center, groups, eps).to(_statistic(x, 0).dtype)

    @_sums.register_fake
    def _(g, x, mask, center, groups, eps):
        return _statistic(x, 4, x.shape[-1])

    @torch.library.custom_op("hf_normswap::affine_bwd", mutates_args=())
    def _backward(
        g: torch.Tensor,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        center: torch.Tensor | None,
        grad_scale: torch.Tensor,
        input_scale: torch.Tensor,
        offset: torch.Tensor | None,
        pad_grad_scale: torch.Tensor,
        groups: int,
        eps: float,
        wants_sums: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        coefficients = GradCoefficients(grad_scale, input_scale, offset, pad_grad_scale)
        return _finish(x, *get_backend(x).affine_bwd(g, x, mask, center, coefficients, groups, eps, wants_sums))

    @_backward.register_fake
    def _(g, x, mask, center, grad_scale, input_scale, offset, pad_grad_scale, groups, eps, wants_sums):
        return _like_tokens(x), _statistic(x, *((4, x.shape[-1]) if wants_sums else (0,)))
