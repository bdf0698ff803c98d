"""Every path of the passes on a CPU against PyTorch in float64."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_normswap.kernels as kernels
from hf_normswap import BatchNorm, PowerNorm, PowerNormV, RegularizedBatchNorm, use_kernels
from hf_normswap.kernels import cpu
from hf_normswap.kernels.cpu import CpuBackend
from hf_normswap.modeling.backends import BACKENDS, GradCoefficients, ReferenceBackend, get_backend
from hf_normswap.modeling.discrepancy import DISTANCES
from hf_normswap.modeling.moments import Moments


pytestmark = pytest.mark.usefixtures("compiled", "paths_as_before")
EPS = 1e-5
# Rounding of the inputs' own dtype, and of float32 sums over the tokens.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-13}


def error(found, expected):
    """Largest error in units of the largest value of each row of channels."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs() / expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)).max().item()


def make_case(n, c, groups, dtype, with_mask, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, c, generator=generator) * 2 + 1).to(dtype)
    g = torch.randn(n, c, generator=generator).to(dtype)
    mask = torch.rand(n, generator=generator) < 0.7 if with_mask else None
    center, scale, shift, a, b, pad = torch.randn(6, c, generator=generator)
    return x, g, mask, center, scale, shift, a, b, pad, groups


@contextmanager
def number_of_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_passes(backend, x, g, mask, center, scale, shift, a, b, pad, groups):
    """What each pass gives, by name."""
    y, squares = backend.affine_fwd(x, mask, center, scale, shift, groups, EPS, True)
    plain, nothing = backend.affine_fwd(x, mask, None, scale, shift, groups, EPS, False)
    dx, sums = backend.affine_bwd(g, x, mask, center, GradCoefficients(a, b, shift, pad), groups, EPS, True)
    alone, none = backend.affine_bwd(g, x, mask, None, GradCoefficients(a, b, None, pad), groups, EPS, False)
    assert nothing is None
    assert none is None
    moments = backend.moments(x, mask)
    return {
        "y": y,
        "y alone": plain,
        "squares": squares,
        "squares alone": backend.sum_squares(x, mask, groups, EPS),
        "dx": dx,
        "dx alone": alone,
        "sums": sums,
        "sums alone": backend.grad_sums(g, x, mask, center, groups, EPS),
        "count": moments.count.reshape(1),
        "mean": moments.mean,
        "m2": moments.m2,
    }


def compare(backend, case):
    x, dtype = case[0], case[0].dtype
    found = run_passes(backend, *case)
    expected = run_passes(
        ReferenceBackend, *(v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in case)
    )
    for name, value in found.items():
        wide = torch.promote_types(dtype, torch.float32)
        assert value.dtype == (dtype if name.startswith(("y", "dx")) else wide), name
        assert value.shape == expected[name].shape, name
        # Sums of terms that cancel are as exact as the terms are large.
        terms = max(1.0, len(x) ** 0.5) if "sums" in name or name == "mean" else 1.0
        tolerance = TOLERANCES[dtype] if name.startswith(("y", "dx")) else TOLERANCES[wide]
        assert error(value, expected[name]) <= 4 * terms * tolerance, name


