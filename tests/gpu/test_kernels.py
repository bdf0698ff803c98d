"""The Triton path on a device, at a size that counts: the same comparisons as in the interpreter, and whole norms."""

import pytest
import torch

from hf_normswap import get_norm
from hf_normswap.modeling.backends import BACKENDS, GradCoefficients, ReferenceBackend
from tests.helpers.norms import assert_same, train_step
from tests.helpers.passes import Inputs, assert_as_good_as_torch


pytest.importorskip("triton", reason="the path for CUDA is written in Triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOKENS, CHANNELS = 16384, 1024
NORMS = {
    "batchnorm": {},
    "rbn": {},
    "pnv": {},
    "powernorm": {"num_groups": 16},
    "powernorm-plain": {"group_scaling": False},
}


@pytest.fixture
def triton_backend():
    from hf_normswap.kernels.triton import TritonBackend

    TritonBackend.load()
    return TritonBackend


@pytest.fixture(params=[False, True], ids=["tuned", "deterministic"])
def tiling(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("groups", [0, 16])
def test_is_as_good_as_torch(triton_backend, tiling, groups, masked, dtype):
    inputs = Inputs(TOKENS, CHANNELS, groups=groups, masked=masked, dtype=dtype, device="cuda")
    assert_as_good_as_torch(inputs, triton_backend)
    assert_same(inputs.run(triton_backend), inputs.run(triton_backend))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize(("tokens", "channels", "groups"), [(1, 5, 0), (333, 96, 6), (333, 130, 0), (77, 8192, 1)])
def test_odd_sizes(triton_backend, tokens, channels, groups, masked):
    inputs = Inputs(tokens, channels, groups=groups, masked=masked, device="cuda")
    assert_as_good_as_torch(inputs, triton_backend)


def test_moments_bear_an_offset(triton_backend):
    x = 1e4 + torch.randn(TOKENS, CHANNELS, device="cuda")
    moments = triton_backend.moments(x, None)
    # A unit in the last place of the mean, and a few of the variance.
    torch.testing.assert_close(moments.mean.double(), x.double().mean(0), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(moments.var.double(), x.double().var(0, correction=0), rtol=1e-6, atol=0)


def test_more_elements_than_an_int_counts(triton_backend):
    rows = 2**21 + 7
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    x = torch.ones(rows, CHANNELS, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3
    one, zero = torch.ones(2, CHANNELS, device="cuda") * torch.tensor([[1.0], [0.0]], device="cuda")
    assert torch.equal(triton_backend.sum_squares(x, None, 0, 0.0), one * (rows + 8))
    y, _ = triton_backend.affine_fwd(x, None, None, one, one, 0, 0.0, False)
    assert torch.equal(y[-1], torch.full_like(y[-1], 4))
    assert torch.equal(y[0], torch.full_like(y[0], 2))
    dx, _ = triton_backend.affine_bwd(y, x, None, None, GradCoefficients(one, zero, None, one), 0, 0.0, False)
    assert torch.equal(dx, y)


@pytest.mark.parametrize("variant", NORMS)
def test_whole_norms(triton_backend, variant, monkeypatch):
    x, upstream = torch.randn(2, 64, TOKENS // 64, CHANNELS, device="cuda").bfloat16()
    mask = torch.rand(64, TOKENS // 64, device="cuda") < 0.8
    results = []
    for backend in (ReferenceBackend, triton_backend):
        monkeypatch.setitem(BACKENDS, "cuda", lambda x, backend=backend: backend)
        norm = get_norm(variant.removesuffix("-plain"))(CHANNELS, device="cuda", **NORMS[variant])
        results.append(train_step(norm, x, upstream, mask))
    # What is bfloat16 differs by a unit where float32 does by one: 2⁻⁷. Gains are sums over thousands of tokens.
    assert_same(*results, rtol=2**-7, atol=1e-2)
