"""The passes as operators: what PyTorch asks of one, one node each in a compiled graph, and the path of the device."""

import operator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from hf_normswap.kernels import ops
from hf_normswap.kernels.ops import OperatorBackend
from hf_normswap.modeling import backends
from hf_normswap.modeling.backends import ReferenceBackend
from tests.helpers.norms import CHANNELS, assert_same, make_norm, make_tokens, train_step
from tests.helpers.passes import EPS, Inputs


MASK = torch.tensor([[True, True, True, True, True], [False, True, True, True, False]])
# Forward and backward of a training step, pass by pass.
STEPS = {
    "batchnorm": (["moments", "affine_fwd"], ["grad_sums", "affine_bwd"]),
    "pnv": (["sum_squares", "affine_fwd"], ["grad_sums", "affine_bwd"]),
    "powernorm-groups": (["affine_fwd"], ["affine_bwd"]),
    "powernorm-warm-up": (["sum_squares", "affine_fwd"], ["grad_sums", "affine_bwd"]),
}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_gives_what_the_passes_give(masked, groups, dtype):
    inputs = Inputs(7, 12, groups=groups, masked=masked, dtype=dtype)
    with torch.no_grad():
        backend = backends.get_backend(inputs.x)
    assert_same(inputs.run(backend), inputs.run(OperatorBackend))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_keeps_the_rules_of_operators(masked, wanted, strided):
    i = Inputs(2, 6, 6, groups=3, masked=masked)
    if strided:
        i.x, i.g, i.mask = (
            t if t is None else t.transpose(0, 1).contiguous().transpose(0, 1) for t in (i.x, i.g, i.mask)
        )
    shift = i.shift if wanted else None
    library, tokens, scaling = torch.ops.hf_normswap, (i.x, i.mask), (i.groups, EPS)
    for op, arguments in {
        library.moments: tokens,
        library.sum_squares: (*tokens, *scaling),
        library.affine_fwd: (*tokens, i.center, i.scale, i.shift, *scaling, wanted),
        library.grad_sums: (i.g, *tokens, i.center, *scaling),
        library.affine_bwd: (i.g, *tokens, i.center, i.a, i.b, shift, i.pad, *scaling, wanted),
    }.items():
        torch.library.opcheck(op, arguments)


def test_runs_the_path_of_the_device(monkeypatch):
    class OfFloats(ReferenceBackend):
        dtypes = (torch.float32,)
        seen = []

        @staticmethod
        def sum_squares(x, mask, groups, eps):
            OfFloats.seen.append(x.dtype)
            return ReferenceBackend.sum_squares(x, mask, groups, eps)

    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda x: OfFloats if x.dtype in OfFloats.dtypes else None)
    for x in (torch.ones(2, 4), torch.ones(2, 4).double(), torch.ones(0, 4)):
        OperatorBackend.sum_squares(x, None, 0, EPS)
    assert OfFloats.seen == [torch.float32]


@pytest.mark.parametrize("variant", STEPS)
def test_a_compiled_step_has_a_node_for_each_pass(variant, fresh_compiler):
    graphs = []

    def keep(graph, _):
        graphs.append([name for node in graph.graph.nodes if (name := name_of_pass(node))])
        return make_boxed_func(graph.forward)

    x, upstream = make_tokens(2, 5), torch.randn(2, 5, CHANNELS, dtype=torch.float64)
    eager, norm = make_norm(variant), make_norm(variant)
    compiled = torch.compile(norm, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    for _ in range(3):
        expected = train_step(eager, x, upstream, MASK)
        results = step(compiled, norm, x, upstream)
        assert_same({name: expected[name] for name in results}, results, rtol=1e-10, atol=1e-12)
    assert graphs == list(STEPS[variant])


def step(compiled, norm, x, upstream):
    x = x.clone().requires_grad_()
    y = compiled(x, MASK)
    norm.zero_grad()
    y.backward(upstream)
    gradients = {"dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    return {"y": y.detach(), **gradients, **{name: buffer.clone() for name, buffer in norm.named_buffers()}}


def name_of_pass(node):
    """The name of the pass that a node of a graph calls, if it calls one."""
    name = str(node.target) if node.op == "call_function" and node.target is not operator.getitem else ""
    is_pass = name.startswith("hf_normswap.") and not name.startswith("hf_normswap.snapshot")
    return name.removeprefix("hf_normswap.").removesuffix(".default") if is_pass else None


def test_an_exported_program_has_a_node_for_each_pass():
    class Scaled(nn.Module):
        def forward(self, x, mask, scale, shift):
            squares = OperatorBackend.sum_squares(x, mask, 0, EPS)
            return OperatorBackend.affine_fwd(x, mask, None, scale * torch.rsqrt(squares + EPS), shift, 0, EPS, False)[
                0
            ]

    arguments = torch.randn(3, 4), torch.tensor([True, True, False]), torch.rand(4), torch.rand(4)
    program = torch.export.export(Scaled(), arguments)
    assert [name for node in program.graph.nodes if (name := name_of_pass(node))] == ["sum_squares", "affine_fwd"]
    torch.testing.assert_close(program.module()(*arguments), Scaled()(*arguments))


def test_may_be_imported_twice():
    source, again = ops.__file__, {"__name__": "again"}
    with open(source, encoding="utf-8") as file:
        exec(compile(file.read(), source, "exec"), again)
    x = torch.randn(3, 4)
    assert torch.equal(
        again["OperatorBackend"].sum_squares(x, None, 0, EPS), OperatorBackend.sum_squares(x, None, 0, EPS)
    )