@pytest.mark.parametrize("backend", [CpuBackend])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("n", "c", "groups"), [(1, 5, 0), (300, 128, 2), (300, 96, 3), (257, 130, 0), (700, 768, 12)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_each_pass_is_that_of_pytorch(backend, dtype, n, c, groups, with_mask):
    if backend is CpuBackend and dtype not in backend.dtypes:
        pytest.skip("no path for this dtype")
    compare(backend, make_case(n, c, groups, dtype, with_mask, seed=n))


@given(
    n=st.integers(1, 150),
    width=st.integers(8, 70),  # of a channel or two, a group leaves little but rounding
    groups=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_mask=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_number_of_threads(n, width, groups, dtype, with_mask, threads, seed):
    with number_of_threads(threads):
        compare(CpuBackend, make_case(n, width * max(groups, 1), groups, dtype, with_mask, seed))


@pytest.mark.parametrize("backend", [CpuBackend])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("dirt", [float("nan"), float("inf"), -1e30])
def test_what_stands_at_a_pad_counts_as_zero(backend, groups, dirt):
    case = list(make_case(200, 8, groups, torch.float32, True, seed=0))
    x, mask = case[0], case[2]
    clean = run_passes(backend, *case[:1], *case[1:])
    pads = (~mask).nonzero().flatten()
    dirty, zeroed = x.clone(), x.clone()
    dirty[pads[::2], 3], zeroed[pads[::2], 3] = dirt, 0
    found = run_passes(backend, dirty, *case[1:])
    expected = run_passes(
        ReferenceBackend,
        zeroed.double(),
        *(v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in case[1:]),
    )
    for name, value in found.items():
        if name.startswith("dx"):
            assert (value[pads[::2], 3] == 0).all()
            expected[name][pads[::2], 3] = 0
        assert error(value, expected[name]) < 1e-4, name
        if name in ("mean", "m2", "squares"):
            assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("backend", [CpuBackend])
def test_no_real_token_and_no_cancellation(backend):
    x = torch.randn(500, 6) + 1e4
    moments = backend.moments(x, torch.zeros(500, dtype=torch.bool))
    assert not moments.packed.any()
    # Of E[x²] − E[x]² in float32 nothing would be left here.
    assert error(backend.moments(x, None).var, x.double().var(0, correction=0)) < 1e-3
    assert not backend.sum_squares(x, torch.zeros(500, dtype=torch.bool), 0, EPS).any()


def test_results_do_not_vary_with_the_order_in_which_threads_end():
    case = make_case(3000, 64, 0, torch.float32, True, seed=1)
    with number_of_threads(4):
        first, *others = (run_passes(CpuBackend, *case) for _ in range(20))
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


def test_tokens_need_not_be_contiguous():
    case = list(make_case(60, 16, 0, torch.float32, True, seed=2))
    strided = list(case)
    strided[0], strided[1] = case[0].t().contiguous().t(), case[1].t().contiguous().t()
    strided[2] = case[2].repeat_interleave(2)[::2]
    found, expected = run_passes(CpuBackend, *strided), run_passes(CpuBackend, *case)
    assert all(error(found[name], expected[name]) < 1e-5 for name in found)


def run_steps(backend, x, g, mask, center, scale, shift, a, b, pad, groups):
    """What the passes add up to: each norm's forward and backward, and its statistics."""
    power, nu = 1 + a.square(), b
    results = {}
    for name, centered, bias in (("batchnorm", True, shift), ("pnv", False, None)):
        y, moments = backend.batch_norm_fwd(x, scale, bias, mask, EPS, centered, None)
        results |= {f"{name} y": y, **parts_of(name, moments)}
        for grad_moments in (None, torch.cat([a[:1], a, b])):
            of = backend.batch_norm_bwd(g, x, scale, mask, moments, grad_moments, EPS, centered, None)
            results |= zip_names(f"{name} {grad_moments is None}", ("dx", "dw", "db"), of)
    y, moments = backend.power_norm_fwd(x, scale, shift, mask, power, groups, EPS)
    results |= {"power_norm_fwd y": y, **parts_of("power_norm_fwd", moments)}
    for grad_power in (None, 1 + pad.square()):
        of = backend.power_norm_bwd(g, x, scale, mask, power, grad_power, nu, moments, groups, EPS)
        results |= zip_names(f"power_norm_fwd {grad_power is None}", ("dx", "dw", "db", "of batch"), of)
    return results


def parts_of(name, moments):
    return zip_names(name, ("count", "mean", "m2"), (moments.count, moments.mean, moments.m2))


def zip_names(name, parts, values):
    return {f"{name} {part}": value.reshape(-1) if value.dim() == 0 else value for part, value in zip(parts, values)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [CpuBackend])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("with_mask", [True, False])
def test_each_step_is_that_of_pytorch(backend, dtype, groups, with_mask):
    case = make_case(300, 128, groups, dtype, with_mask, seed=3)
    exact = run_steps(
        ReferenceBackend, *(v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in case)
    )
    found, plain = run_steps(backend, *case), run_steps(ReferenceBackend, *case)
    for name, value in found.items():
        assert value.dtype == plain[name].dtype, name
        assert error(value, exact[name]) <= 2 * error(plain[name], exact[name]) + 1e-6, name


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_tokens_of_few_bits_are_counted_one_by_one(backend):
    x = torch.randn(999, 8).bfloat16()  # bfloat16 counts 998, 1000
    _, moments = backend.power_norm_fwd(x, torch.ones(8), None, None, torch.ones(8), 0, EPS)
    assert moments.count == 999


@pytest.mark.parametrize("backend", [CpuBackend])
def test_a_real_token_that_is_not_finite_has_no_finite_gradient(backend):
    x, g, mask, center, _, shift, a, b, pad, groups = make_case(20, 8, 0, torch.float32, True, seed=0)
    mask[:2] = torch.tensor([True, False])
    x[:2, 3] = float("nan")
    dx, _ = backend.affine_bwd(g, x, mask, center, GradCoefficients(a, b, shift, pad), groups, EPS, False)
    assert dx[0, 3].isnan()
    assert dx[1, 3] == 0


def test_a_norm_refuses_tokens_of_another_width():
    norm = BatchNorm(4)
    for channels in (2, 8):
        with pytest.raises(ValueError, match=f"{channels} channels do not fit a norm of 4"):
            norm(torch.randn(3, channels))
    assert norm.num_batches_tracked == 0


def test_a_buffer_that_a_graph_saved_may_not_change():
    norm = BatchNorm(4)
    kept = torch.ones(4, requires_grad=True) * norm.running_var
    norm(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_no_token_leaves_the_statistics_alone():
    c, nothing = 6, torch.zeros(4, dtype=torch.bool)
    x, weight = torch.randn(4, c), torch.ones(c)
    y, moments = CpuBackend.batch_norm_fwd(x, weight, None, nothing, EPS, True, None)
    assert not moments.packed.any()
    dx, grad_weight, _ = CpuBackend.batch_norm_bwd(x, x, weight, nothing, moments, None, EPS, True, None)
    for value in (y, dx, grad_weight):
        assert value.isfinite().all()


@pytest.mark.parametrize("count", [0.0, 7.0])
@pytest.mark.parametrize("dirt", [0.0, float("nan"), float("inf")])
def test_updates_are_those_of_pytorch(count, dirt):
    def update(backend, dtype):
        torch.manual_seed(0)
        moments = Moments.of(torch.tensor(count), torch.randn(5), torch.rand(5))
        moments.m2[2] += dirt
        results = []
        for names in (("mean", "var"), ("power",)):
            running, updates = {name: torch.ones(5, dtype=dtype) for name in names}, torch.tensor(3)
            backend.update_running(running, Moments(moments.packed.to(dtype)), updates, 0.25)
            results += [*running.values(), updates]
        return results

    def update_nu(backend, dtype):
        torch.manual_seed(0)
        sums = torch.cat([torch.tensor([count]), 9 * torch.rand(5), torch.randn(5)]).to(dtype)
        sums[2] += 1e3  # (1 − α) Γ > 1
        sums[7] += dirt
        nu, largest, scale = torch.full((5,), 0.3, dtype=dtype), torch.zeros((), dtype=dtype), torch.tensor(8.0)
        backend.update_nu(nu, largest, sums, 0.1, scale.to(dtype))
        return [nu, largest]

    for run in (update, update_nu):
        for found, expected in zip(run(CpuBackend, torch.float32), run(ReferenceBackend, torch.float64), strict=True):
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-7)


def test_pooling_is_that_of_pytorch():
    def pool(backend, dtype):
        torch.manual_seed(0)
        pooled = torch.zeros(11, dtype=dtype)
        for size in (3, 0, 40):
            x = (torch.randn(size, 5) + 5).to(dtype)
            backend.merge_pending(pooled, ReferenceBackend.moments(x, None))
        return pooled

    torch.testing.assert_close(
        pool(CpuBackend, torch.float32).double(), pool(ReferenceBackend, torch.float64), rtol=1e-6, atol=0
    )


def test_statistics_in_float64_take_the_path_of_pytorch():
    running, updates = {"mean": torch.zeros(3, dtype=torch.float64)}, torch.tensor(0)
    CpuBackend.update_running(running, Moments.of(torch.tensor(2.0), torch.ones(3), torch.ones(3)), updates, 0.5)
    assert running["mean"].tolist() == [0.5] * 3
    assert updates == 1


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [0.0, 7.0])
def test_penalties_are_those_of_pytorch(distance, count):
    torch.manual_seed(0)
    moments = Moments.of(torch.tensor(count), torch.randn(5), torch.rand(5))
    running = torch.randn(5), torch.rand(5)

    def penalty_with_grad(backend, dtype):
        return backend.penalty_with_grad(
            Moments(moments.packed.to(dtype)), *(value.to(dtype) for value in running), EPS, distance, (0.3, 0.7)
        )

    (value, gradient), (expected, exact) = (
        penalty_with_grad(CpuBackend, torch.float32),
        penalty_with_grad(ReferenceBackend, torch.float64),
    )
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient[1:], exact[1:].float(), rtol=1e-5, atol=1e-7)  # the count is a constant


