"""The autograd functions of the norms: one implementation, which every backend computes for."""

import torch

from .backends import get_backend, power_moments
from .discrepancy import differentiate_penalty
from .moments import Moments, merge_over_ranks, sum_over_ranks


class NormalizeBatch(torch.autograd.Function):
    """`y = γ x̂ + β` of a batch in its own statistics, with the exact gradient.

    With `norm.centered`: `x̂ = (x − μ_B) / √(σ_B² + ε)` (batch normalisation); else `x / √(ψ_B² + ε)` (PN-V). At a pad
    the output is the same affine map, with its plain gradient.

    Further outputs are the packed moments, differentiable, without `centered` those about zero; the penalty, if the
    norm has a `regularization`, whose gradient is taken in the forward, as operations of its own would take as long as
    a pass over the tokens; and the running values from before. `running` are these values, copied before a forward
    that checkpointing may repeat; with `None` this function copies them, and updates the norm.

    With a process `group` the batch is that of its ranks together, and so is the gradient: that of the sum of the
    losses of all ranks. One collective in the forward, one in the backward, of the same size on every rank.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mask, norm, running):  # setup_context costs 0.1 ms more
        backend = get_backend(x, weight, norm.pending, norm=norm.norm_name)
        tracks = running is None
        running = norm.copy_running() if tracks else running
        y, moments = backend.batch_norm_fwd(x, weight, bias, mask, norm.eps, norm.centered, norm.process_group)
        value = grad_penalty = None
        if norm.regularization is not None and not torch.compiler.is_compiling():
            value, grad_penalty = backend.penalty_with_grad(moments, *running.values(), *norm.regularization)
        if tracks:
            norm.update_running(moments)
        # Do not keep the norm: it holds the penalty, and so this graph.
        ctx.norm_name, ctx.options = norm.norm_name, (norm.eps, norm.centered, norm.process_group)
        ctx.regularizer = running, norm.regularization
        ctx.set_materialize_grads(False)
        # The output, and nothing computed from it: a second derivative sees that it depends on x.
        ctx.save_for_backward(x, weight, mask, moments.packed, grad_penalty)
        return y, moments.packed, value, running

    @staticmethod
    def backward(ctx, g, grad_moments, grad_value, _):
        x, weight, mask, packed, grad_penalty = ctx.saved_tensors
        g = torch.zeros_like(x) if g is None else g.to(x.dtype)
        if grad_value is not None:
            if torch.is_grad_enabled():  # for a second derivative
                running, regularization = ctx.regularizer
                grad_penalty = differentiate_penalty(Moments(packed), *running.values(), *regularization)
            grad_penalty = grad_value * grad_penalty
            grad_moments = grad_penalty if grad_moments is None else grad_moments + grad_penalty
        # With create_graph=True a backward runs in grad mode, and is differentiated in turn.
        backend = get_backend(x, g, weight, norm=ctx.norm_name, differentiable=torch.is_grad_enabled())
        dx, grad_weight, grad_bias = backend.batch_norm_bwd(
            g, x, weight, mask, Moments(packed), grad_moments, *ctx.options
        )
        grad_bias = grad_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, grad_weight.to(weight.dtype), grad_bias, None, None, None


class PowerNormalize(torch.autograd.Function):
    """`y = γ x̂ + β`, x̂ = z / √(ψ² + ε), with PowerNorm's backward; there Γ and Λ go to buffers of the layer.

    The packed moments of the batch about zero are an output, too. In the warm-up ψ and ν are those of the batch, and a
    forward and a backward take two passes over the tokens each, not one.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mask, power, nu, is_warming_up, update_weight, groups, eps, tracks, layer):
        backend, moments = get_backend(x, weight, power, norm=layer.norm_name), None
        if is_warming_up is not None:
            moments = power_moments(x, mask, backend.sum_squares(x, mask, groups, eps))
            if layer.process_group is not None:
                moments = merge_over_ranks(moments, layer.process_group)
            power = torch.where(is_warming_up, moments.power, power)
        y, local_moments = backend.power_norm_fwd(x, weight, bias, mask, power, groups, eps)
        moments = local_moments if moments is None else moments
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments.packed)
        ctx.save_for_backward(x, weight, mask, power, nu, is_warming_up, moments.packed, local_moments.packed)
        ctx.norm_name, ctx.update_weight, ctx.groups, ctx.eps = layer.norm_name, update_weight, groups, eps
        ctx.grad_scale, ctx.tracks, ctx.accumulating = layer.grad_scale, tracks, layer.accumulating
        # Not saved for backward: updated there on purpose.
        ctx.nu, ctx.largest_gamma, ctx.loss_scale = layer.nu, layer.largest_gamma, layer.loss_scale
        ctx.pending, ctx.group = layer.pending_gradient, layer.process_group
        return y, moments.packed

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * 12
        x, weight, mask, power, nu, is_warming_up, moments, local_moments = ctx.saved_tensors
        with torch.no_grad():
            backend = get_backend(x, g, weight, power, norm=ctx.norm_name)
            local_moments, wide = Moments(local_moments), g.to(x.dtype)
            if is_warming_up is not None:
                _, products, *_ = backend.grad_sums(wide, x, mask, None, ctx.groups, ctx.eps)
                products = products * weight * torch.rsqrt(power + ctx.eps)
                nu = torch.where(is_warming_up, _nu_of_batch(local_moments.count, products, ctx.group), nu)
            grad_power = Moments(moments).power if ctx.grad_scale == "batch" else None
            dx, grad_weight, grad_bias, batch_sums = backend.power_norm_bwd(
                wide, x, weight, mask, power, grad_power, nu, local_moments, ctx.groups, ctx.eps
            )
            if ctx.tracks and ctx.accumulating:
                ctx.pending.add_(batch_sums)
            elif ctx.tracks:
                get_backend(ctx.nu, batch_sums).update_nu(
                    ctx.nu, ctx.largest_gamma, batch_sums, ctx.update_weight, ctx.loss_scale
                )
            gradients = dx, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _NoSecondDerivative.apply(*gradients, g, x, weight)
        dx, grad_weight, grad_bias = gradients
        return dx, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, *(None,) * 9


