"""What reads the residual stream and what writes to it, against the tensors that modules get in a forward."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_normswap import find_norms
from hf_normswap.core.residual_stream import ResidualStream, find_tied_head
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
    stream = ResidualStream(model)
    sites = [site for site in find_norms(model) if site.block]
    sites.sort(key=lambda site: list(given).index(site.name))  # in the order of their calls
    assert sites == sorted(sites, key=stream.order)
    assert {site.sublayer for site in sites} >= {"attention", "ffn"}
    owners = stream.sites_of_linears(sites)
    for site, following in zip(sites, [*sites[1:], None]):
        if site.placement == "pre":
            reading = stream.readers(site)
            assert all(given[name] is returned[site.name] for name in reading.linears)
            before, after = given[site.name], given[following.name] if following else given["transformer.ln_f"]
            total = next(each for each in stream.sums if each.skip == stream.graph.source(stream._read_by(site)))
        else:
            reading = stream.readers_before(site)
            before, after = given[reading.linears[0]], given[site.name]
            assert all(torch.equal(given[name], before) for name in reading.linears)
            total = stream.sum_before(site)
        assert reading.linears
        assert reading.obstacle is None
        (writer,) = stream.writers(total).linears
        torch.testing.assert_close(after, before + returned[writer], rtol=1e-12, atol=1e-12)
        # Of the sublayer are what reads the stream, what writes to it, and what reads the encoder in between.
        own = [name for name, owner in owners.items() if owner is site]
        assert {*reading.linears, writer} <= set(own)
        sources = set(own) - {*reading.linears, writer}
        assert bool(sources) == (site.sublayer == "cross_attention")
        source = inputs.get("encoder_hidden_states", returned.get("model.encoder.layers.1"))
        assert all(torch.equal(given[name], source) for name in sources)


def rows_are_from(values, states):
    """Whether each token of `values` is one of `states`."""
    if values.shape[-1] != states.shape[-1]:
        return False
    same = values.flatten(0, -2)[:, None] == states.flatten(0, -2)[None]
    return bool(same.all(-1).any(1).all())


@pytest.mark.parametrize(("family", "head"), all_heads())
def test_what_reads_the_end_of_a_stack(family, head):
    model = stock(family, head)
    stream = ResidualStream(model)
    ends = {}
    for site in sorted(find_norms(model), key=stream.order):
        if site.sublayer != "head":
            ends[site.stack] = site
    returns = "hidden states leave the model here" if model.base_model is model else None
    if returns:
        assert {
            stream.readers(site).obstacle for stack, site in ends.items() if stack == "decoder" or len(ends) == 1
        } == {returns}
        return
    output, given, _ = run(model, output_hidden_states=True)
    if "encoder_last_hidden_state" in output:
        states = {"encoder": output.encoder_last_hidden_state, "decoder": output.decoder_hidden_states[-1]}
    else:
        states = {next(iter(ends)): output.hidden_states[-1]}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for stack, values in states.items():
        read = {name for name in linears & given.keys() if rows_are_from(given[name], values)}
        assert read
        assert set(stream.readers(ends[stack]).linears) == read, stack


@pytest.mark.parametrize(("family", "head"), [("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM")])
def test_what_stands_around_the_norms_of_embeddings_and_heads(family, head):
    model = stock(family, head)
    _, given, returned = run(model)
    stream = ResidualStream(model)
    embedding, *_, of_head = find_norms(model)
    tables = stream.writers_before(embedding).tables
    assert len(tables) == 3
    torch.testing.assert_close(given[embedding.name], sum(returned[name] for name in tables))
    (reader,) = stream.readers(of_head).linears
    assert given[reader] is returned[of_head.name]


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