NORMS = {
    "batchnorm": lambda c: BatchNorm(c),
    "rbn": lambda c: RegularizedBatchNorm(c),
    "pnv": lambda c: PowerNormV(c),
    "powernorm": lambda c: PowerNorm(c, group_scaling=False),
    "powernorm-batch": lambda c: PowerNorm(c, group_scaling=False, grad_scale="batch"),
    "powernorm-groups": lambda c: PowerNorm(c, num_groups=4),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_training_is_the_same_on_every_path(name, dtype, warmup_steps):
    def train(paths, dtype):
        BACKENDS.clear()
        BACKENDS.update(paths)
        torch.manual_seed(0)
        norm = NORMS[name](64).to(dtype)
        norm.warmup_steps = warmup_steps
        values = []
        for _ in range(3):
            x, g = (torch.randn(4, 9, 64) * 2 + 1).to(dtype), torch.randn(4, 9, 64).to(dtype)
            mask = torch.rand(4, 9) < 0.7
            x.requires_grad_()
            y = norm(x, mask)
            penalty = norm.penalty() if name == "rbn" else 0.0
            norm.zero_grad()
            ((y * g).sum() + penalty).backward()
            values += [y, x.grad, norm.weight.grad.clone(), norm.bias.grad.clone(), *map(torch.clone, norm.buffers())]
        return values

    reference = train({}, torch.float64)
    own_error = 4 * max(map(error_of_rows, train({}, dtype), reference))
    values = train({"cpu": lambda x: CpuBackend}, dtype)
    for value, expected in zip(values, reference, strict=True):
        assert error_of_rows(value, expected) <= max(own_error, TOLERANCES[dtype])


def error_of_rows(found, expected):
    return error(found.reshape(1, -1), expected.reshape(1, -1))


def test_what_takes_which_path(monkeypatch):
    x = torch.ones(2, 4)
    use_kernels("auto")
    with torch.no_grad():
        assert get_backend(x) is CpuBackend
        assert get_backend(x.bfloat16()) is CpuBackend
        assert get_backend(x.double()) is ReferenceBackend
        assert get_backend(torch.ones(0, 4)) is ReferenceBackend
        assert get_backend(torch.ones(2, 4, device="meta")) is ReferenceBackend
        assert get_backend(x.int()) is ReferenceBackend
    assert get_backend(x, differentiable=True) is ReferenceBackend
    use_kernels("none")
    with torch.no_grad():
        assert get_backend(x) is ReferenceBackend
    with pytest.raises(ValueError, match="auto, all, none"):
        use_kernels("fast")


def test_without_a_compiler_pytorch_takes_over(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("/nowhere/g++", "false"):
        monkeypatch.setenv("CXX", compiler)
        cpu.load_library.cache_clear()
        kernels._load.cache_clear()
        use_kernels("auto")
        with torch.no_grad():
            assert get_backend(torch.ones(2, 4)) is ReferenceBackend
        BatchNorm(4)(torch.randn(3, 5, 4))
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.undo()
    cpu.load_library.cache_clear()
    kernels._load.cache_clear()
    use_kernels("auto")


def test_the_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.load_library.cache_clear()
    cpu.load_library()
    (built,) = tmp_path.rglob("*.so")
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    before = built.stat().st_mtime_ns
    cpu.load_library.cache_clear()
    cpu.load_library()
    assert built.stat().st_mtime_ns == before
    monkeypatch.undo()
    cpu.load_library.cache_clear()
