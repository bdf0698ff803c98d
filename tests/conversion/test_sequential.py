"""A model that is visited module by module, against forwards of the whole model as it is at each visit."""

import copy

import pytest
import torch
from torch import nn

from hf_normswap import find_norms, swap_norm
from hf_normswap.conversion.sequential import ActivationStore, SequentialRunner, blocks_of, call_order
from hf_normswap.modeling.padding_mask import current_mask
from tests.helpers.calibration import batches, stock
from tests.helpers.models import FAMILIES, tiny_batch


def make_model(family):
    return swap_norm(stock(family, use_cache=False), "batchnorm", where="all")


@torch.no_grad()
def whole_forwards(model, data, name):
    """What comes to a module in forwards of the whole model, and its token mask."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: found.append((args[0].clone(), current_mask(args[0])))
    )
    for batch in data:
        model(**batch)
    handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("budget", [2**30, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_model_as_it_was_changed(family, budget):
    model = make_model(family)
    data = batches(model, rows=8, size=4)
    norms = {site.name: site.module for site in find_norms(model)}
    order = call_order(model, data, norms)
    assert [name for (name,) in order] == called(model, data[0], norms)
    visited = []
    with ActivationStore(budget) as store:
        walk = SequentialRunner(model, data, order, store)
        for name in walk:
            expected = whole_forwards(model, data, name)
            for (values, mask), (wanted, wanted_mask) in zip(walk.inputs(name), expected, strict=True):
                torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)
                assert torch.equal(mask, wanted_mask)
            norms[name].weight.mul_(1.5)
            norms[name].bias.add_(0.1)
            visited.append(name)
    assert visited == list(norms)
    assert not store._trees


def called(model, batch, modules):
    """Names in the order of their first calls."""
    names = []
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: names.append(name))
        for name, module in modules.items()
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return names


@torch.no_grad()
def test_what_is_added_to_inputs_goes_on_through_the_model():
    """As a change of the linear layer whose output they are."""
    model = make_model("gpt2")
    data = batches(model, rows=8, size=4)
    norms = {site.name: site.module for site in find_norms(model)}
    writer, name = "transformer.h.0.attn.c_proj", "transformer.h.0.ln_2"
    with ActivationStore(2**30) as store:
        walk = SequentialRunner(model, data, call_order(model, data, norms), store)
        for visited in walk:
            if visited == name:
                model.get_submodule(writer).bias.add_(0.25)
                walk.add(name, (torch.full_like(values, 0.25) for values, _ in walk.inputs(name)))
            if visited in (name, "transformer.h.1.ln_1", "transformer.ln_f"):
                found = [values for values, _ in walk.inputs(visited)]
                for values, (wanted, _) in zip(found, whole_forwards(model, data, visited), strict=True):
                    torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_modules_with_the_same_input_are_visited_together():
    model = make_model("bert")
    block = "bert.encoder.layer.0"
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    order = call_order(model, [tiny_batch(model)], linears)
    attention = tuple(f"{block}.attention.self.{name}" for name in ("query", "key", "value"))
    assert order[:2] == [attention, (f"{block}.attention.output.dense",)]


@torch.no_grad()
def test_without_changes_each_block_runs_once_for_its_inputs_and_once_for_its_outputs():
    model = make_model("bert")
    data = batches(model, rows=12, size=4)
    norms = {site.name: site.module for site in find_norms(model)}
    order = call_order(model, data, norms)
    calls = dict.fromkeys(blocks_of(model), 0)

    def count(module, args, block):
        calls[block] += 1

    for block in calls:
        model.get_submodule(block).register_forward_pre_hook(lambda m, a, block=block: count(m, a, block))
    expected = {name: whole_forwards(copy.deepcopy(model), data, name) for name in norms}
    calls = dict.fromkeys(calls, 0)
    with ActivationStore(2**30) as store:
        walk = SequentialRunner(model, data, order, store, changes=False)
        for name in walk:
            for (values, _), (wanted, _) in zip(walk.inputs(name), expected[name], strict=True):
                torch.testing.assert_close(values, wanted, rtol=1e-12, atol=1e-12)
    assert calls["bert.encoder.layer.1"] == 2 * len(data)


@torch.no_grad()
def test_a_batch_that_does_not_reach_a_module_is_refused():
    model = make_model("bert")
    data = batches(model, rows=8, size=4)
    norms = {site.name: site.module for site in find_norms(model)}
    order = call_order(model, data, norms)
    model.bert.encoder.layer[1].attention.output.LayerNorm.forward = lambda *args: args[0]
    layer = model.bert.encoder.layer[1].output
    layer.forward = lambda hidden_states, input_tensor: input_tensor
    with (
        ActivationStore(2**30) as store,
        pytest.raises(ValueError, match="does not reach bert.encoder.layer.1.output"),
    ):
        list(SequentialRunner(model, data, order, store))
