"""Weight normalisation and generalised Hamming networks: linear layers in the place of norms."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from hf_normswap import find_norms, fold_norms, restore_norm, set_norm_placement, swap_norm
from hf_normswap.modeling.linears import ChangedLinear
from hf_normswap.modeling.replace import change_linears
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import outputs, same, train


NORMS = ["weightnorm", "hamming"]


def linears_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ChangedLinear)}


def make_linear(cls, norm):
    layer = (nn.Linear(5, 3) if cls is nn.Linear else Conv1D(3, 5)).double()
    nn.init.uniform_(layer.bias)
    parent = nn.ModuleList([layer])
    change_linears(parent, {"0": norm})
    return parent[0]


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
def test_weight_normalisation_is_that_of_pytorch(cls):
    ours = make_linear(cls, "weightnorm")
    theirs = nn.Linear(5, 3).double() if cls is nn.Linear else Conv1D(3, 5).double()
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    parametrizations.weight_norm(theirs, dim=0 if cls is nn.Linear else 1)
    gain, direction = theirs.parametrizations.weight.parameters()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-13, atol=1e-13)
        for layer in (ours, theirs):
            layer.zero_grad()
            layer(x).square().sum().backward()
        torch.testing.assert_close(ours.weight_gain.grad, gain.grad.flatten(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.weight.grad, direction.grad, rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # away from the start, where w = v
            for parameter, other in ((ours.weight_gain, gain), (ours.weight, direction)):
                change = torch.rand(parameter.shape, dtype=torch.float64)
                parameter.add_(change)
                other.add_(change.view(other.shape))


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
def test_a_hamming_layer_returns_the_distance(cls):
    layer = make_linear(cls, "hamming")
    weight = layer.weight if cls is nn.Linear else layer.weight.T
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    for token in range(2):
        for output in range(3):
            distance = 0
            for channel in range(5):
                a, b = x[token, channel], weight[output, channel]
                distance += (a + b - 2 * a * b) / 5
            torch.testing.assert_close(y[token, output], layer.bias[output] - distance)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_weight_normalisation_begins_with_the_weights_from_before(family):
    """A model without norms, and after a training the weights that restore_norm leaves compute the same."""
    model = tiny_model(family)
    without = copy.deepcopy(model)
    sites = [site for site in find_norms(without) if site.block]
    for site in sites:
        without.get_submodule(site.name.rpartition(".")[0])._modules[site.name.rpartition(".")[2]] = nn.Identity()
    parameters = dict(model.named_parameters())
    swap_norm(model, "weightnorm")
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters() if name in parameters)
    torch.testing.assert_close(outputs(model), outputs(without), rtol=1e-5, atol=1e-6)
    assert len(linears_of(model)) == {"bert": 12, "gpt2": 8}[family]

    train(model, learning_rate=1e-3)
    assert not any(torch.equal(layer.normalized_weight(), layer.weight) for layer in linears_of(model).values())
    expected = outputs(model)
    restore_norm(model)
    assert not linears_of(model)
    assert not [name for name, _ in model.named_parameters() if "weight_gain" in name]
    for site in sites:
        model.get_submodule(site.name.rpartition(".")[0])._modules[site.name.rpartition(".")[2]] = nn.Identity()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "norm"), [("marian", "weightnorm"), ("gpt2", "hamming")])
def test_linear_layers_are_saved_and_loaded(family, norm, tmp_path):
    model = train(swap_norm(tiny_model(family), norm, where="ffn"), learning_rate=1e-3)
    changed = linears_of(model)
    assert changed
    assert all(name.rpartition(".")[2] in ("fc1", "fc2", "c_fc", "c_proj") and "attn" not in name for name in changed)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert {name: type(layer) for name, layer in linears_of(loaded).items()} == {
        n: type(m) for n, m in changed.items()
    }
    assert same(outputs(model), outputs(loaded))
    assert same(outputs(model), outputs(pickle.loads(pickle.dumps(model))))


def test_a_linear_layer_with_a_norm_in_front_has_another_path(tmp_path):
    model = set_norm_placement(swap_norm(tiny_model("bert"), "weightnorm"), "sub")
    model.save_pretrained(tmp_path)
    assert same(outputs(model), outputs(type(model).from_pretrained(tmp_path)))
    set_norm_placement(model, "post")
    assert "bert.encoder.layer.0.output.dense" in model.config.norm_swap["linears"]


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_refused(norm):
    model = tiny_model("bert").eval()
    prune.identity(model.bert.encoder.layer[1].intermediate.dense, "weight")
    with pytest.raises(ValueError, match=r"layer\.1\.intermediate\.dense has .* cannot change it"):
        swap_norm(model, norm)
    assert type(model).__name__ == "BertForSequenceClassification"
    swap_norm(model, norm, where="attention")
    with pytest.raises(ValueError, match="stands for linear layers"):
        fold_norms(model)
    stock = tiny_model("bert").eval()
    with pytest.raises(ValueError, match=f"{norm} changes linear layers"):
        swap_norm(stock, norm, calibrate_on=[tiny_batch(stock)])
    assert not linears_of(stock)
    broken = copy.deepcopy(model.config)
    broken.norm_swap["linears"]["bert.pooler"] = norm
    with pytest.raises(ValueError, match=r"lists 'bert\.pooler' as changed"):
        type(model)(broken)
    with pytest.raises(ValueError, match="scale the weights of a plain model"):
        set_norm_placement(swap_norm(tiny_model("bert"), norm), "deep", scale_weights=True)
