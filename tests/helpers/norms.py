"""Every registered norm, and the variants of those with modes of their own, ready for a test of what all share."""

import numpy as np
import torch
from torch import nn

from hf_normswap import BatchStatisticNorm, Norm, available_norms, get_norm


CHANNELS = 4

# Norms that the tests of a contract take in every family. Each of the others is a few lines on the same base classes:
# it is tried in one family, and all together in all of them.
CORE_NORMS = ["affine", "batchnorm", "layernorm", "pnv", "powernorm", "rbn", "rmsnorm"]
OTHER_NORMS = [name for name in available_norms() if name not in CORE_NORMS]
SENTENCE_NORMS = [name for name in OTHER_NORMS if "sentence" in get_norm(name).scope]
WITHOUT_GAIN = [name for name in OTHER_NORMS if not get_norm(name).has_gain]


def norms_in(
    places: list, is_causal=lambda place: False, norms: list[str] | None = None, core: list[str] | None = None
) -> list[tuple]:
    """`(place, norm)`: the `core` norms in every place, and each of the other `norms` in one, in turn.

    Norms that see a sentence have their turn in the places that are not causal.
    """
    pairs = [(place, norm) for norm in (CORE_NORMS if core is None else core) for place in places]
    for turn, norm in enumerate(OTHER_NORMS if norms is None else norms):
        usable = [place for place in places if norm not in SENTENCE_NORMS or not is_causal(place)]
        pairs.append((usable[11 * turn % len(usable)], norm))  # a step that soon has been in every family
    return pairs


def family_is_causal(family: str) -> bool:
    """Whether a whole model of one of the four families has a causal stack."""
    return family in ("marian", "gpt2")


def head_is_causal(place: tuple[str, str]) -> bool:
    """The same of `(family, head)`: a head of a language model makes a decoder of BERT and RoBERTa."""
    return family_is_causal(place[0]) or place[1] in ("BertLMHeadModel", "RobertaForCausalLM")


# name of the variant: (registered norm, options, attributes)
VARIANTS = {name: (name, {}, {}) for name in available_norms()} | {
    "frn": ("frn", {"tlu": False}, {}),  # its threshold is no affine map of x̂
    "batchrenorm-bounds": ("batchrenorm", {"bn_steps": 0, "r_steps": 1, "d_steps": 1}, {}),
    "powernorm-groups": ("powernorm", {"num_groups": 2}, {}),
    "powernorm-plain": ("powernorm", {"group_scaling": False}, {}),
    "powernorm-batch": ("powernorm", {"group_scaling": False, "grad_scale": "batch"}, {}),
    "powernorm-warm-up": ("powernorm", {"group_scaling": False}, {"warmup_steps": 100}),
    "rbn-paper": ("rbn", {"distance": "sigma_l2"}, {}),
    "rbn-reference": ("rbn", {"distance": "var_l1"}, {}),
}
SENTENCE_VARIANTS = [name for name, (norm, _, _) in VARIANTS.items() if norm in SENTENCE_NORMS]
BATCH_VARIANTS = [name for name, (norm, _, _) in VARIANTS.items() if issubclass(get_norm(norm), BatchStatisticNorm)]


def make_norm(variant: str, dtype=torch.float64, seed: int = 0, **options) -> Norm:
    """A norm in training mode whose gain, shift and statistics are not those of the start."""
    name, usual, attributes = VARIANTS[variant]
    norm = get_norm(name)(CHANNELS, dtype=dtype, **{"bias": True, **usual, **options})
    vars(norm).update(attributes)
    generator = torch.Generator().manual_seed(seed)
    if norm.has_gain:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    for statistic in getattr(norm, "running", ()):
        getattr(norm, statistic).uniform_(0.2, 1.5, generator=generator)
    return norm


