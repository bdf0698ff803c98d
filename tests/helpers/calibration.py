"""What tests of calibration share: data, activations of modules, the distance of two models."""

import torch

from hf_normswap.modeling.padding_mask import current_mask, watch_masks
from tests.helpers.models import VOCABULARY, tiny_batch, tiny_model


def batches(model, rows=24, size=6, **options):
    lengths = [3 + (5 * row) % 7 for row in range(rows)]
    return [
        tiny_batch(model, lengths=tuple(lengths[start : start + size]), seed=start, **options)
        for start in range(0, rows, size)
    ]


def stock(family, head=None, **overrides):
    return tiny_model(family, head, **overrides).double().eval()


@torch.no_grad()
def inputs_and_outputs(model, data, names):
    """What goes into and comes out of modules at real tokens, `(N, C)` each, by name."""
    seen = {name: ([], []) for name in names}

    def keep(module, args, output, name):
        mask = current_mask(args[0])
        for values, kept in zip((args[0], output), seen[name]):
            kept.append((values if mask is None else values[mask]).reshape(-1, values.shape[-1]))

    watch_masks(model)
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: keep(m, a, o, name))
        for name in names
    ]
    for batch in data:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(part).numpy() for part in parts) for name, parts in seen.items() if parts[0]}


@torch.no_grad()
def distance(model, other, data):
    """Relative distance of the logits of two models."""
    ours, theirs = (torch.cat([each(**batch).logits.flatten() for batch in data]) for each in (model, other))
    return ((ours - theirs).norm() / theirs.norm()).item()


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(VOCABULARY - 7))]
