"""The Triton path: what it computes, in Triton's interpreter on CPU tensors; and that it compiles, without a device.

The interpreter has to be chosen before Triton is imported, for the whole process, in which nothing can be compiled by
it any more: those tests run in a process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_normswap.modeling.backends import BACKENDS, ReferenceBackend
from tests.helpers.norms import BATCH_VARIANTS, CHANNELS, assert_same, make_norm, make_tokens, train_step
from tests.helpers.passes import Inputs, assert_as_good_as_torch


triton = pytest.importorskip("triton", reason="the path for CUDA is written in Triton")

from hf_normswap.kernels import triton as path  # noqa: E402
from hf_normswap.kernels import triton_kernels as kernels  # noqa: E402
from hf_normswap.kernels.triton import TritonBackend  # noqa: E402


IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [(5, 0), (5, 1), (96, 0), (96, 6), (130, 0), (130, 10), (768, 0), (768, 12)]
# Every width in float32, and one with each kind of scaling in the other dtypes.
DESIGNS = [(*width, torch.float32) for width in WIDTHS]
DESIGNS += [(*width, dtype) for width in ((96, 0), (130, 10)) for dtype in DTYPES[1:]]


class TestInInterpreter:
    __test__ = IN_INTERPRETER

    @pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
    @pytest.mark.parametrize(("channels", "groups", "dtype"), DESIGNS)
    def test_is_as_good_as_torch(self, channels, groups, dtype, masked):
        assert_as_good_as_torch(Inputs(3, 17, channels, groups=groups, masked=masked, dtype=dtype), TritonBackend)

    @pytest.mark.parametrize("groups", [0, 3])
    def test_without_center_and_shift(self, groups):
        assert_as_good_as_torch(Inputs(40, 12, groups=groups, optional=False), TritonBackend, shift=False)

    @pytest.mark.parametrize("tokens", [0, 1])
    @pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
    @pytest.mark.parametrize("groups", [0, 3])
    def test_next_to_nothing(self, tokens, masked, groups):
        inputs = Inputs(tokens, 12, groups=groups, masked=masked)
        assert_as_good_as_torch(inputs, TritonBackend)
        if masked:
            inputs.mask = torch.zeros_like(inputs.mask)
            results = inputs.run(TritonBackend)
            for name in ("count", "mean", "m2", "squares"):
                assert not results[name].any(), name

    @given(
        leading=st.lists(st.integers(0, 9), min_size=1, max_size=3),
        groups=st.integers(0, 5),
        width=st.integers(1, 70),
        masked=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        elements=st.sampled_from([128, 512, 2048]),
    )
    def test_any_shape_and_tiling(self, leading, groups, width, masked, dtype, elements):
        inputs = Inputs(*leading, max(groups, 1) * width, groups=groups, masked=masked, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(path, "ELEMENTS", elements)
            assert_as_good_as_torch(inputs, TritonBackend)

    @pytest.mark.parametrize("offset", [1e4, -1e4])
    @pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
    def test_moments_bear_an_offset(self, offset, masked):
        inputs = Inputs(3000, 8, offset=offset, masked=masked)
        moments = TritonBackend.moments(inputs.x, inputs.mask)
        x = inputs.x[inputs.mask] if masked else inputs.x
        mean, variance = x.double().mean(0), x.double().var(0, correction=0)
        # A unit in the last place, and a few: E[x²] − E[x]² would lose a variance of 1 altogether.
        torch.testing.assert_close(moments.mean.double(), mean, rtol=1.2e-7, atol=0)
        torch.testing.assert_close(moments.var.double(), variance, rtol=5e-7, atol=0)

    def test_gradients_at_pads_stay_there(self):
        inputs = Inputs(40, 12, groups=3)
        clean = inputs.run(TritonBackend)
        inputs.g[~inputs.mask] = torch.nan
        dirty = inputs.run(TritonBackend)
        for name in ("sums", "sums of dx"):
            assert torch.equal(dirty[name][:2], clean[name][:2])
        assert torch.equal(dirty["dx"][inputs.mask], clean["dx"][inputs.mask])

    @pytest.mark.parametrize("groups", [0, 3])
    def test_nothing_varies(self, groups):
        inputs = Inputs(300, 12, groups=groups)
        assert_same(inputs.run(TritonBackend), inputs.run(TritonBackend))

    def test_any_strides(self):
        dense, strided = Inputs(8, 6, 12), Inputs(8, 6, 12)
        dense.g = torch.ones(8, 6, 12)
        strided.g = torch.ones(()).expand(8, 6, 12)
        strided.x, strided.mask = strided.x.mT.contiguous().mT, strided.mask.T.contiguous().T
        strided.center = strided.center.repeat_interleave(2)[::2]
        assert_same(dense.run(TritonBackend), strided.run(TritonBackend))

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("variant", BATCH_VARIANTS)
    def test_whole_norms(self, variant, padded, monkeypatch):
        mask = (torch.arange(20) % 3 > 0).view(4, 5) if padded else None
        x, upstream = make_tokens(4, 5, dtype=torch.float32), torch.randn(4, 5, CHANNELS)
        results = []
        for found in (ReferenceBackend, TritonBackend):
            seen = []
            monkeypatch.setitem(BACKENDS, "cpu", lambda x, found=found, seen=seen: seen.append(x) or found)
            norm = make_norm(variant, torch.float32)
            train_step(norm, x.flip(0), upstream, mask)
            results.append(train_step(norm, x, upstream, mask))
            assert seen
        # Both are rounded to float32 a few times.
        assert_same(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(IN_INTERPRETER, reason="this is the process of their own")
class TestInProcesses:
    @pytest.mark.slow
    def test_in_the_interpreter(self):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command,
            env={**environment, "TRITON_INTERPRET": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
        assert re.search(r"\d\d passed", done.stdout)

    @pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
    @pytest.mark.parametrize(("channels", "groups"), [(1024, 0), (1024, 16), (130, 10)])
    def test_compiles_without_spilling(self, channels, groups, masked, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        coefficients = dict.fromkeys(["scale", "shift", "a", "b", "pad", "parts"], "*fp32")
        types = coefficients | dict.fromkeys(["x", "g", "y", "dx"], "*bf16") | {"n": "i32", "eps": "fp32"}
        types |= {"counts": "*fp32"} | ({"mask": "*u8"} if masked else {}) | ({} if groups else {"center": "*fp32"})
        width = channels // groups if groups else path.COLUMNS
        sizes = {"C": channels, "WIDTH": width, "BLOCK": triton.next_power_of_2(width), "GROUPED": groups > 0}
        sizes |= {"TILE": path.ELEMENTS, "STAGES": path.STAGES}
        for kernel in (kernels.moments_kernel, kernels.forward_kernel, kernels.backward_kernel):
            assert spilled_bytes(kernel.fn, types, sizes, path.WARPS) == 0

    def test_merging_compiles_without_spilling(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        types = dict.fromkeys(["counts", "parts", "packed"], "*fp32") | {"programs": "i32"}
        assert spilled_bytes(kernels.merge_kernel, types, {"C": 1024, "BLOCK": 32, "ROWS": 64}, 4) == 0

    def test_is_not_taken_without_a_device(self):
        if torch.cuda.is_available():
            pytest.skip("there is a device")
        with pytest.raises(OSError, match="Triton does not work"):
            TritonBackend.load()


def spilled_bytes(kernel, types, sizes, warps):
    """What a thread of `kernel`, compiled for sm_90, keeps in memory for want of registers."""
    from triton.backends.compiler import GPUTarget

    *_, assembler = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
    constants = {name: sizes.get(name) for name in kernel.arg_names if name not in types}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    command = [str(assembler), "-v", "--gpu-name=sm_90a", "-o", os.devnull, "-"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True)
    return int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