def make_tokens(*shape, dtype=torch.float64, seed: int | None = 0) -> torch.Tensor:
    """Activations of shape `(*shape, CHANNELS)` whose means are not 0; without a `seed` other ones in each call."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return (0.7 + 1.5 * torch.randn(*shape, CHANNELS, dtype=torch.float64, generator=generator)).to(dtype)


def train_step(norm: Norm, x: torch.Tensor, upstream: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
    """Output, penalty, gradients and state after one training step whose loss is `Σ upstream · y + penalty`."""
    x = x.detach().clone().requires_grad_()
    y = norm(x, mask)
    outputs, seeds = [y], [upstream]
    if hasattr(norm, "penalty"):
        outputs.append(norm.penalty())
        seeds.append(torch.ones_like(outputs[1]))
    parameters = dict(norm.named_parameters())
    dx, *gradients = torch.autograd.grad(outputs, [x, *parameters.values()], seeds)
    state = {name: value.clone() for name, value in norm.named_buffers() if name != "weight"}
    results = {"y": y.detach(), "dx": dx, **dict(zip((f"d{name}" for name in parameters), gradients)), **state}
    return results | ({"penalty": outputs[1].detach()} if len(outputs) > 1 else {})


def assert_same(first: dict, second: dict, **tolerance) -> None:
    """The same results under the same names; bit for bit without a `tolerance`."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda text, name=name: f"{name}: {text}"
        )


MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def assert_follows_the_formula(norm: Norm, formula, gradient) -> None:
    """Training steps on padded tokens, and an evaluation, against numpy.

    Args:
        formula: `(x, eps)` to the normalized tokens and the batch's value of each of `norm.running`.
        gradient: `(x, g, eps)` to the gradient of the tokens.
    """
    running = {name: getattr(norm, name).numpy().copy() for name in norm.running}
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for _ in range(4):
        x = make_tokens(2, 4, seed=None).requires_grad_()
        upstream = torch.randn(2, 4, CHANNELS, dtype=torch.float64)
        upstream[~MASK] = 0
        y = norm(x, MASK)
        (dx,) = torch.autograd.grad(y, x, upstream)

        rows, gradients = x[MASK].detach().numpy(), upstream[MASK].numpy()
        x_hat, *batch = formula(rows, norm.eps)
        np.testing.assert_allclose(y[MASK].detach().numpy(), weight * x_hat + bias, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(
            dx[MASK].numpy(), gradient(rows, weight * gradients, norm.eps), rtol=1e-10, atol=1e-13
        )
        for name, value in zip(norm.running, batch, strict=True):
            running[name] = (1 - norm.momentum) * running[name] + norm.momentum * value
            np.testing.assert_allclose(getattr(norm, name).numpy(), running[name], rtol=1e-12)
    assert norm.num_batches_tracked.item() == 4

    norm.eval()
    *mean, square = running.values()
    centered = x.detach().numpy() - (mean[0] if mean else 0)
    expected = weight * centered / np.sqrt(square + norm.eps) + bias
    np.testing.assert_allclose(norm(x, MASK).detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def assert_gradients_are_those_of_differences(norm: Norm, mask: torch.Tensor | None) -> None:
    """First and second derivatives at real tokens."""

    def outputs(x, weight, bias):
        y = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))
        return y if mask is None else y[mask]

    inputs = make_tokens(2, 4).requires_grad_(), norm.weight, norm.bias
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def assert_computes(norm: Norm, formula, *shape: int) -> None:
    """`y = γ formula(x) + β` in training and in evaluation, of numpy arrays in float64, and its exact gradient."""
    x = (0.7 + 1.5 * torch.randn(*(shape or (2, 4)), norm.num_features, dtype=torch.float64)).requires_grad_()
    expected = formula(x.detach().numpy()) * norm.weight.detach().numpy()
    expected = expected if norm.bias is None else expected + norm.bias.detach().numpy()
    for training in (True, False):
        np.testing.assert_allclose(norm.train(training)(x).detach().numpy(), expected, rtol=1e-11, atol=1e-13)
