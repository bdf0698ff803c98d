"""What tests of the passes of batch norms share: inputs, exact results, and how far off a path may be."""

from functools import partial

import torch

from hf_normswap.modeling.backends import GradCoefficients, ReferenceBackend


EPS = 1e-5
DIRT = [float("nan"), float("inf"), -float("inf"), 1e30, 0.0]


class Inputs:
    """Tokens, gradients, a mask or none with dirt at its pads, and coefficients; seeded."""

    def __init__(self, *shape, groups=0, dtype=torch.float32, masked=True, offset=0.5, optional=True, device="cpu"):
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.groups = groups
        self.x, self.g = (offset + draw(*shape)).to(dtype), draw(*shape).to(dtype)
        self.mask = draw(*shape[:-1]) < 0.7 if masked else None
        if masked:
            dirty = ~self.mask.unsqueeze(-1) & (draw(*shape) > 0.5)
            dirt = torch.tensor(DIRT).repeat(dirty.sum())[: dirty.sum()]
            self.x[dirty] = dirt.to(dtype)
        self.center, self.shift, self.scale, self.a, self.b, self.pad = draw(6, shape[-1])
        self.center = offset + 0.1 * self.center  # near the mean, as in a norm: products around it must not cancel
        if not optional:
            self.center = None
        vars(self).update({k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})

    def run(self, backend, shift=True) -> dict[str, torch.Tensor]:
        """Every result of every pass."""
        tokens, scaling = (self.x, self.mask), (self.groups, EPS)
        both = self.g, *tokens, self.center
        coefficients = GradCoefficients(self.a, self.b, self.shift if shift else None, self.pad)
        moments = backend.moments(*tokens)
        results = {"count": moments.count, "mean": moments.mean, "m2": moments.m2}
        results["squares"] = backend.sum_squares(*tokens, *scaling)
        results["y alone"], none = backend.affine_fwd(*tokens, self.center, self.scale, self.shift, *scaling, False)
        assert none is None
        results["y"], results["squares of y"] = backend.affine_fwd(
            *tokens, self.center, self.scale, self.shift, *scaling, True
        )
        results["sums"] = backend.grad_sums(*both, *scaling)
        results["dx alone"], none = backend.affine_bwd(*both, coefficients, *scaling, False)
        assert none is None
        results["dx"], results["sums of dx"] = backend.affine_bwd(*both, coefficients, *scaling, True)
        return results

    def exact(self, **options) -> dict[str, torch.Tensor]:
        """In float64, of tokens whose dirt was put away by hand."""
        clean, dirty = Inputs.__new__(Inputs), torch.zeros_like(self.x, dtype=torch.bool)
        if self.mask is not None:
            bound = torch.finfo(torch.float32).max ** 0.5 / self.x.shape[-1]
            dirty = ~self.mask.unsqueeze(-1) & ~(self.x.abs() < bound)
        vars(clean).update({k: v.double() if _is_float(v) else v for k, v in vars(self).items()})
        clean.x = torch.where(dirty, 0, clean.x)
        results = clean.run(ReferenceBackend, **options)
        for name in ("dx", "dx alone"):
            results[name] = torch.where(dirty, 0, results[name])
        return results


def assert_as_good_as_torch(inputs: Inputs, backend: type, **options) -> None:
    """Dtypes and shapes of PyTorch's path, and at most twice its error to float64, plus a few units of rounding."""
    exact, ours, theirs = (
        inputs.exact(**options),
        inputs.run(backend, **options),
        inputs.run(ReferenceBackend, **options),
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape == theirs[name].shape, name
        assert value.is_contiguous(), name
        if not value.numel():
            continue
        error, allowed = ((results[name].double() - exact[name]).abs() for results in (ours, theirs))
        # Sums may cancel: what they are rounded to is that of the largest.
        unit = torch.finfo(value.dtype).eps * exact[name].abs().amax(-1, keepdim=True)
        if name.startswith("sums"):
            unit = unit.amax()
        if name == "mean":
            unit = unit.clamp(min=torch.finfo(value.dtype).eps)  # of tokens around 1
        excess = error.max() - 2 * allowed.max() - 4 * unit.max()
        assert excess <= 0, f"{name} is off by {error.max():.2e}, that of PyTorch by {allowed.max():.2e}"


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()
