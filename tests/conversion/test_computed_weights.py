"""Computed weights (pruned, parametrized, of adapters, quantized, shared): refused, or what is reported is true."""

import copy
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hf_normswap import (
    Norm,
    calibrate,
    convert_to_rmsnorm,
    distill,
    find_norms,
    fold_norms,
    reestimate_statistics,
    restore_norm,
    swap_norm,
)
from tests.helpers.calibration import batches, distance, inputs_and_outputs, stock
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence, outputs
from tests.helpers.surgery import refuses


class Shifted(nn.Module):
    """A parametrization: the weight is another tensor and a constant."""

    def forward(self, weight):
        return weight + 0.1


class Subclass(torch.Tensor):
    """A weight that is more than numbers, as quantized ones are."""

    def new_empty(self, *args, **kwargs):
        return super().new_empty(*args, **kwargs).as_subclass(Subclass)


class Quantized(nn.Module):
    """A linear layer in whole numbers, as libraries for quantization put it in the place."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        weight = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def linears(model):
    return [(name, module) for name, module in model.bert.encoder.named_modules() if type(module) is nn.Linear]


def each_linear(change):
    def apply(model):
        for _, linear in linears(model):
            change(linear)

    return apply


def subclassed(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass))


def patched(linear):
    linear.forward = types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), linear)


def quantized(model):
    for block in model.bert.encoder.layer:
        block.output.dense = Quantized(block.output.dense)


def with_adapter(kind, **options):
    def apply(model):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        peft.inject_adapter_in_model(getattr(peft, kind)(**options), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "ia3" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
        model.double()

    return apply


COMPUTED = {
    "pruned": (each_linear(lambda linear: prune.l1_unstructured(linear, "weight", 0.5)), "query has hooks"),
    "pruned biases": (each_linear(lambda linear: prune.l1_unstructured(linear, "bias", 0.5)), "query has hooks"),
    "weight norm": (each_linear(parametrizations.weight_norm), "query is a .*ParametrizedLinear"),
    "spectral norm": (each_linear(parametrizations.spectral_norm), "query is a .*ParametrizedLinear"),
    "parametrized": (
        each_linear(lambda linear: parametrize.register_parametrization(linear, "weight", Shifted())),
        "query is a .*ParametrizedLinear",
    ),
    "subclass": (each_linear(subclassed), "query has a weight or a bias that is no plain parameter"),
    "forward of its own": (each_linear(patched), "query has a forward of its own"),
    "hooks": (
        each_linear(lambda linear: linear.register_forward_hook(lambda module, args, output: 1.5 * output)),
        "query has hooks",
    ),
    "quantized": (quantized, r"output\.dense is a .*Quantized"),
    "LoRA": (with_adapter("LoraConfig", target_modules=["query", "dense"]), "query is a peft.*lora.*Linear"),
    "IA3": (with_adapter("IA3Config", target_modules=["key"], feedforward_modules=[]), "key is a peft.*ia3.*Linear"),
}


def computed(case, data):
    """An original whose linear layers compute their weights, in evaluation mode."""
    model = stock("bert")
    COMPUTED[case][0](model)
    with torch.no_grad():
        model.eval()(**data[0])  # a pruned layer has the weight of the last forward
    return model


@pytest.mark.parametrize("case", COMPUTED)
def test_calibration_refuses_computed_weights(case):
    data = batches(stock("bert"))
    model = swap_norm(computed(case, data), "batchnorm", where="all")
    refuses(model, lambda: calibrate(model, data, teacher=stock("bert")), "or pass linears=False")
    with pytest.raises(ValueError, match=COMPUTED[case][1]):
        calibrate(model, data)
    undone = computed(case, data)
    refuses(undone, lambda: swap_norm(undone, "batchnorm", calibrate_on=data), "or pass linears=False")


def errors_of(model, original, data, names):
    """`‖y − LN‖₂ / ‖LN‖₂` of norms, by name, as numpy finds them on the finished models."""
    now, before = (inputs_and_outputs(each, data, names) for each in (model, original))
    return {name: np.linalg.norm(now[name][1] - before[name][1]) / np.linalg.norm(before[name][1]) for name in names}


@pytest.mark.parametrize("case", COMPUTED)
def test_norms_alone_are_calibrated_beside_computed_weights(case):
    data = batches(stock("bert"))
    original, model = computed(case, data), swap_norm(computed(case, data), "batchnorm", where="all")
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = calibrate(model, data, teacher=original, linears=False)
    expected = errors_of(model, original, data, [fit.name for fit in report])
    assert len(report) == 5
    assert {fit.name: fit.error for fit in report} == pytest.approx(expected, rel=1e-9)
    norms = tuple(expected)
    kept = {name: value for name, value in before.items() if not name.startswith(norms)}
    assert kept
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in kept.items())


@pytest.mark.parametrize("case", ["pruned", "weight norm", "LoRA"])
def test_made_permanent_they_are_calibrated(case):
    """And then the report is true. Zeros become what serves best."""
    data = batches(stock("bert"))
    original = computed(case, data)
    if case == "LoRA":
        import peft

        model = peft.tuners.lora.LoraModel(stock("bert"), peft.LoraConfig(target_modules=["query"]), "default")
        original = model.merge_and_unload().eval()
    else:
        for _, linear in linears(original):
            prune.remove(linear, "weight") if case == "pruned" else None
        for module in list(original.bert.encoder.modules()):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
    zeros = sum((linear.weight == 0).sum() for _, linear in linears(model))
    assert (zeros > 0) == (case == "pruned")
    report = calibrate(model, data)
    expected = errors_of(model, original, data, [fit.name for fit in report])
    assert {fit.name: fit.error for fit in report} == pytest.approx(expected, rel=1e-9)
    assert not sum((linear.weight == 0).sum() for _, linear in linears(model))


# Norms


def pruned_norm(norm):
    prune.l1_unstructured(norm, "weight", 0.5)


def parametrized_norm(norm):
    parametrize.register_parametrization(norm, "bias", Shifted())


def subclassed_norm(norm):
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Subclass))


NORMS = {"pruned": pruned_norm, "parametrized": parametrized_norm, "subclass": subclassed_norm}


@pytest.mark.parametrize("case", NORMS)
def test_norms_whose_gain_is_computed(case):
    model = stock("bert")
    NORMS[case](find_norms(model)[1].module)
    model.eval()
    words = "bert.encoder.layer.0.attention.output.LayerNorm has a gain or a shift that is computed"
    refuses(model, lambda: swap_norm(model, "batchnorm", where="all"), words)
    swap_norm(model, "batchnorm", where="ffn")  # those beside it are swapped as ever

    swapped = swap_norm(stock("bert"), "batchnorm", where="all")
    NORMS[case](find_norms(swapped)[1].module)
    swapped.eval()
    data = batches(swapped)
    refuses(swapped, lambda: restore_norm(swapped), words)
    for with_linears in (True, False):
        refuses(swapped, lambda flag=with_linears: calibrate(swapped, data, linears=flag), words)
    assert isinstance(find_norms(swapped)[1].module, Norm)


def test_statistics_beside_a_computed_gain_are_right():
    model = swap_norm(stock("bert"), "batchnorm", where="all")
    for site in find_norms(model):
        parametrized_norm(site.module)
    data = batches(model.eval())
    reestimate_statistics(model, data)
    norms = {site.name: site.module for site in find_norms(model)}
    for name, (x, _) in inputs_and_outputs(model, data, norms).items():
        np.testing.assert_allclose(norms[name].running_mean, x.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(norms[name].running_var, x.var(0), rtol=1e-9, atol=1e-9)
    expected = outputs(model)
    fold_norms(model)
    torch.testing.assert_close(outputs(model)["logits"], expected["logits"], rtol=1e-10, atol=1e-12)


# One weight in two places


def shared_linear(model):
    first, second = model.bert.encoder.layer
    second.output.dense.weight = first.output.dense.weight


def shared_gain(model):
    first, second = model.bert.encoder.layer
    second.output.LayerNorm.weight = first.output.LayerNorm.weight


def shared_block(model):
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


@pytest.mark.parametrize("share", [shared_linear, shared_gain, shared_block])
def test_one_weight_is_not_fitted_to_two_places(share):
    original, model = stock("bert"), stock("bert")
    share(original)
    share(model)
    swap_norm(model, "batchnorm", where="all")
    data = batches(model)
    refuses(model, lambda: calibrate(model, data, teacher=original), "shares its weights with another layer")
    if share is shared_linear:
        report = calibrate(model, data, teacher=original, linears=False)
        expected = errors_of(model, original, data, [fit.name for fit in report])
        assert {fit.name: fit.error for fit in report} == pytest.approx(expected, rel=1e-9)


def test_a_norm_that_runs_twice_has_not_the_statistics_of_one_call():
    model = swap_norm(stock("bert"), "batchnorm", where="all")
    shared_block(model)
    refuses(model, lambda: reestimate_statistics(model, batches(model)), "is called 2 times in place of 1")


# Distillation trains parameters, whatever is computed from them


def own_parameters(model):
    return {name: value.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("case", ["pruned", "weight norm", "parametrized", "LoRA"])
def test_computed_weights_are_distilled(case):
    data = batches(stock("bert"), rows=12, size=12)
    original, model = computed(case, data), swap_norm(computed(case, data), "batchnorm", where="all")
    calibrate(model, data, teacher=original, linears=False)
    before, far = own_parameters(model), distance(model, original, data)
    distill(model, original, data, steps=20, learning_rate=2e-3)
    assert distance(model, original, data) < far
    after = own_parameters(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])} - {
        f"{site.name}.{part}" for site in find_norms(model) for part in ("weight", "bias")
    }
    part = {"pruned": "weight_orig", "LoRA": "lora_A"}.get(case, "parametrizations.weight.original")
    assert any(part in name for name in moved)
    assert all("bert.encoder.layer" in name for name in moved)
    if case == "pruned":
        for _, linear in linears(model):
            assert (linear.weight == 0).sum() >= linear.weight.numel() // 2


def test_what_has_no_weight_to_train_is_not_distilled():
    data = batches(stock("bert"))
    model = swap_norm(computed("quantized", data), "batchnorm", where="all")
    teacher = stock("bert")
    refuses(model, lambda: distill(model, teacher, data, steps=1), "has no weight that can be trained")


# Folding and RMSNorm


@pytest.mark.parametrize("case", [case for case in COMPUTED if case not in ("IA3", "quantized")])
def test_folding_refuses_them_by_the_same_check(case):
    data = batches(stock("bert"))
    model = swap_norm(computed(case, data), "affine", where="all")
    with pytest.raises(ValueError, match=f"{COMPUTED[case][1]}, which folding would not see") as caught:
        fold_norms(model)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize(
    "change",
    [lambda linear: prune.l1_unstructured(linear, "weight", 0.5), lambda linear: linear.register_forward_hook(print)],
)
def test_rmsnorm_takes_no_computed_weights(change):
    model = tiny_model("gpt2").eval()
    change(model.transformer.h[1].mlp.c_proj)
    with torch.no_grad():
        model(**tiny_batch(model))
    refuses(model, lambda: convert_to_rmsnorm(model, untie=True), "h.1.mlp.c_proj has hooks, and cannot lose the mean")
