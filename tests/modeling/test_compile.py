"""Compiled norms against eager ones, each alone: in a whole model a wrong gradient looks like rounding.

The running values move a lot (momentum 0.9): a backward that read them after their update would be far off.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from hf_normswap import accumulate_norm_statistics, pause_norm_statistics, update_norm_statistics
from tests.helpers.norms import CORE_NORMS, VARIANTS, make_norm, make_tokens
from tests.helpers.persistence import is_one_sentence


MASK = torch.tensor([[True, True, True, True, True], [False, True, True, True, False]])
FAST = {
    "batchnorm": {"momentum": 0.9},
    "rbn": {"momentum": 0.9},
    "pnv": {"momentum": 0.9},
    "powernorm": {"alpha_fwd": 0.1, "alpha_bwd": 0.1},
}


def make_fast_norm(variant):
    name, _, _ = VARIANTS[variant]
    norm = make_norm(variant, **FAST.get(name, {}))
    if name == "powernorm":
        norm.warmup_steps = 2  # the steps below are of both kinds, in one graph
    return norm


@pytest.fixture(autouse=True)
def no_graph_of_another_test(plain_pytorch):
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model, forward, accumulating=False, steps=5):
    """What each of some training steps gives: outputs, gradients, and the state after it."""
    results = []
    accumulate_norm_statistics(model, accumulating)
    for step in range(steps):
        x = make_tokens(2, 5, seed=step).requires_grad_()
        outputs = forward(model, x, MASK)
        loss = sum(
            (output * make_tokens(2, 5, seed=100 + step)).sum() if output.dim() else output for output in outputs
        )
        model.zero_grad()
        loss.backward()
        update_norm_statistics(model)
        values = {"dx": x.grad} | {f"output {n}": output for n, output in enumerate(outputs)}
        values |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        values |= dict(model.named_buffers())
        results.append({name: value.detach().clone() for name, value in values.items() if value is not None})
    return results


def assert_compiled_equals_eager(make_model, forward, **options):
    eager = train(make_model(), forward, **options)
    compiled = train(make_model(), torch.compile(forward, fullgraph=True), **options)
    assert counters["stats"]["unique_graphs"] == 1  # one for all steps
    for step, (expected, results) in enumerate(zip(eager, compiled, strict=True)):
        assert expected.keys() == results.keys()
        for name, value in expected.items():
            error = (results[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
            assert error < 1e-10, f"{name} is off by {error:.1e} in step {step}"


def output_alone(norm, x, mask):
    return (norm(x, mask),)


def penalty_alone(norm, x, mask):
    norm(x, mask)
    return (norm.penalty(),)


def output_and_penalty(norm, x, mask):
    return norm(x, mask), norm.penalty()


def outputs_of_all(norms, x, mask):
    return [norm(x, mask) for norm in norms]


@pytest.mark.parametrize(
    ("variant", "forward"),
    [
        ("layernorm", output_alone),
        ("rmsnorm", output_alone),
        ("batchnorm", output_alone),
        ("pnv", output_alone),
        ("powernorm-groups", output_alone),
        ("mabn", output_alone),
        ("rbn", penalty_alone),
        ("rbn", output_and_penalty),
    ],
)
def test_training(variant, forward):
    assert_compiled_equals_eager(lambda: make_fast_norm(variant), forward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["batchnorm", "rbn", "pnv", "powernorm-groups"])
def test_the_output_of_a_node_is_no_second_name_of_a_tensor(variant, dtype):
    """Compiled by torch 2.11, the gradient of such a node is zero (pytorch #180642)."""
    outputs = []

    def read(graph, inputs):
        for name, inside in graph.named_children():
            if name.startswith("fwd"):
                (found,) = (node.args[0][0] for node in inside.graph.nodes if node.op == "output")
                outputs.append(found[0])
        return graph

    norm, x = make_norm(variant, dtype=dtype), make_tokens(2, 5, dtype=dtype).requires_grad_()
    torch.compile(norm, backend=read, fullgraph=True)(x, MASK)
    (y,) = outputs
    assert y.meta["example_value"].dtype == dtype
    if y.target == "to":
        assert y.args[0].meta["example_value"].dtype != dtype


def test_training_with_deferred_statistics():
    def make_model():
        return nn.ModuleList(map(make_fast_norm, ("batchnorm", "powernorm-plain")))

    assert_compiled_equals_eager(make_model, outputs_of_all, accumulating=True)


def test_evaluation():
    variants = [variant for variant, (norm, _, _) in VARIANTS.items() if norm in (*CORE_NORMS, "frn")]
    norms = nn.ModuleList(map(make_fast_norm, variants)).eval()
    x = make_tokens(2, 5)
    before = {name: value.clone() for name, value in norms.named_buffers()}
    compiled = torch.compile(outputs_of_all, fullgraph=True)(norms, x, MASK)
    for variant, y, expected in zip(variants, compiled, outputs_of_all(norms, x, MASK), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, msg=variant)
    for name, value in norms.named_buffers():
        assert torch.equal(value, before[name])


def penalties_of(norm, forward, forwards, steps):
    """The penalty of so many training forwards of different batches, for each of so many steps."""
    results = []
    for step in range(steps):
        inputs = [make_tokens(2, 5, seed=10 * step + number).requires_grad_() for number in range(forwards)]
        for x in inputs:
            forward(norm, x, MASK)
        penalty = norm.penalty()
        results.append([penalty.detach(), *torch.autograd.grad(penalty, inputs)])
    return results


@pytest.mark.parametrize("forwards", [2, 4])
def test_penalties_of_several_forwards(forwards):
    compiled = torch.compile(output_alone, fullgraph=True, backend="aot_eager")
    expected = penalties_of(make_fast_norm("rbn"), output_alone, forwards, steps=3)
    results = penalties_of(make_fast_norm("rbn"), compiled, forwards, steps=3)
    assert counters["stats"]["unique_graphs"] == forwards  # one for each number of penalties that are there already
    for ours, theirs in zip(results, expected, strict=True):
        for value, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


def test_penalties_that_nobody_takes_are_compiled_a_few_times_only(monkeypatch):
    texts = []
    monkeypatch.setattr("hf_normswap.modeling.rbn.logger.warning_once", texts.append)
    norm, compiled = make_fast_norm("rbn"), torch.compile(output_alone, fullgraph=True, backend="aot_eager")
    for step in range(9):
        compiled(norm, make_tokens(2, 5, seed=step), MASK)[0].sum().backward()
    assert counters["stats"]["unique_graphs"] == 5
    assert len(norm.penalties) == 4
    with pytest.raises(RuntimeError, match="before its backward"):
        norm.penalty()
    assert len(texts) == 1
    assert "left out of a backward" in texts[0]


def test_penalties_that_a_compiled_norm_loses_are_named(monkeypatch):
    texts = []
    monkeypatch.setattr("hf_normswap.modeling.rbn.logger.warning_once", texts.append)
    norm, compiled = make_fast_norm("rbn"), torch.compile(output_alone, fullgraph=True, backend="aot_eager")
    for forwards, lost in ((4, False), (5, True)):
        for step in range(forwards):
            compiled(norm, make_tokens(2, 5, seed=step), MASK)
        norm.penalty()
        assert bool(texts) == lost
    assert is_one_sentence(texts[0])


@pytest.mark.parametrize("variant", ["batchnorm", "rbn", "powernorm-plain"])
def test_a_pause(variant):
    norm, compiled = make_fast_norm(variant), torch.compile(output_alone, fullgraph=True, backend="aot_eager")
    compiled(norm, make_tokens(2, 5), MASK)[0].square().sum().backward()
    before, statistics = {name: value.clone() for name, value in norm.named_buffers()}, norm.statistics
    with pause_norm_statistics(norm):
        y = compiled(norm, make_tokens(2, 5, seed=1), MASK)[0]
    y.square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    torch.testing.assert_close(norm.statistics, statistics)
