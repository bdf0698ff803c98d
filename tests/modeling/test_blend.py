"""A norm mixed with the LayerNorm it replaces: the stock model at one end, the swapped one at the other."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_normswap import BatchNorm, find_norms, get_norm, restore_norm, swap_norm
from hf_normswap.modeling.model_norms import StockNorm
from hf_normswap.modeling.replace import LayerNormBlend, blend_norm, layer_norm_shares, set_layer_norm_share
from tests.helpers import reference
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model
from tests.helpers.norms import CORE_NORMS, OTHER_NORMS, WITHOUT_GAIN, family_is_causal, norms_in
from tests.helpers.persistence import edit_config, is_one_sentence, outputs, run_fresh, same, train


AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "roberta": "AutoModelForMaskedLM",
    "marian": "AutoModelForSeq2SeqLM",
    "gpt2": "AutoModelForCausalLM",
}


def swapped(family="bert", norm="batchnorm", share=0.0, **options):
    model = swap_norm(tiny_model(family), norm, **{"where": "all", **options})
    set_layer_norm_share(model, share)
    return model


def step(model, call=None, batch=None):
    """Outputs and gradients of one training step."""
    model.zero_grad()
    output = (model if call is None else call)(**(batch or tiny_batch(model)))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


def different_shares(model):
    return {path: (1 + index) / 8 for index, path in enumerate(site.path for site in find_norms(model)[:4])}


def blends(model):
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, LayerNormBlend)]


# The ends, and what lies between


WITH_GAIN = [norm for norm in OTHER_NORMS if norm not in WITHOUT_GAIN]


@pytest.mark.parametrize(("family", "norm"), norms_in(list(FAMILIES), family_is_causal, WITH_GAIN))
def test_with_share_1_a_model_is_the_stock_one_bit_for_bit(family, norm):
    stock, model = tiny_model(family), swapped(family, norm, share=1)
    expected, results = step(stock), step(model)
    own = results.keys() - expected.keys()  # parameters of the norm, which has no part in what is computed
    assert not any(results.pop(name).any() for name in own)
    assert same(expected, results)
    assert same(outputs(stock), outputs(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_too(family):
    stock, model = tiny_model(family), swapped(family, "powernorm", share=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(step(stock), step(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_share_0_nothing_is_left(family):
    pure = swapped(family, "powernorm")
    model = swapped(family, "powernorm", share=0.5)
    assert blends(model)
    set_layer_norm_share(model, 0)
    assert not blends(model)
    assert same(step(pure), step(model))
    assert model.config.norm_swap == pure.config.norm_swap


@pytest.mark.parametrize("name", [*CORE_NORMS, *WITH_GAIN])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_follows_the_formula(name, share):
    norm = get_norm(name)(6, dtype=torch.float64).eval()
    norm.stock = StockNorm("layernorm", 1e-3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias)
    x = 2 + torch.randn(3, 4, 6, dtype=torch.float64)
    new = norm(x).detach().numpy()
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = share * (reference.layernorm(x.numpy(), 1e-3) * weight + bias) + (1 - share) * new
    blend_norm(norm, share)
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-13, atol=1e-14)


def test_shares_differ_from_norm_to_norm():
    model = swapped(norm="rmsnorm")
    first, second, *_ = [site for site in find_norms(model) if site.sublayer == "ffn"]
    set_layer_norm_share(model, {first.path: 1, second.path: 0.5})
    set_layer_norm_share(model, {second.path: 0})
    assert layer_norm_shares(model) == {first.path: 1}
    expected = swapped(norm="rmsnorm", filter_fn=lambda module, name: name != first.name)
    assert same(step(model), step(expected))
    set_layer_norm_share(model, {first.path: 0})
    assert not blends(model)


def test_parameters_and_state_are_those_of_the_norm():
    pure, model = swapped(), swapped(share=0.5)
    assert model.state_dict().keys() == pure.state_dict().keys()
    assert dict(model.named_buffers()).keys() == dict(pure.named_buffers()).keys()


def test_a_hook_sees_what_the_layer_returns():
    model = tiny_model("bert")
    seen = []
    norm = model.bert.encoder.layer[0].output.LayerNorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    stock = step(model)
    swap_norm(model, "batchnorm", where="all")
    set_layer_norm_share(model, 1.0)
    assert same(step(model), stock)
    assert torch.equal(*seen)
    handle.remove()
    step(model)
    assert len(seen) == 2


# Padding


@pytest.mark.parametrize("content", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("as_keyword", [True, False])
def test_what_stands_at_pads_reaches_nothing(content, as_keyword):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    results = []
    for filler in (0.0, content):
        norm = BatchNorm(4)
        norm.stock = StockNorm("layernorm", 1e-5)
        blend_norm(norm, 0.5)
        x = torch.linspace(-2, 3, 24).reshape(2, 3, 4)
        x = torch.where(mask.unsqueeze(-1), x, filler).requires_grad_()
        y = norm(x, mask=mask) if as_keyword else norm(x, mask)
        # Attention multiplies what stands at pads by 0.
        (y.square() * mask.unsqueeze(-1)).sum().backward()
        results.append({"y": y[mask], "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad})
    assert same(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    results = []
    for columns, filler in ((6, None), (9, 3)):
        model = swapped(family, share=0.5).double()
        results.append(step(model, batch=tiny_batch(model, columns=columns, filler=filler)))
    del results[0]["logits"], results[1]["logits"]
    for name, value in results[0].items():
        if "position" in name or "embed" in name or "wte" in name or "wpe" in name:
            continue  # fillers have rows of their own, of gradient 0
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-11, msg=name)


# Copies, checkpointing, compilation


def test_copies_and_pickles_are_mixtures_of_their_own():
    model = swapped(norm="powernorm", share=0.5)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(outputs(model), outputs(again))
        set_layer_norm_share(again, 0.25)
        assert set(layer_norm_shares(model).values()) == {0.5}
        assert not same(outputs(model), outputs(again))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family, use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = swapped(family, "powernorm", share=0.75).double()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        first = step(model)
        set_layer_norm_share(model, 0.25)
        results.append((first, step(model), dict(model.named_buffers())))
    for ours, theirs in zip(*results, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-11, atol=1e-13, msg=name)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def shallow(norm):
    return swap_norm(tiny_model("bert", num_hidden_layers=1), norm)


@pytest.mark.usefixtures("plain_pytorch")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_follows_the_share_and_is_not_compiled_again():
    model = shallow("powernorm")
    eager = copy.deepcopy(model)
    first, _ = (site.path for site in find_norms(model) if site.layer is not None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    graphs = []
    for share in (1.0, 0.6, 0.3, {first: 0.0}, 0.1, 0.0):
        for each in (model, eager):
            set_layer_norm_share(each, share)
        assert same(step(model, compiled), step(eager))
        graphs.append(counters["stats"]["unique_graphs"])
    # The second is for transformers, which sets `config.problem_type` in the first forward.
    assert graphs[1:5] == [graphs[1]] * 4
    assert graphs[5] == graphs[1] + 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_may_be_compiled_before_it_is_mixed():
    model = shallow("batchnorm")
    compiled = torch.compile(model, backend="eager")
    step(model, compiled)
    set_layer_norm_share(model, 1.0)
    assert same(step(model, compiled), step(tiny_model("bert", num_hidden_layers=1)))


# Saving and loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_mixture_loads_as_one(family, tmp_path):
    model = train(swapped(family, "powernorm", share=1.0))
    set_layer_norm_share(model, 0)
    set_layer_norm_share(model, different_shares(model))
    model.save_pretrained(tmp_path)
    again = getattr(transformers, AUTO[family]).from_pretrained(tmp_path)
    assert layer_norm_shares(again) == different_shares(model)
    assert same(outputs(again), outputs(model))
    set_layer_norm_share(model, 0)
    set_layer_norm_share(again, 0)
    assert again.config.norm_swap == model.config.norm_swap
    assert "layer_norm_share" not in model.config.norm_swap
    assert same(outputs(again), outputs(model))


def test_a_saved_mixture_loads_without_the_package(tmp_path):
    model = train(swapped("bert", "powernorm", share=0.5))
    model.save_pretrained(tmp_path / "saved")
    batch = tiny_batch(model, lengths=(7, 5), labels=False)
    torch.save(batch, tmp_path / "batch.pt")
    script = """
