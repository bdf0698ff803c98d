"""What is set around a conversion changes nothing: autocast, inference mode, no gradients, tuples, forwards."""

import copy
import functools

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_normswap import (
    calibrate,
    convert_norms,
    distill,
    fold_gains,
    fold_norms,
    reestimate_statistics,
    restore_norm,
    set_norm_placement,
    swap_norm,
)
from tests.helpers.calibration import batches, states, stock
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence, outputs, same


MODES = {
    "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def model_of(stage, family="bert"):
    """A model in float32, which autocast rounds: stock, swapped or calibrated."""
    model = tiny_model(family).eval()
    if stage == "stock":
        return model
    options = {"calibrate_on": batches(model)} if stage == "calibrated" else {}
    return swap_norm(model, "batchnorm", where="all", **options)


TEACHER = model_of("stock")
DATA = batches(TEACHER, rows=48)
CHANGES = {
    swap_norm: ("stock", lambda model: swap_norm(model, "batchnorm", where="all", calibrate_on=DATA)),
    convert_norms: ("stock", lambda model: convert_norms(model, DATA, distill_steps=10)),
    calibrate: ("swapped", lambda model: calibrate(model, DATA)),
    distill: ("calibrated", lambda model: distill(model, TEACHER, DATA, steps=3)),
    reestimate_statistics: ("swapped", lambda model: reestimate_statistics(model, DATA)),
    fold_norms: ("calibrated", lambda model: fold_norms(model)),
    fold_gains: ("stock", lambda model: fold_gains(model)),
    restore_norm: ("swapped", lambda model: restore_norm(model)),
    set_norm_placement: ("stock", lambda model: set_norm_placement(model, "pre")),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("function", CHANGES)
def test_a_mode_of_the_caller_changes_no_bit(function, mode):
    stage, change = CHANGES[function]
    expected, found = model_of(stage), model_of(stage)
    change(expected)
    with MODES[mode]():
        change(found)
    assert same(found.state_dict(), expected.state_dict())
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in expected.parameters()]


@pytest.mark.parametrize("wrap", [torch.compile, lambda forward: functools.wraps(forward)(lambda **x: forward(**x))])
@pytest.mark.parametrize("part", ["", "bert.encoder.layer.0"])
def test_a_forward_that_copies_would_take_along_is_refused(part, wrap):
    model = stock("bert")
    module = model.get_submodule(part)
    module.forward = wrap(module.forward)
    before, kind = states(model), type(model)
    for change in (
        lambda: convert_norms(model, batches(stock("bert"), rows=48)),
        lambda: swap_norm(model, "rmsnorm"),
        lambda: fold_gains(model),
    ):
        with pytest.raises(ValueError, match="forward of .* was replaced") as error:
            change()
        assert is_one_sentence(error.value)
    assert type(model) is kind
    assert same(states(model), before)
    del module.forward
    convert_norms(model, batches(stock("bert"), rows=48))


def test_tuples_of_the_configuration():
    """A model that returns tuples by its configuration converts as the same model that does not."""
    original = stock("bert")
    expected = copy.deepcopy(original)
    convert_norms(expected, batches(original, rows=48), distill_steps=10)
    original.config.return_dict = False
    convert_norms(original, batches(original, rows=48), distill_steps=10)
    assert same(states(original), states(expected))
    fold_norms(original)


class Narrow(BertForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


class Wide(BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [Narrow, Wide])
def test_forwards_of_users(cls):
    plain = tiny_model("bert", "BertForSequenceClassification").eval()
    model = cls(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    data = batches(plain, rows=48)
    for each in (plain, model):
        convert_norms(each, [{name: x for name, x in batch.items() if name != "token_type_ids"} for batch in data])
        fold_norms(each)
    batch = tiny_batch(plain)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    assert torch.allclose(outputs(plain, batch)["logits"], outputs(model, batch)["logits"], atol=1e-5)


def test_a_frozen_model_stays_frozen():
    """Whatever a new norm has beside gain and shift."""
    for norm in ("batchnorm", "dyt", "switchablenorm"):
        model = stock("bert").requires_grad_(False)
        swap_norm(model, norm)
        assert not any(parameter.requires_grad for parameter in model.parameters())
