"""What reads the residual stream and what writes to it, against the tensors that modules get in a forward."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_normswap import find_norms
from hf_normswap.core.residual_stream import (
    embeddings_of,
    find_tied_head,
    reader_of_head_norm,
    readers_of_stack,
    sublayer_of,
)
from tests.helpers.calibration import stock
from tests.helpers.models import FAMILIES, all_heads, tiny_batch
from tests.helpers.sites import full_model


@torch.no_grad()
def run(model, **inputs):
    """What the model returns; inputs and outputs of its modules by name."""
    given, returned = {}, {}

    def note(module, args, kwargs, output, name):
        given[name] = args[0] if args else kwargs.get("hidden_states")
        returned[name] = output[0] if isinstance(output, tuple) else output

    for name, module in model.named_modules():
        module.register_forward_hook(lambda *call, name=name: note(*call, name), with_kwargs=True)
    return model(**{**tiny_batch(model), **inputs}), given, returned


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sublayer_reads_the_stream_and_adds_to_it(family):
    model = full_model(family).double().eval()
    inputs = {}
    if family == "gpt2":
        inputs["encoder_hidden_states"] = torch.randn(2, 5, 16, dtype=torch.float64)
    _, given, returned = run(model, **inputs)
    sites = [site for site in find_norms(model) if site.block]
    sites.sort(key=lambda site: list(given).index(site.name))  # in the order of their calls
    assert {site.sublayer for site in sites} >= {"attention", "ffn"}
    for site, following in zip(sites, [*sites[1:], None]):
        sublayer = sublayer_of(model, site)
        read = {name: given[name] for name in sublayer.readers}
        if site.placement == "pre":
            assert all(value is returned[site.name] for value in read.values())
            stream = given[site.name]
            after = given[following.name] if following else given["transformer.ln_f"]
        else:
            stream, after = next(iter(read.values())), given[site.name]
            assert all(torch.equal(value, stream) for value in read.values())
        torch.testing.assert_close(after, stream + returned[sublayer.writer], rtol=1e-12, atol=1e-12)
        if site.sublayer == "cross_attention":
            source = inputs.get("encoder_hidden_states", returned.get("model.encoder.layers.1"))
            assert all(torch.equal(given[name], source) for name in sublayer.source_readers)
        assert bool(sublayer.source_readers) == (site.sublayer == "cross_attention")


def rows_are_from(values, states):
    """Whether each token of `values` is one of `states`."""
    if values.shape[-1] != states.shape[-1]:
        return False
    same = values.flatten(0, -2)[:, None] == states.flatten(0, -2)[None]
    return bool(same.all(-1).any(1).all())


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_what_reads_the_end_of_a_stack(family, head):
    model = stock(family, head)
    if model.base_model is model:  # which returns it
        assert readers_of_stack(model, "encoder") == readers_of_stack(model, "decoder") == ()
        return
    output, given, _ = run(model, output_hidden_states=True)
    if "encoder_last_hidden_state" in output:
        ends = {"encoder": output.encoder_last_hidden_state, "decoder": output.decoder_hidden_states[-1]}
    else:
        ends = {find_norms(model).pop().stack: output.hidden_states[-1]}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for stack, states in ends.items():
        reading = {name for name in linears & given.keys() if rows_are_from(given[name], states)}
        assert reading
        assert set(readers_of_stack(model, stack)) == reading, stack


@pytest.mark.parametrize(("family", "head"), [("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM")])
def test_what_stands_around_the_norms_of_embeddings_and_heads(family, head):
    model = stock(family, head)
    _, given, returned = run(model)
    embedding, *_, of_head = find_norms(model)
    tables = embeddings_of(model, embedding)
    assert len(tables) == 3
    torch.testing.assert_close(given[embedding.name], sum(returned[name] for name in tables))
    assert given[reader_of_head_norm(model)] is returned[of_head.name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head(family, tied):
    head = {"bert": "BertForMaskedLM"}.get(family)
    model = stock(family, head, tie_word_embeddings=tied)
    _, given, returned = run(model)
    name = find_tied_head(model)
    assert (name is not None) == tied
    if tied:
        weight = model.get_input_embeddings().weight
        assert returned[name].shape[-1] == len(weight)
        bias = model.get_submodule(name).bias
        expected = given[name] @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(returned[name], expected)
    assert find_tied_head(model.base_model) is None
