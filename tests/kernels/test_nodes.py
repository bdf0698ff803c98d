"""Norms as nodes of the graph in C++ against the same passes called from Python, and against single operations."""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hf_normswap import BatchNorm, PowerNorm, PowerNormV, RegularizedBatchNorm, use_kernels
from hf_normswap.kernels.cpu import CpuPasses
from hf_normswap.modeling.discrepancy import DISTANCES
from hf_normswap.modeling.passes import TorchPasses
from hf_normswap.modeling.paths import PATHS


pytestmark = pytest.mark.usefixtures("paths_as_before")


class CalledFromPython(CpuPasses):
    """The compiled passes without the nodes, as where PyTorch's headers cannot be compiled."""

    run_node = staticmethod(TorchPasses.run_node)


STANDARDIZING = {
    "batchnorm": BatchNorm,
    "without shift": lambda c: BatchNorm(c, bias=False),
    "pnv": PowerNormV,
    **{f"rbn {name}": lambda c, name=name: RegularizedBatchNorm(c, distance=name) for name in DISTANCES},
}
POWERNORMS = {
    "powernorm": lambda c: PowerNorm(c, group_scaling=False),
    "powernorm without shift": lambda c: PowerNorm(c, num_groups=4, bias=False),
    "powernorm by batch": lambda c: PowerNorm(c, group_scaling=False, grad_scale="batch"),
    "powernorm in groups": lambda c: PowerNorm(c, num_groups=4),
}
NORMS = STANDARDIZING | POWERNORMS


@pytest.fixture(autouse=True, scope="module")
def nodes(compiled):
    if not hasattr(torch.ops.hf_normswap, "batch_norm"):
        pytest.skip("PyTorch's headers cannot be compiled here.")


