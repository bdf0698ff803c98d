"""Every registered norm, and the variants of those with modes of their own, ready for a test of what all share."""

import torch
from torch import nn

from hf_normswap import BatchStatisticNorm, Norm, available_norms, get_norm


CHANNELS = 4

# name of the variant: (registered norm, options, attributes)
VARIANTS = {name: (name, {}, {}) for name in available_norms()} | {
    "powernorm-groups": ("powernorm", {"num_groups": 2}, {}),
    "powernorm-plain": ("powernorm", {"group_scaling": False}, {}),
    "powernorm-batch": ("powernorm", {"group_scaling": False, "grad_scale": "batch"}, {}),
    "powernorm-warm-up": ("powernorm", {"group_scaling": False}, {"warmup_steps": 100}),
    "rbn-paper": ("rbn", {"distance": "sigma_l2"}, {}),
    "rbn-reference": ("rbn", {"distance": "var_l1"}, {}),
}
BATCH_VARIANTS = [name for name, (norm, _, _) in VARIANTS.items() if issubclass(get_norm(norm), BatchStatisticNorm)]


def make_norm(variant: str, dtype=torch.float64, seed: int = 0, **options) -> Norm:
    """A norm in training mode whose gain, shift and statistics are not those of the start."""
    name, usual, attributes = VARIANTS[variant]
    norm = get_norm(name)(CHANNELS, dtype=dtype, **{**usual, **options})
    vars(norm).update(attributes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    for statistic in getattr(norm, "running", ()):
        getattr(norm, statistic).uniform_(0.2, 1.5, generator=generator)
    return norm


def make_tokens(*shape, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    """Activations of shape `(*shape, CHANNELS)` whose means are not 0."""
    generator = torch.Generator().manual_seed(seed)
    return (0.7 + 1.5 * torch.randn(*shape, CHANNELS, dtype=torch.float64, generator=generator)).to(dtype)


def train_step(norm: Norm, x: torch.Tensor, upstream: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
    """Output, penalty, gradients and state after one training step whose loss is `Σ upstream · y + penalty`."""
    x = x.detach().clone().requires_grad_()
    y = norm(x, mask)
    outputs, seeds = [y], [upstream]
    if hasattr(norm, "penalty"):
        outputs.append(norm.penalty())
        seeds.append(torch.ones_like(outputs[1]))
    dx, dw, db = torch.autograd.grad(outputs, [x, norm.weight, norm.bias], seeds)
    state = {name: value.clone() for name, value in norm.named_buffers()}
    results = {"y": y.detach(), "dx": dx, "dweight": dw, "dbias": db, **state}
    return results | ({"penalty": outputs[1].detach()} if len(outputs) > 1 else {})


def assert_same(first: dict, second: dict, **tolerance) -> None:
    """The same results under the same names; bit for bit without a `tolerance`."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda text, name=name: f"{name}: {text}"
        )