class NormalizeByWindow(torch.autograd.Function):
    """`y = γ r x̂ + β` (MABN) or `γ x̂ + β` (UN), x̂ = x / √(χ² + ε), with the backward of these norms.

    `running` are the values of the norm from before the batch, the windows among them. The statistic of the gradient
    goes to buffers of the layer in the backward. The packed moments of the batch about zero are an output, too.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mask, running, tracks, layer):
        backend, step, before = get_backend(x, weight, layer.pending), running["num_batches_tracked"], "running_power"
        moments = power_moments(x, mask, backend.sum_squares(x, mask, 0, 0.0))
        if layer.process_group is not None:
            moments = merge_over_ranks(moments, layer.process_group)
        power = layer.power_of(moments, running["power_window"], step, running[before])
        ratio = layer.correction(power, step, running[before])
        gain = weight.to(power.dtype) if layer.is_geometric else weight * ratio
        y, local_moments = backend.power_norm_fwd(x, gain, bias, mask, power, 0, layer.eps)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(moments.packed)
        windows = running["gradient_window"], running.get("gradient_mean")
        ctx.save_for_backward(x, weight, mask, power, ratio, step, moments.packed, local_moments.packed, *windows)
        ctx.layer, ctx.tracks, ctx.accumulating = layer, tracks, layer.accumulating
        return y, moments.packed

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * 7
        x, weight, mask, power, ratio, step, moments, local_moments, window, mean = ctx.saved_tensors
        layer = ctx.layer
        with torch.no_grad():
            backend, wide = get_backend(x, g, weight, power), g.to(x.dtype)
            gain, inverse = weight * ratio, torch.rsqrt(power + layer.eps)
            _, products, *_ = backend.grad_sums(wide, x, mask, None, 0, layer.eps)
            batch = _nu_of_batch(Moments(local_moments).count, products * gain * inverse, layer.process_group)
            # The windows are in units of a loss that is not scaled.
            scaled = mean_of_window(window * layer.loss_scale, step, batch)
            nu = torch.where(layer.is_settled(step), scaled, batch)
            if mean is not None:
                nu = torch.lerp(mean * layer.loss_scale, nu, layer.momentum)
            dx, grad_gain, grad_bias, batch_sums = backend.power_norm_bwd(
                wide, x, gain, mask, power, None, nu, Moments(local_moments), 0, layer.eps
            )
            if layer.is_geometric:  # its output has no r, and neither has the gradient of that map at a pad
                dx = dx if mask is None else torch.where(mask.unsqueeze(-1), dx, (dx / ratio).to(dx.dtype))
            else:
                grad_gain = grad_gain * ratio
            if ctx.tracks and ctx.accumulating:
                layer.pending_gradient.add_(batch_sums)
            elif ctx.tracks:
                layer.put_gradient(batch / layer.loss_scale, step, Moments(moments).count > 0)
            gradients = dx, grad_gain.to(weight.dtype), grad_bias.to(weight.dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _NoSecondDerivative.apply(*gradients, g, x, weight)
        dx, grad_gain, grad_bias = gradients
        return dx, grad_gain, grad_bias if ctx.needs_input_grad[2] else None, *(None,) * 4


def mean_of_window(window, step, batch, geometric: bool = False) -> torch.Tensor:
    """Mean over the rows of a window `(m, C)`, with `batch` in the place of the row that its step takes."""
    is_its_row = torch.arange(len(window), device=window.device) == step % len(window)
    rows = torch.where(is_its_row.unsqueeze(-1), batch.to(window.dtype), window)
    return rows.log().mean(0).exp() if geometric else rows.mean(0)


class _NoSecondDerivative(torch.autograd.Function):
    """Returns the gradients as they are, and raises when they are differentiated.

    `once_differentiable` only sees that they depend on the incoming gradient `g`. A second derivative with respect to
    x or the weight would silently be 0 where `g` is a constant, and in `torch.autograd.functional.hessian`.
    """

    @staticmethod
    def forward(ctx, dx, grad_weight, grad_bias, g, x, weight):
        return dx, grad_weight, grad_bias

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "PowerNorm, MABN and UN have no second derivative, as their backward is an approximation with a running "
            "statistic: use pnv or batchnorm where one is needed."
        )


def _nu_of_batch(count, products, group):
    """The ν with which the backward is PN-V's: Λ of the batch."""
    if group is not None:
        pooled = sum_over_ranks(torch.cat([count.unsqueeze(0), products]), group)
        count, products = pooled[0], pooled[1:]
    return products / count.clamp(min=1)


class RMSNormalize(torch.autograd.Function):
    """`y = γ x / rms + β`, with the exact gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, eps):
        ctx.save_for_backward(x, weight, mask)
        ctx.eps = eps
        return get_backend(x, weight, norm="rmsnorm").rms_norm_fwd(x, weight, bias, mask, eps)

    @staticmethod
    def backward(ctx, g):
        x, weight, mask = ctx.saved_tensors
        backend = get_backend(x, g, weight, norm="rmsnorm", differentiable=torch.is_grad_enabled())
        dx, grad_weight, grad_bias = backend.rms_norm_bwd(g.to(x.dtype), x, weight, mask, ctx.eps)
        grad_bias = grad_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, grad_weight.to(weight.dtype), grad_bias, None, None
