"""What every norm must hold to, whatever it computes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_normswap import BatchStatisticNorm, accumulate_norm_statistics, update_norm_statistics
from tests.helpers.norms import (
    BATCH_VARIANTS,
    CHANNELS,
    SENTENCE_VARIANTS,
    VARIANTS,
    assert_same,
    make_norm,
    make_tokens,
    train_step,
)


MASK = torch.tensor([[True, True, True, True], [False, True, True, False]])
CLOSE = {"rtol": 1e-11, "atol": 1e-13}

every_norm = pytest.mark.parametrize("variant", VARIANTS)
not_that_of_pytorch = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "layernorm"])
# Of tokens in any shape.
every_norm_of_tokens = pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in SENTENCE_VARIANTS])
every_batch_norm_of_tokens = pytest.mark.parametrize(
    "variant", [name for name in BATCH_VARIANTS if name not in SENTENCE_VARIANTS]
)
every_batch_norm = pytest.mark.parametrize("variant", BATCH_VARIANTS)
seeds = st.integers(0, 2**32 - 1)
masks = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda row: torch.tensor(row).view(2, 4))


def real_part(results, mask):
    return {name: value[mask] if name in ("y", "dx") else value for name, value in results.items()}


def dtypes_of(norm):
    """Of the statistics: the constant gain of a norm without one goes with the module."""
    buffers = {name: value for name, value in norm.named_buffers() if name != "weight"}
    return {value.dtype for value in buffers.values() if value.is_floating_point()}


def make_upstream(*shape, dtype=torch.float64, seed=1):
    return make_tokens(*shape, dtype=dtype, seed=seed)


# Padding


@every_norm
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@given(
    mask=masks,
    junk=st.lists(
        st.sampled_from([0.0, 1e3, 4e18, -1.8e19, 1e30, -1e30, float("nan"), float("inf"), -float("inf")]),
        min_size=CHANNELS,
        max_size=CHANNELS,
    ),
    seed=seeds,
)
def test_content_of_pads_has_no_influence(variant, dtype, mask, junk, seed):
    clean_norm, norm = make_norm(variant, dtype), make_norm(variant, dtype)
    for step in range(2):
        x = make_tokens(2, 4, dtype=dtype, seed=seed + step)
        upstream = make_upstream(2, 4, dtype=dtype, seed=seed + step + 1)
        # Where a loss touches pads, the gradient of the gain is that of an affine map: it depends on their content.
        upstream_real = torch.where(mask.unsqueeze(-1), upstream, 0)
        given_x = torch.where(mask.unsqueeze(-1), x, torch.tensor(junk, dtype=dtype))
        expected = train_step(clean_norm, x, upstream_real, mask)
        results = train_step(norm, given_x, upstream_real, mask)
        assert_same(real_part(expected, mask), real_part(results, mask))
        assert results["dx"].isfinite().all()

        expected = train_step(copy.deepcopy(clean_norm), x, upstream, mask)
        results = train_step(copy.deepcopy(norm), given_x, upstream, mask)
        of_pads = dict.fromkeys((f"d{name}" for name, _ in norm.named_parameters() if name != "bias"), 0)
        assert_same(real_part(expected, mask) | of_pads, real_part(results, mask) | of_pads)
        assert results["dx"].isfinite().all()
        assert all(results[name].isfinite().all() for name in of_pads)


@every_norm_of_tokens
@given(mask=masks, seed=seeds)
def test_real_tokens_do_as_without_pads(variant, mask, seed):
    """Masking is selecting: the same tokens, as rows without any pad, give the same."""
    if not mask.any():
        return
    x, upstream = make_tokens(2, 4, seed=seed), make_upstream(2, 4, seed=seed + 1) * mask.unsqueeze(-1)
    expected = train_step(make_norm(variant), x[mask], upstream[mask])
    assert_same(expected, real_part(train_step(make_norm(variant), x, upstream, mask), mask), **CLOSE)


@every_norm
def test_an_empty_mask_leaves_the_statistics_as_they_were(variant):
    norm = make_norm(variant)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    nowhere = torch.zeros(2, 4, dtype=torch.bool)
    results = train_step(norm, make_tokens(2, 4), make_upstream(2, 4), nowhere)
    assert_same(before, dict(norm.named_buffers()))
    assert all(value.isfinite().all() for value in results.values())

    accumulate_norm_statistics(norm)
    train_step(norm, make_tokens(2, 4), make_upstream(2, 4), nowhere)
    update_norm_statistics(norm)
    assert_same(before, dict(norm.named_buffers()))


@every_batch_norm_of_tokens
def test_pads_are_mapped_as_real_tokens_are_with_the_plain_gradient(variant):
    """One affine map per channel: its slope, found at the pads, holds at real tokens, and is the gradient at pads."""
    norm = make_norm(variant)
    if getattr(norm, "group_scaling", False):
        pytest.skip("group scaling comes before the affine map, and is of each token")
    x, upstream = make_tokens(2, 4), make_upstream(2, 4)
    x[1, 3] = x[1, 0] + 1
    results = train_step(norm, x, upstream, MASK)
    slope = results["y"][1, 3] - results["y"][1, 0]
    of_real = (results["y"][0, 1] - results["y"][0, 0]) / (x[0, 1] - x[0, 0])
    torch.testing.assert_close(slope, of_real, rtol=1e-9, atol=0)
    inverse = slope / norm.weight.detach()
    torch.testing.assert_close(
        results["dx"][~MASK], (upstream * norm.weight.detach() * inverse)[~MASK], rtol=1e-9, atol=1e-12
    )


@every_norm
def test_gain_and_shift_have_plain_sums_over_every_position_as_gradient(variant):
    norm = make_norm(variant)
    x, upstream = make_tokens(2, 4), make_upstream(2, 4)
    results = train_step(norm, x, upstream, MASK)
    x_hat = (results["y"] - norm.bias.detach()) / norm.weight.detach()
    torch.testing.assert_close(results["dbias"], upstream.sum((0, 1)), **CLOSE)
    if not norm.has_gain:
        return
    torch.testing.assert_close(results["dweight"], (upstream * x_hat).sum((0, 1)), rtol=1e-10, atol=1e-12)


@every_norm
def test_an_attention_mask_will_do(variant):
    x, upstream = make_tokens(2, 4), make_upstream(2, 4)
    expected = train_step(make_norm(variant), x, upstream, MASK)
    for dtype in (torch.long, torch.uint8, torch.float32):
        assert_same(expected, train_step(make_norm(variant), x, upstream, MASK.to(dtype)))


@every_norm
@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 1), (2, 4, 1), (2, 5)])
def test_a_mask_of_another_shape_is_refused(variant, shape):
    with pytest.raises(ValueError, match="one entry for each token"):
        make_norm(variant)(make_tokens(2, 4), torch.ones(shape, dtype=torch.bool))


# Tokens are a set


@every_norm_of_tokens
@given(mask=masks, order=st.permutations(range(8)), seed=seeds)
def test_the_order_of_tokens_does_not_matter(variant, mask, order, seed):
    x, upstream = make_tokens(8, seed=seed), make_upstream(8, seed=seed + 1)
    mask, order = mask.flatten(), torch.tensor(order)
    expected = train_step(make_norm(variant), x, upstream, mask)
    expected |= {name: expected[name][order] for name in ("y", "dx")}
    assert_same(expected, train_step(make_norm(variant), x[order], upstream[order], mask[order]), **CLOSE)


@every_norm_of_tokens
def test_the_shape_of_the_batch_does_not_matter(variant):
    x, upstream = make_tokens(2, 4), make_upstream(2, 4)
    expected = train_step(make_norm(variant), x, upstream, MASK)
    for shape in ((8,), (8, 1), (1, 8), (2, 2, 2)):
        results = train_step(
            make_norm(variant), x.view(*shape, CHANNELS), upstream.view(*shape, CHANNELS), MASK.view(shape)
        )
        results |= {name: results[name].view(2, 4, CHANNELS) for name in ("y", "dx")}
        assert_same(expected, results, **CLOSE)


@every_norm
def test_the_layout_in_memory_does_not_matter(variant):
    x, upstream = make_tokens(2, 4), make_upstream(2, 4)
    expected = train_step(make_norm(variant), x, upstream, MASK)
    results = train_step(
        make_norm(variant),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        upstream.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        MASK.T.contiguous().T,
    )
    assert_same(expected, results, **CLOSE)


@every_batch_norm_of_tokens
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=seeds)
def test_deferred_statistics_of_parts_are_those_of_the_whole(variant, sizes, seed):
    tokens = max(1, sum(sizes))
    x, mask = make_tokens(tokens, seed=seed), make_tokens(tokens, seed=seed + 1)[:, 0] < 1.5
    whole, parts = make_norm(variant), make_norm(variant)
    for norm in (whole, parts):
        accumulate_norm_statistics(norm)
    before = {name: getattr(parts, name).clone() for name in parts.running}
    whole(x, mask)
    start = 0
    for size in sizes:
        parts(x[start : start + size], mask[start : start + size])
        start += size
    parts(x[start:], mask[start:])
    assert_same(before, {name: getattr(parts, name) for name in parts.running})
    for norm in (whole, parts):
        update_norm_statistics(norm)
    assert_same(dict(whole.named_buffers()), dict(parts.named_buffers()), **CLOSE)


@every_batch_norm
def test_a_deferred_update_of_one_batch_is_the_immediate_one(variant):
    x, upstream = make_tokens(2, 4), make_upstream(2, 4)
    at_once, accumulating = make_norm(variant), make_norm(variant)
    accumulate_norm_statistics(accumulating)
    for _ in range(3):
        expected = train_step(at_once, x, upstream, MASK)
        results = train_step(accumulating, x, upstream, MASK)
        update_norm_statistics(accumulating)
        results |= {name: value.clone() for name, value in accumulating.named_buffers()}
        assert_same(expected, results, **CLOSE)


@every_batch_norm
def test_what_was_pooled_is_forgotten_when_deferring_ends(variant):
    norm = make_norm(variant)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    accumulate_norm_statistics(norm)
    train_step(norm, make_tokens(2, 4), make_upstream(2, 4))
    accumulate_norm_statistics(norm, False)
    update_norm_statistics(norm)
    assert_same(before, dict(norm.named_buffers()))


# Forwards and backwards


@every_norm
def test_two_forwards_before_one_backward(variant):
    first, second = make_tokens(2, 4, seed=2), make_tokens(2, 3, seed=3)
    upstream = make_upstream(2, 4)
    # Each alone, the second on the statistics that the first forward left.
    alone = make_norm(variant)
    after_first_forward = copy.deepcopy(alone)
    with torch.no_grad():
        after_first_forward(first)
    expected = [train_step(alone, first, upstream)["dx"]]
    expected.append(train_step(after_first_forward, second, upstream[:, :3])["dx"])

    norm, inputs, terms = make_norm(variant), [first.requires_grad_(), second.requires_grad_()], []
    for x in inputs:
        terms.append((norm(x) * upstream[:, : x.shape[1]]).sum())
        if hasattr(norm, "penalty"):
            terms.append(norm.penalty())
    gradients = torch.autograd.grad(sum(terms), inputs)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, **CLOSE)


@every_norm_of_tokens
def test_evaluation_changes_nothing_and_repeats_itself(variant):
    norm = make_norm(variant)
    train_step(norm, make_tokens(2, 4), make_upstream(2, 4))
    norm(make_tokens(2, 4))
    norm.eval()
    before, records = {name: value.clone() for name, value in norm.named_buffers()}, getattr(norm, "records", ())
    x = make_tokens(2, 4, seed=5)
    y = norm(x)
    y.sum().backward()
    # Token by token: neither the batch nor its padding matters.
    torch.testing.assert_close(norm(x[:1, 1:]), y[:1, 1:])
    torch.testing.assert_close(norm(x, MASK), y)
    assert_same(before, dict(norm.named_buffers()))
    assert getattr(norm, "records", ()) is records


@every_batch_norm_of_tokens
def test_evaluation_is_an_affine_map_of_the_running_values(variant):
    norm = make_norm(variant).eval()
    if getattr(norm, "group_scaling", False):
        pytest.skip("group scaling is of each token")
    x = make_tokens(2, 4)
    power = norm.running_var if hasattr(norm, "running_var") else norm.running_power
    expected = (x - getattr(norm, "running_mean", 0)) / (power + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, **CLOSE)


@every_batch_norm
def test_a_forward_without_gradient_updates_once(variant):
    x = make_tokens(2, 4)
    expected, norm = make_norm(variant), make_norm(variant)
    expected(x.requires_grad_())
    with torch.no_grad():
        norm(x)
    assert_same(dict(expected.named_buffers()), dict(norm.named_buffers()))
    assert norm.num_batches_tracked.item() == 1


@every_batch_norm
def test_running_values_have_no_gradient(variant):
    norm = make_norm(variant)
    norm(make_tokens(2, 4).requires_grad_())
    assert not any(value.requires_grad for value in norm.buffers())


# Precision


@pytest.mark.usefixtures("plain_pytorch")
@not_that_of_pytorch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(variant, dtype):
    norm = make_norm(variant, dtype)
    assert dtypes_of(norm) <= {torch.float32}
    # The same values, as float32 holds them.
    wide = make_norm(variant, torch.float32)
    wide.load_state_dict(norm.state_dict())
    x, upstream = make_tokens(2, 40, dtype=dtype), make_upstream(2, 40, dtype=dtype)
    results, expected = train_step(norm, x, upstream), train_step(wide, x.float(), upstream.float())
    for name in ("y", "dx", *(f"d{name}" for name, _ in norm.named_parameters())):
        assert results[name].dtype == dtype
        # One rounding of what float32 gives, at the end.
        expected[name] = expected[name].to(dtype)
    assert_same(expected, results)


@every_norm
def test_squares_do_not_overflow_in_float16(variant):
    norm = make_norm(variant, torch.float16)
    results = train_step(norm, 300 * make_tokens(2, 8, dtype=torch.float16), make_upstream(2, 8, dtype=torch.float16))
    assert all(value.isfinite().all() for name, value in results.items() if name != "penalty")


@not_that_of_pytorch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(variant, dtype):
    x, upstream = make_tokens(2, 8, dtype=dtype), make_upstream(2, 8, dtype=dtype)
    expected = train_step(make_norm(variant, torch.float32), x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        results = train_step(make_norm(variant, torch.float32), x, upstream)
    assert_same(expected, results)
    assert results["y"].dtype == dtype


@every_batch_norm
@pytest.mark.parametrize(
    "demote",
    [
        lambda norm: norm.half(),
        lambda norm: norm.bfloat16(),
        lambda norm: norm.to(torch.float16),
        lambda norm: norm.to(device="cpu", dtype=torch.bfloat16),
        lambda norm: norm.type(torch.bfloat16),
    ],
    ids=["half", "bfloat16", "to_float16", "to_device_and_bfloat16", "type"],
)
def test_statistics_are_never_demoted(variant, demote):
    norm = make_norm(variant, torch.float32)
    train_step(norm, make_tokens(2, 4, dtype=torch.float32), make_upstream(2, 4, dtype=torch.float32))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    demote(norm)
    assert norm.weight.dtype.itemsize == 2
    assert_same(before, dict(norm.named_buffers()))
    # It goes on working, and can be made wide again.
    norm(make_tokens(2, 4, dtype=norm.weight.dtype))
    norm.float()
    assert dtypes_of(norm) == {norm.weight.dtype} == {torch.float32}


@every_batch_norm
def test_statistics_are_promoted_with_the_module(variant):
    norm = make_norm(variant, torch.float32).double()
    assert dtypes_of(norm) == {torch.float64}
    assert norm.num_batches_tracked.dtype == torch.long
    assert dtypes_of(norm.float()) == {torch.float32}
    assert dtypes_of(make_norm(variant, torch.float32).to(torch.float64)) == {torch.float64}
    assert dtypes_of(make_norm(variant, torch.bfloat16)) == {torch.float32}
    assert dtypes_of(norm.half().double()) == {torch.float64}


@every_batch_norm
def test_statistics_are_never_demoted_without_storage(variant):
    norm = make_norm(variant, torch.float32).to("meta").to(torch.bfloat16)
    assert dtypes_of(norm) == {torch.float32}
    norm.to_empty(device="cpu").initialize()
    assert dtypes_of(norm) == {torch.float32}
    fresh = type(norm)(CHANNELS, dtype=torch.bfloat16)
    assert_same(dict(fresh.named_buffers()), dict(norm.named_buffers()))


# Copies


def trained(variant):
    norm = make_norm(variant)
    x = make_tokens(2, 4).requires_grad_()
    norm(x).sum().backward()
    norm(x)  # what it keeps is part of a graph now
    return norm


def forget(norm):
    if isinstance(norm, BatchStatisticNorm):
        norm.forget_statistics()


@every_norm
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda norm: pickle.loads(pickle.dumps(norm))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on_as_the_original_does(variant, copied):
    norm = trained(variant)
    other = copied(norm)
    forget(norm)  # a copy has no part of a graph
    assert_same(norm.state_dict(), other.state_dict())
    assert all(a is not b for a, b in zip(norm.buffers(), other.buffers(), strict=True))
    x, upstream = make_tokens(2, 4, seed=7), make_upstream(2, 4)
    assert_same(train_step(norm, x, upstream), train_step(other, x, upstream))


@every_norm
def test_state_can_be_saved_and_loaded(variant, tmp_path):
    norm, other = trained(variant), make_norm(variant, seed=9)
    forget(norm)
    torch.save(norm.state_dict(), tmp_path / "norm.pt")
    other.load_state_dict(torch.load(tmp_path / "norm.pt"))
    x, upstream = make_tokens(2, 4, seed=7), make_upstream(2, 4)
    expected, results = train_step(norm, x, upstream), train_step(other, x, upstream)
    expected.pop("largest_gamma", None)  # a diagnostic of this run
    results.pop("largest_gamma", None)
    assert_same(expected, results)


def test_what_is_saved():
    parameters = {"weight", "bias"}
    expected = {
        "layernorm": parameters,
        "rmsnorm": parameters,
        "batchnorm": parameters | {"running_mean", "running_var", "num_batches_tracked"},
        "rbn": parameters | {"running_mean", "running_var", "num_batches_tracked"},
        "pnv": parameters | {"running_power", "num_batches_tracked"},
        "powernorm": parameters | {"running_power", "nu", "num_batches_tracked"},
    }
    for name, keys in expected.items():
        assert set(make_norm(name).state_dict()) == keys


@every_norm
def test_no_shift(variant):
    name, options, _ = VARIANTS[variant]
    norm = make_norm(variant)
    without = type(norm)(CHANNELS, bias=False, **options).double()
    vars(without).update({key: value for key, value in vars(norm).items() if key == "warmup_steps"})
    without.load_state_dict({key: value for key, value in norm.state_dict().items() if key != "bias"})
    assert without.bias is None
    x = make_tokens(2, 4)
    torch.testing.assert_close(without(x, MASK) + norm.bias, norm(x, MASK))
    without.initialize()
    assert without.weight.eq(1).all()


@every_norm
def test_initialize_gives_a_new_norm(variant):
    norm = trained(variant)
    norm.initialize()
    _, options, _ = VARIANTS[variant]
    fresh = type(norm)(CHANNELS, dtype=torch.float64, bias=True, **options)
    assert_same(fresh.state_dict(), norm.state_dict())
    assert_same(dict(fresh.named_buffers()), dict(norm.named_buffers()))


# Speed


class NoHostSynchronisation(TorchDispatchMode):
    """Raises where a device would have to finish its work before Python may go on."""

    waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waits, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("plain_pytorch")
@every_norm
@pytest.mark.parametrize("accumulating", [False, True], ids=["at_once", "accumulating"])
def test_training_never_waits_for_the_device(variant, accumulating):
    norm, x, upstream = make_norm(variant), make_tokens(2, 4), make_upstream(2, 4)
    accumulate_norm_statistics(norm, accumulating)
    with NoHostSynchronisation():
        for _ in range(2):
            train_step(norm, x, upstream, MASK)
            update_norm_statistics(norm)
        with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
            x.sum().item()


# Variants


def test_every_registered_norm_is_here():
    assert set(BATCH_VARIANTS) >= {"batchnorm", "rbn", "pnv", "powernorm"}
    assert all(isinstance(make_norm(name), BatchStatisticNorm) == (name in BATCH_VARIANTS) for name in VARIANTS)
