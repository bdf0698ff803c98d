"""The nodes of `nodes.cpp` as operators of PyTorch, and what they call where gradients are differentiated again."""

import ctypes

import torch

from hf_normswap.modeling.discrepancy import differentiate_penalty
from hf_normswap.modeling.passes import TorchPasses


def register_nodes(library: ctypes.CDLL) -> None:
    """Enter the nodes of a compiled `library`, if it has any, once in a process.

    Raises:
        OSError: when PyTorch does not take them.
    """
    if not hasattr(library, "register_nodes") or hasattr(torch.ops.hf_normswap, "batch_norm"):
        return
    library.register_nodes.restype = ctypes.c_char_p
    if said := library.register_nodes():
        raise OSError(said.decode())


# That of torch.autograd.function.once_differentiable.
_MESSAGE = b"trying to differentiate twice a function that was marked with @once_differentiable"

if not hasattr(torch.ops.hf_normswap, "batch_norm_backward"):
    _LIBRARY = torch.library.Library("hf_normswap", "FRAGMENT")
    _LIBRARY.define(
        "batch_norm_backward(Tensor? g, Tensor? of_value, Tensor x, Tensor weight, Tensor? mask, Tensor[] running, "
        "bool centered, float eps, str? distance, float[]? weights) -> Tensor[]"
    )
    _LIBRARY.define("refuse_second_derivative(Tensor[] gradients) -> Tensor[]")

    @torch.library.impl(_LIBRARY, "batch_norm_backward", "CompositeImplicitAutograd")
    def _batch_norm_backward(g, of_value, x, weight, mask, running, centered, eps, distance, weights):
        """Gradients of x, γ and β in single operations, which can be differentiated, traced and transformed."""
        g = torch.zeros_like(x) if g is None else g.to(x.dtype)
        with torch.enable_grad():  # for the penalty, where the gradient is no more than watched
            moments, of_moments = TorchPasses.batch_moments(x, mask, centered), None
        if of_value is not None and x.requires_grad:
            of_moments = of_value * differentiate_penalty(moments, *running, eps, distance, weights)
        dx, *of_affine = TorchPasses.standardize_backward(g, x, weight, mask, moments, of_moments, eps, centered, None)
        return dx, *(value.to(weight.dtype) for value in of_affine)

    @torch.library.impl(_LIBRARY, "refuse_second_derivative", "CompositeImplicitAutograd")
    def _refuse_second_derivative(gradients):
        """The `gradients` as `once_differentiable` returns them."""
        error = torch._C._functions.DelayedError(_MESSAGE, len(gradients))
        return error(*(value.detach().requires_grad_() for value in gradients))
