"""Normalisation of a batch in its own statistics: what batch norms have in common, with its gradient."""

import torch

from .discrepancy import differentiate_penalty
from .moments import Moments
from .paths import passes_for


class BatchStandardize(torch.autograd.Function):
    """`y = γ x̂ + β` of a batch in its own statistics, with the exact gradient.

    With `norm.centered`: `x̂ = (x − μ_B) / √(σ_B² + ε)` (batch normalisation); else `x / √(ψ_B² + ε)` (PN-V). At a pad
    the output is the same affine map, with its plain gradient.

    Further outputs are the packed moments, differentiable, without `centered` those about zero; the penalty, if the
    norm has a `regularization`, whose gradient is taken in the forward, as operations of its own would take as long as
    a pass over the tokens; and the running values from before. Without `running`, those of a block that may run again,
    it copies these by itself and tracks the batch.

    With a process `group` the batch is that of its ranks together, and so is the gradient: that of the sum of the
    losses of all ranks. One collective in the forward, one in the backward, of the same size on every rank.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mask, norm, running):  # with setup_context a tenth of a millisecond more
        passes = passes_for(x, weight, norm.pending, norm=norm.norm_name)
        tracks = running is None
        running = norm.copy_running() if tracks else running
        y, moments = passes.standardize(x, weight, bias, mask, norm.eps, norm.centered, norm.process_group)
        value = of_penalty = None
        if norm.regularization is not None and not torch.compiler.is_compiling():
            value, of_penalty = passes.penalize(moments, *running.values(), *norm.regularization)
        if tracks:
            norm.track(moments)
        # Not the norm, which holds the penalty, and so this graph.
        ctx.norm_name, ctx.options = norm.norm_name, (norm.eps, norm.centered, norm.process_group)
        ctx.regularizer = running, norm.regularization
        ctx.set_materialize_grads(False)
        # The output, and nothing computed from it: a second derivative sees that it depends on x.
        ctx.save_for_backward(x, weight, mask, moments.packed, of_penalty)
        return y, moments.packed, value, running

    @staticmethod
    def backward(ctx, g, of_moments, of_value, _):
        x, weight, mask, packed, of_penalty = ctx.saved_tensors
        g = torch.zeros_like(x) if g is None else g.to(x.dtype)
        if of_value is not None:
            if torch.is_grad_enabled():  # for a second derivative
                running, regularization = ctx.regularizer
                of_penalty = differentiate_penalty(Moments(packed), *running.values(), *regularization)
            of_penalty = of_value * of_penalty
            of_moments = of_penalty if of_moments is None else of_moments + of_penalty
        dx, of_weight, of_bias = passes_for(x, g, weight, norm=ctx.norm_name).standardize_backward(
            g, x, weight, mask, Moments(packed), of_moments, *ctx.options
        )
        of_bias = of_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, of_weight.to(weight.dtype), of_bias, None, None, None
