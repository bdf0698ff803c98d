"""Activation checkpointing runs blocks a second time, and changes nothing: no gradient, no statistic."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_normswap import (
    BatchNorm,
    NormSwapConfig,
    PowerNorm,
    accumulate_norm_statistics,
    checkpoint_norms,
    norm_penalty,
    restore_norm,
    swap_norm,
    update_norm_statistics,
)
from hf_normswap.modeling import activation_checkpointing
from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING
from hf_normswap.modeling.padding_mask import SCOPE
from tests.helpers.models import FAMILIES, tiny_batch, tiny_model


NORMS = ["layernorm", "batchnorm", "powernorm", "pnv"]
CLOSE = {"rtol": 1e-11, "atol": 1e-13}
MODES = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])


def checkpointing(model, use_reentrant):
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def swapped_model(norm, family):
    return swap_norm(tiny_model(family).double(), norm, where="all")


def train(model, steps=3, accumulating=False, backward=torch.Tensor.backward):
    """Gradients and buffers of every step of a short training on padded batches."""
    if accumulating:
        accumulate_norm_statistics(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    results = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro_batch in range(2 if accumulating else 1):
            output = model(**tiny_batch(model, (6, 3), 8, seed=10 * step + micro_batch))
            backward(output.loss + norm_penalty(model))
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        if accumulating:
            update_norm_statistics(model)
        results[-1] |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return results


def assert_same(expected, results):
    for step, (one, other) in enumerate(zip(expected, results, strict=True)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(
                other[name], value, **CLOSE, msg=lambda text, name=name, step=step: f"{name}, step {step}: {text}"
            )


@functools.cache
def without_checkpointing(norm, family, accumulating=False):
    return train(swapped_model(norm, family), accumulating=accumulating)


@pytest.fixture(autouse=True)
def blocks_run_twice(monkeypatch):
    """A test that checkpoints nothing would prove nothing: count what runs again."""
    replays = []
    original = activation_checkpointing.replay_or_record

    def counting(make):
        if SCOPE.recompute is not None and SCOPE.recompute[0] == "replay":
            replays.append(1)
        return original(make)

    monkeypatch.setattr("hf_normswap.modeling.base.replay_or_record", counting)
    return replays


@MODES
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family, norm, use_reentrant, blocks_run_twice):
    results = train(checkpointing(swapped_model(norm, family), use_reentrant))
    assert_same(without_checkpointing(norm, family), results)
    assert bool(blocks_run_twice) == (norm != "layernorm")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_penalty_has_its_gradient(family, blocks_run_twice):
    rbn = NormSwapConfig("rbn", lambda_mean=2.0, lambda_var=3.0)
    model = checkpointing(swapped_model(rbn, family), use_reentrant=False)
    expected = train(swapped_model(rbn, family))
    assert_same(expected, train(model))
    assert blocks_run_twice
    # What the penalty adds is no rounding error.
    without = train(swapped_model("batchnorm", family))
    name = next(name for name in expected[0] if name.endswith("weight"))
    assert (expected[0][name] - without[0][name]).abs().max() > 1e-3


@MODES
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
@pytest.mark.parametrize("family", ["bert", "marian"])
def test_deferred_statistics(family, norm, use_reentrant, blocks_run_twice):
    results = train(checkpointing(swapped_model(norm, family), use_reentrant), accumulating=True)
    assert_same(without_checkpointing(norm, family, accumulating=True), results)
    assert blocks_run_twice


def test_deferred_statistics_with_the_penalty():
    results = train(checkpointing(swapped_model("rbn", "bert"), False), accumulating=True)
    assert_same(without_checkpointing("rbn", "bert", accumulating=True), results)


@MODES
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_backward_may_run_in_another_thread(norm, use_reentrant):
    """As it does on an accelerator, where autograd has threads of its own."""

    def backward(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    results = train(checkpointing(swapped_model(norm, "bert"), use_reentrant), backward=backward)
    assert_same(without_checkpointing(norm, "bert"), results)


@MODES
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_two_forwards_before_one_backward(norm, use_reentrant):
    results = []
    for model in (swapped_model(norm, "gpt2"), checkpointing(swapped_model(norm, "gpt2"), use_reentrant)):
        losses = [
            model(**tiny_batch(model, lengths, 8, seed=seed)).loss for seed, lengths in enumerate([(6, 3), (2, 8)])
        ]
        sum(losses).backward()
        results.append([{name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())])
    assert_same(*results)


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_two_backwards_of_one_forward(norm):
    results = []
    for model in (swapped_model(norm, "gpt2"), checkpointing(swapped_model(norm, "gpt2"), use_reentrant=False)):
        loss = model(**tiny_batch(model)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([{name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())])
    assert_same(*results)


@MODES
@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
def test_enabled_before_the_swap(norm, use_reentrant, blocks_run_twice):
    model = swap_norm(checkpointing(tiny_model("bert").double(), use_reentrant), norm, where="all")
    assert_same(without_checkpointing(norm, "bert"), train(model))
    assert blocks_run_twice


def test_turned_off_and_on_again(blocks_run_twice):
    model = checkpointing(swapped_model("batchnorm", "bert"), use_reentrant=False)
    model.activation_checkpointing_disable()
    assert_same(without_checkpointing("batchnorm", "bert"), train(model))
    assert not blocks_run_twice
    model = checkpointing(swapped_model("batchnorm", "bert"), use_reentrant=False)
    model.activation_checkpointing_disable()
    assert_same(without_checkpointing("batchnorm", "bert"), train(checkpointing(model, use_reentrant=True)))
    assert blocks_run_twice


def test_a_restored_model_checkpoints_as_before():
    model = checkpointing(tiny_model("bert").double(), use_reentrant=False)
    function = model.bert.encoder.layer[0]._gradient_checkpointing_func
    swap_norm(model, "batchnorm")
    assert model.bert.encoder.layer[0]._gradient_checkpointing_func is not function
    restore_norm(model)
    assert model.bert.encoder.layer[0]._gradient_checkpointing_func is function
    stock = train(tiny_model("bert").double())
    assert_same(stock, train(model))


def is_one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".") and ". " not in text


def test_rbn_refuses_reentrant_checkpointing_before_and_after_the_swap():
    model = swapped_model("rbn", "bert")
    with pytest.raises(ValueError, match="'use_reentrant': False") as error:
        checkpointing(model, use_reentrant=True)
    assert is_one_sentence(error)

    stock = checkpointing(tiny_model("bert"), use_reentrant=True)
    with pytest.raises(ValueError, match="'use_reentrant': False") as error:
        swap_norm(stock, "rbn")
    assert is_one_sentence(error)
    assert type(stock).__name__ == "BertForSequenceClassification"


@MODES
@pytest.mark.parametrize("cls", [BatchNorm, PowerNorm])
def test_a_recompute_that_nobody_announced_is_refused(cls, use_reentrant):
    norm = cls(4)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = checkpoint(norm, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=f"{CHECKPOINTING}_enable") as error:
        y.sum().backward()
    assert is_one_sentence(error)


@MODES
@pytest.mark.parametrize("cls", [BatchNorm, PowerNorm])
@pytest.mark.parametrize("own", [checkpoint, functools.partial(checkpoint)], ids=["function", "partial"])
def test_checkpointing_of_ones_own(own, cls, use_reentrant):
    torch.manual_seed(1)
    block = nn.ModuleList([nn.Linear(4, 4), cls(4), nn.Linear(4, 4)]).double()
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def run(x):
        first, norm, second = block
        return second(torch.tanh(norm(first(x), mask)))

    def step(call):
        block.zero_grad()
        block[1].initialize()
        x = torch.linspace(-2, 3, 24, dtype=torch.float64).view(2, 3, 4).requires_grad_()
        for _ in range(2):
            call(x).square().sum().backward()
        return [
            {name: p.grad.clone() for name, p in block.named_parameters()}
            | {"x": x.grad}
            | {name: b.clone() for name, b in block.named_buffers()}
        ]

    taped = functools.partial(checkpoint_norms(own), run, use_reentrant=use_reentrant)
    assert_same(step(run), step(taped))


def test_checkpointing_in_one_compiled_graph_is_refused():
    norm = BatchNorm(4)

    @torch.compile(backend="eager", fullgraph=True)
    def call(x):
        return checkpoint_norms(checkpoint)(norm, x, use_reentrant=False)

    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="turn one of the two off"):
        call(torch.randn(2, 3, 4, requires_grad=True))


@MODES
def test_checkpointing_stays_out_of_compiled_graphs_that_may_break(use_reentrant, blocks_run_twice):
    torch._dynamo.reset()
    model = checkpointing(swapped_model("powernorm", "bert"), use_reentrant)
    model.compile(backend="aot_eager")
    assert_same(without_checkpointing("powernorm", "bert"), train(model))
    torch._dynamo.reset()


def test_an_error_in_a_block_leaves_no_tape_behind():
    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoint_norms(checkpoint)(fail, torch.randn(3), use_reentrant=False)
    assert SCOPE.recompute is None
    assert SCOPE.masks == []