def train(passes, make, dtype=torch.float32, deferred=False, steps=3):
    """Values of a short training: outputs, gradients, buffers."""
    PATHS["cpu"] = lambda x: passes
    torch.manual_seed(0)
    norm, values = make(32).to(dtype), []
    norm.deferred = deferred
    for _ in range(steps):
        x = (torch.randn(5, 7, 32) * 2 + 1).to(dtype).requires_grad_()
        y = norm(x, torch.rand(5, 7) < 0.7)
        loss = (y * torch.randn(5, 7, 32).to(dtype)).sum()
        if isinstance(norm, RegularizedBatchNorm):
            loss = loss + norm.penalty()
        else:
            values += [value for value in norm.statistics if value is not None]
        norm.zero_grad()
        loss.backward()
        values += [y, x.grad, *(parameter.grad for parameter in norm.parameters())]
        values += [buffer.clone() for buffer in norm.buffers()]
    return values


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_node_is_what_python_makes_of_the_same_passes(name, dtype, deferred):
    found = train(CpuPasses, NORMS[name], dtype, deferred)
    expected = train(CalledFromPython, NORMS[name], dtype, deferred)
    assert len(found) == len(expected)
    for value, other in zip(found, expected):
        # Not to the bit: PyTorch divides by the count where the nodes do not.
        torch.testing.assert_close(value, other, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_a_node_of_its_own(name):
    norm, x = NORMS[name](32), torch.randn(4, 32, requires_grad=True)
    assert type(norm(x).grad_fn).__name__ == "CppFunction"
    norm.process_group = torch.distributed.group.WORLD or object()  # statistics of several ranks
    assert norm.run_node("batch_norm", x, None, {}, 1e-5, True, None, 0.0, 0.0) is None


def second_derivatives(passes, make):
    PATHS["cpu"] = lambda x: passes
    torch.manual_seed(0)
    norm, x, g = make(8), torch.randn(4, 9, 8, requires_grad=True), torch.randn(4, 9, 8)
    y = norm(x, torch.rand(4, 9) < 0.7)
    loss = (y.square() * g).sum()
    if isinstance(norm, RegularizedBatchNorm):
        loss = loss + 3 * norm.penalty()
    first = torch.autograd.grad(loss, (x, *norm.parameters()), create_graph=True)
    return first, torch.autograd.grad(sum(value.square().sum() for value in first), (x, norm.weight))


@pytest.mark.parametrize("name", STANDARDIZING)
def test_second_derivatives_are_those_of_single_operations(name):
    found, expected = (second_derivatives(passes, STANDARDIZING[name]) for passes in (CpuPasses, TorchPasses))
    for value, other in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_a_penalty_alone():
    def differentiate(passes):
        PATHS["cpu"] = lambda x: passes
        torch.manual_seed(0)
        norm, x = RegularizedBatchNorm(8), torch.randn(4, 9, 8, requires_grad=True)
        norm(x)
        (first,) = torch.autograd.grad(norm.penalty(), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), x)

    for value, other in zip(differentiate(CpuPasses), differentiate(TorchPasses), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_powernorm_has_no_second_derivative(bias):
    norm, x, p = PowerNorm(8, bias=bias), torch.randn(3, 8, requires_grad=True), torch.ones(3, 8, requires_grad=True)
    first = torch.autograd.grad(norm(x).square().sum(), (x, norm.weight), create_graph=True)
    torch.testing.assert_close(first[0], torch.autograd.grad(PowerNorm(8)(x).square().sum(), x)[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()
    (first,) = torch.autograd.grad(norm(x).sum(), x, create_graph=True)  # a constant gradient is none of this norm
    (first * p).sum().backward()
    torch.testing.assert_close(p.grad, first)


@pytest.mark.parametrize("name", ["batchnorm", "without shift", "pnv", "rbn relative"])
def test_a_transformed_backward_is_made_of_single_operations(name):
    norm, x = NORMS[name](3), torch.randn(4, 3, requires_grad=True)
    y = norm(x)
    directions = torch.eye(y.numel()).view(-1, *y.shape)

    def differentiate(g):
        return torch.autograd.grad(y, x, g, retain_graph=True)[0]

    one_by_one = torch.stack([differentiate(g) for g in directions])
    torch.testing.assert_close(torch.vmap(differentiate)(directions), one_by_one, rtol=1e-4, atol=1e-5)
    traced = make_fx(differentiate)(directions[0])
    torch.testing.assert_close(traced(directions[1]), one_by_one[1], rtol=1e-4, atol=1e-5)
    if "rbn" in name:
        # The penalty's graph, too.
        loss = norm.penalty()
        (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
        traced = make_fx(lambda g: torch.autograd.grad(loss, x, g, retain_graph=True)[0])(torch.ones(()))
        torch.testing.assert_close(traced(torch.ones(())), expected, rtol=1e-4, atol=1e-6)


def test_a_transformed_backward_of_powernorm_is_refused():
    norm, x = PowerNorm(3), torch.randn(4, 3, requires_grad=True)
    y = norm(x)
    with pytest.raises(RuntimeError, match="trace or transform its forward"):
        make_fx(lambda g: torch.autograd.grad(y, x, g)[0])(torch.ones(4, 3))


@pytest.mark.parametrize("name", ["batchnorm", "powernorm"])
def test_what_was_freed_is_not_read(name):
    for changed in ("weight", "tokens"):
        norm, tokens = NORMS[name](8), torch.randn(3, 8)
        y = norm(tokens)
        (norm.weight if changed == "weight" else tokens).data = torch.empty(0, 8)
        with pytest.raises(RuntimeError, match="has changed its size or device since the forward"):
            y.sum().backward()


@pytest.mark.parametrize("name", NORMS)
def test_layouts_threads_and_dirt(name):
    def run(passes, strided):
        PATHS["cpu"] = lambda x: passes
        torch.manual_seed(0)
        norm, x, g = NORMS[name](32), torch.randn(6, 50, 32), torch.randn(6, 50, 32)
        mask = torch.rand(6, 50) < 0.7
        x[~mask] *= torch.tensor([1.0, float("nan"), 1e30])[torch.arange((~mask).sum()) % 3, None]
        if strided:
            x, g = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, g))
            mask = mask.repeat_interleave(2, 1)[:, ::2]
        if isinstance(norm, PowerNorm):
            norm.loss_scale.fill_(4.0)
        x.requires_grad_()
        y = norm(x, mask)
        y.backward(g)
        assert x.grad.isfinite().all()
        return y, x.grad, norm.weight.grad, *norm.buffers()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found, expected = run(CpuPasses, True), run(TorchPasses, False)
    finally:
        torch.set_num_threads(before)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rbn relative", "powernorm"])
def test_tokens_changed_before_the_backward_are_found(name):
    x = torch.randn(3, 8, requires_grad=True)
    tokens = x * 1
    y = NORMS[name](8)(tokens)
    tokens.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", NORMS)
def test_what_is_saved_goes_through_hooks(name):
    def run(hooks):
        torch.manual_seed(0)
        norm, x = NORMS[name](32), torch.randn(4, 32, requires_grad=True)
        with hooks:
            y = norm(x)
        y.square().sum().backward()
        return x.grad

    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t)
    torch.testing.assert_close(run(hooks), run(torch.enable_grad()), rtol=0, atol=0)
    assert any(value.shape == (4, 32) for value in packed)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_update_without_a_graph(mode):
    x = torch.randn(4, 32)
    for make in NORMS.values():
        norm = make(32)
        with mode():
            y = norm(x)
        assert not y.requires_grad
        assert norm.num_batches_tracked == 1


def test_only_what_needs_a_gradient_gets_one():
    norm = BatchNorm(8)
    norm.weight.requires_grad_(False)
    y = norm(torch.randn(3, 8))
    y.sum().backward()
    assert norm.weight.grad is None
    torch.testing.assert_close(norm.bias.grad, torch.full((8,), 3.0))


@pytest.mark.parametrize("name", NORMS)
def test_a_graph_is_freed_with_its_output(name):
    norm, x = NORMS[name](32), torch.randn(4, 32, requires_grad=True)
    tokens = x * 1
    alive, y = weakref.ref(tokens), norm(tokens)
    if isinstance(norm, RegularizedBatchNorm):
        norm.penalty()
    gc.disable()
    try:
        del tokens, y
        assert alive() is None
    finally:
        gc.enable()


def test_a_graph_can_be_run_twice():
    x = torch.randn(4, 32, requires_grad=True)
    for make in STANDARDIZING.values():
        y = make(32)(x).square().sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_what_a_node_is_not_made_for_goes_through_python():
    class Strange(BatchNorm):
        running = {"running_mean": 0.0, "running_var": 1.0, "other": 2.0}

    class Paused(BatchNorm):
        def track(self, moments):
            pass

    x = torch.randn(4, 8, requires_grad=True)
    double = BatchNorm(8)
    double.running_var = double.running_var.double()
    for norm, tokens in ((Strange(8), x), (Paused(8), x), (double, x), (BatchNorm(8).double(), x.double())):
        expected = copy.deepcopy(norm)
        assert type(norm(tokens).grad_fn).__name__ == "BatchStandardizeBackward"
        PATHS["cpu"] = lambda x: TorchPasses
        expected(tokens)
        use_kernels("auto")
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(dict(norm.named_buffers())[name], buffer)


@pytest.mark.parametrize("broken", ["compile", "load"])
def test_without_nodes_the_passes_are_compiled_alone(broken, tmp_path):
    """In a process of its own, in which no node was ever registered."""
    script = f"""
        import torch
        from hf_normswap import BatchNorm
        from hf_normswap.kernels import cpu
        from hf_normswap.modeling.paths import passes_for

        if {broken!r} == "compile":
            cpu.NODES = cpu.Path({str(tmp_path)!r}, "nodes.cpp")
            cpu.NODES.write_text('#include "no such header"')
        else:
            build = cpu._build
            def cut(compiler, source, flags, libraries):
                path = build(compiler, source, flags if source == cpu.PASSES else ["-std=c++17"], [])
                if source == cpu.NODES:
                    path.write_bytes(path.read_bytes()[:100])
                return path
            cpu.NODES = cpu.Path({str(tmp_path)!r}, "nodes.cpp")
            cpu.NODES.write_text("int one() {{ return 1; }}")
            cpu._build = cut
        x = torch.randn(4, 8, requires_grad=True)
        norm = BatchNorm(8)
        assert type(norm(x).grad_fn).__name__ == "BatchStandardizeBackward"
        with torch.no_grad():
            assert passes_for(x.detach()) is cpu.CpuPasses
        cpu.load_library.cache_clear()
        cpu.load_library()
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True, timeout=300)
    kept = sorted(path.suffix for path in (tmp_path / "hf_normswap").iterdir())
    assert kept == ([".refused", ".so"] if broken == "compile" else [".so", ".so"])