import torch
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("saved", trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load("batch.pt")).logits, "logits.pt")
"""
    run_fresh(script, tmp_path, package=False)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), outputs(model, batch)["logits"])


def test_a_mixture_opens_with_another_head(tmp_path):
    model = swap_norm(tiny_model("bert", "BertForMaskedLM"), "batchnorm", where="all")
    set_layer_norm_share(model, 0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert len(layer_norm_shares(again)) == len(layer_norm_shares(model)) - 1
    assert torch.equal(outputs(model.bert)["last_hidden_state"], outputs(again.bert)["last_hidden_state"])


def test_a_second_swap_leaves_the_mixture_alone(tmp_path):
    model = swap_norm(tiny_model("bert"), "batchnorm", where="attention")
    set_layer_norm_share(model, 0.5)
    shares = layer_norm_shares(model)
    swap_norm(model, "rmsnorm", where="ffn")
    assert layer_norm_shares(model) == shares
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert layer_norm_shares(again) == shares
    assert same(outputs(again), outputs(model))


def test_a_restored_model_is_the_stock_one():
    stock, model = tiny_model("bert"), swapped(share=0.5)
    restore_norm(model)
    assert not blends(model)
    assert same(step(stock), step(model))
    assert not hasattr(model.config, "norm_swap")


WRONG = [
    {"bert.encoder.layer.0.output.LayerNorm": 1.5},
    {"bert.encoder.layer.0.output.LayerNorm": "half"},
    {"bert.encoder.layer.0.output.LayerNorm": float("nan")},
    {"bert.encoder.layer.7.output.LayerNorm": 0.5},
    {"bert.embeddings.LayerNorm": 0.5},  # not swapped
]


@pytest.mark.parametrize("shares", WRONG, ids=str)
def test_what_a_share_may_not_be(shares, tmp_path):
    model = swap_norm(tiny_model("bert", "BertForMaskedLM"), "batchnorm")
    with pytest.raises(ValueError, match=re.escape(next(iter(shares)))) as caught:
        set_layer_norm_share(model, shares)
    assert is_one_sentence(caught.value)
    assert not blends(model)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda content: content["norm_swap"].update(layer_norm_share=shares))
    with pytest.raises(ValueError, match=re.escape(next(iter(shares)))):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_stock_model_has_nothing_to_mix():
    with pytest.raises(ValueError, match="call swap_norm") as caught:
        set_layer_norm_share(tiny_model("bert"), 0.5)
    assert is_one_sentence(caught.value)
