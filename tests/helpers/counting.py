"""Which tokens the norms of a model counted, by what went into them."""

import functools

import numpy as np
import torch

from hf_normswap import NormSwapConfig, find_norms, swap_norm
from tests.helpers.models import tiny_model


# With momentum 1 a running mean is that of the last batch.
EXACT = NormSwapConfig("batchnorm", momentum=1.0)


def swapped_model(norm, family, head=None, where="all", **overrides):
    """A tiny model in float64 whose norms are swapped."""
    return swap_norm(tiny_model(family, head, **overrides).double(), norm, where=where)


def counted_tokens(model, batch, call=None):
    """For each norm by name: its input, and the mean that it took. Momentum must be 1."""
    inputs = {}

    def remember(name, module, args):
        inputs[name] = args[0].detach()

    handles = [
        site.module.register_forward_pre_hook(functools.partial(remember, site.name)) for site in find_norms(model)
    ]
    with torch.no_grad():
        call(model, batch) if call else model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (x, model.get_submodule(name).running_mean) for name, x in inputs.items()}


def assert_counts(model, batch, mask_of, call=None, stacks=("encoder", "decoder")):
    """The norms of `stacks`, and no others, run, and count the tokens that `mask_of(site)` calls real."""
    counted = counted_tokens(model, batch, call)
    sites = [site for site in find_norms(model) if site.stack in stacks]
    assert set(counted) == {site.name for site in sites}
    for site in sites:
        assert_mean(*counted[site.name], mask_of(site), site.name)


def assert_part_counts(model, mask, call):
    """Norms run in `call(model)`, and count the tokens that `mask` calls real, or all."""
    counted = counted_tokens(model, None, lambda model, batch: call(model))
    assert counted
    for name, (x, mean) in counted.items():
        assert_mean(x, mean, mask, name)


def assert_mean(x, mean, mask, name):
    rows = x[mask] if mask is not None else x.flatten(0, -2)
    np.testing.assert_allclose(mean.numpy(), rows.numpy().mean(0), rtol=1e-9, atol=1e-12, err_msg=name)


def additive(value):
    return lambda seen: torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, value)


# The forms of a 4-dimensional attention mask, made from a bool mask of who sees whom.
SPELLINGS = {
    "bool": lambda seen: seen,
    "lowest": additive(torch.finfo(torch.float64).min),
    "infinite": additive(-torch.inf),
    "old": additive(-10000.0),
}
