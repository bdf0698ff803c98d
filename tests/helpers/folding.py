"""Models that can be folded, and how far their outputs moved."""

import re

import torch
from torch import nn

from hf_normswap import (
    Norm,
    find_norms,
    swap_norm,
)
from tests.helpers.architectures import norm_modules, tiny_architecture
from tests.helpers.models import tiny_model


def swapped(family, head=None, norm="batchnorm", where="all", dtype=torch.float64, **overrides):
    """A swapped model whose gains, shifts and statistics are anything, gains of both signs."""
    model = swap_norm(tiny_model(family, head, **overrides), norm, where=where)
    generator = torch.Generator().manual_seed(1)
    for site in find_norms(model):
        if isinstance(site.module, Norm):
            weight = torch.empty(site.module.num_features).uniform_(0.5, 1.5, generator=generator)
            sign = torch.randn(len(weight), generator=generator).sign()
            site.module.weight.data = (weight * sign).to(site.module.weight)
            for statistic in getattr(site.module, "running", ()):
                getattr(site.module, statistic).uniform_(0.3, 2.0, generator=generator)
    return model.to(dtype).eval()


def architecture_of(name, dtype=torch.float64):
    """A model of any architecture with its own norms, all its parameters anything, and a batch of its dtype."""
    model, batch = tiny_architecture(name)
    generator = torch.Generator().manual_seed(0)
    norms = {id(parameter) for norm in norm_modules(model).values() for parameter in norm.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in norms:
            parameter.data += torch.empty_like(parameter).uniform_(-0.1, 0.2, generator=generator)
    batch = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in batch.items()
    }
    return model.to(dtype), batch


def norms_in(model):
    """Modules that are named, or typed, as a norm."""
    pattern = re.compile(r"norm|ln_", re.IGNORECASE)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Norm | nn.LayerNorm) or pattern.search(name.rpartition(".")[2])
    ]


def relative_error(before, after):
    """The largest `‖Δ‖₂ / ‖y‖₂` of the outputs that mean something; hidden states have other coordinates."""
    names = [name for name in before if "logits" in name or name in ("last_hidden_state", "pooler_output")]
    assert names
    return max(((after[name] - before[name]).norm() / before[name].norm()).item() for name in names)
