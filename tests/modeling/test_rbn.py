"""RBN: the penalty and its gradient against the published code's numbers, the formulas and finite differences."""

import copy
import re
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_normswap import BatchNorm, NormSwapConfig, RegularizedBatchNorm, find_norms, norm_penalty, swap_norm
from hf_normswap.modeling.activation_checkpointing import checkpoint_norms
from hf_normswap.modeling.discrepancy import DISTANCES, penalty, penalty_with_grad
from hf_normswap.modeling.moments import Moments
from tests.helpers.models import tiny_model
from tests.helpers.persistence import is_one_sentence
from tests.helpers.vectors import load_vectors


CHANNELS = 3
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def make_norm(distance="relative", **options):
    options = {"lambda_mean": 0.7, "lambda_var": 0.4, "eps": 1e-3, "momentum": 0.2, **options}
    norm = RegularizedBatchNorm(CHANNELS, distance=distance, **options).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm


def make_tokens(*shape):
    return (1.5 + 2 * torch.randn(*shape, CHANNELS, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize(("file", "distance"), [("rbn_paper_sigma_l2", "sigma_l2"), ("rbn_code_var_l1", "var_l1")])
def test_agrees_with_the_published_code(file, distance):
    vectors = load_vectors(file)
    channels = len(vectors["weight"])
    momentum, lambdas = vectors["momentum"].item(), (vectors["lam_mean"].item(), vectors["lam_var"].item())
    # eps = 0: the published code takes it as a lower bound of the variance.
    options = {"lambda_mean": lambdas[0], "lambda_var": lambdas[1], "distance": distance}
    norm, tracking = (RegularizedBatchNorm(channels, eps=0.0, momentum=momentum, **options).double() for _ in range(2))
    norm.load_state_dict({"weight": vectors["weight"], "bias": vectors["bias"]}, strict=False)
    for step in range(vectors["meta"][-1].item()):
        x, g, real = vectors[f"x{step}"].requires_grad_(), vectors[f"g{step}"], ~vectors[f"pad{step}"].T
        tracking(x.detach(), real)
        # The published code updates its running pair before it takes the penalty.
        for name in norm.running:
            getattr(norm, name).copy_(vectors[f"{name}{step}"])
        y = norm(x, real)
        penalty = norm.penalty()
        dx, dw, db = torch.autograd.grad((y * g).sum() + penalty, [x, norm.weight, norm.bias])

        results = {"penalty": penalty, "dw": dw, "db": db}
        results |= {"running_mean": tracking.running_mean, "running_var": tracking.running_var}
        for name, value in results.items():
            torch.testing.assert_close(value.detach(), vectors[f"{name}{step}"], rtol=1e-10, atol=1e-10)
        for name, value in (("y", y), ("dx", dx)):
            expected = vectors[f"{name}{step}"][real]
            torch.testing.assert_close(value.detach()[real], expected, rtol=1e-10, atol=1e-10)


def test_output_and_running_pair_are_those_of_batchnorm():
    x = make_tokens(2, 4)
    norm, plain = make_norm(), BatchNorm(CHANNELS, eps=1e-3, momentum=0.2).double()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x, MASK), plain(x, MASK))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, norm.state_dict()[name])


@pytest.mark.parametrize("distance", DISTANCES)
def test_penalty_uses_the_running_pair_from_before_the_batch(distance):
    norm, x = make_norm(distance), make_tokens(2, 4)
    mean, var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    norm(x, MASK)
    rows = x[MASK].detach().numpy()
    sigma, sigma_batch = np.sqrt(var + 1e-3), np.sqrt(rows.var(0) + 1e-3)
    of_mean, of_var = {
        "sigma_l2": (((rows.mean(0) - mean) ** 2).sum(), ((sigma_batch - sigma) ** 2).sum()),
        "var_l1": (((rows.mean(0) - mean) ** 2).sum(), np.abs(rows.var(0) - var).sum()),
        "relative": ((((rows.mean(0) - mean) / sigma) ** 2).mean(), ((sigma_batch / sigma - 1) ** 2).mean()),
    }[distance]
    np.testing.assert_allclose(norm.penalty().item(), 0.7 * of_mean + 0.4 * of_var, rtol=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
def test_gradcheck_with_the_penalty(distance, mask):
    norm = make_norm(distance, momentum=0.0)  # each evaluation must meet the same running pair

    def penalty_alone(x):
        norm(x, mask)
        return norm.penalty()

    def output_and_penalty(x):
        y = norm(x, mask)
        return y if mask is None else y[mask], norm.penalty()

    x = make_tokens(2, 4)
    assert torch.autograd.gradcheck(penalty_alone, x)
    assert torch.autograd.gradcheck(output_and_penalty, x)


@pytest.mark.parametrize("distance", ["sigma_l2", "var_l1"])
def test_gradient_of_the_mean_term(distance):
    norm, x = make_norm(distance, lambda_var=0.0), make_tokens(2, 4)
    gap = x[MASK].mean(0) - norm.running_mean
    norm(x, MASK)
    (dx,) = torch.autograd.grad(norm.penalty(), x)
    expected = (2 * 0.7 * gap / MASK.sum()).expand(2, 4, CHANNELS) * MASK.unsqueeze(-1)
    torch.testing.assert_close(dx, expected.detach(), rtol=1e-12, atol=1e-15)


def test_gradients_of_task_and_penalty_add_up():
    norm, x = make_norm(momentum=0.0), make_tokens(2, 4)
    upstream = torch.randn(2, 4, CHANNELS, dtype=torch.float64)

    def gradient(of_task, of_penalty):
        y = norm(x, MASK)
        return torch.autograd.grad(of_task * (y * upstream).sum() + of_penalty * norm.penalty(), x)[0]

    torch.testing.assert_close(gradient(1, 1), gradient(1, 0) + gradient(0, 1), rtol=1e-12, atol=1e-14)


def test_penalty_is_taken_once_and_after_a_training_forward():
    norm, x = make_norm(), make_tokens(2, 4)
    with pytest.raises(RuntimeError, match="no penalty to take"):
        norm.penalty()
    norm(x)
    norm.penalty()
    with pytest.raises(RuntimeError, match="no penalty to take"):
        norm.penalty()
    norm.eval()(x)
    with pytest.raises(RuntimeError, match="no penalty to take"):
        norm.penalty()


@pytest.fixture
def warnings_of_rbn(monkeypatch):
    """What norms warn of, each time, not once in a process."""
    texts = []
    monkeypatch.setattr("hf_normswap.modeling.rbn.logger.warning_once", texts.append, raising=False)
    return texts


def distance(norm, x):
    """The penalty of a training forward of `x`, and its gradient, by finite formulas of autograd on plain tensors."""
    mean, sigma = norm.running_mean.clone(), (norm.running_var.clone() + norm.eps).sqrt()
    rows = x.flatten(0, -2)
    batch_sigma = (rows.var(0, correction=0) + norm.eps).sqrt()
    of_mean = ((rows.mean(0) - mean) / sigma).square().mean()
    return norm.lambda_mean * of_mean + norm.lambda_var * (batch_sigma / sigma - 1).square().mean()


def test_the_penalty_is_that_of_every_training_forward():
    norm, inputs = make_norm(), [make_tokens(2, 4), make_tokens(3, 4), make_tokens(1, 2)]
    expected = 0
    for x in inputs:
        expected = expected + distance(norm, x)  # with the running pair from before this forward
        norm(x)
    norm.eval()(inputs[0])  # no training forward: neither counts, nor makes the others forgotten
    found = norm_penalty(norm)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_a_forward_without_gradient_counts_with_its_value():
    norm, inputs = make_norm(), [make_tokens(2, 4), make_tokens(3, 4)]
    expected = distance(norm, inputs[0])
    with torch.no_grad():
        norm(inputs[0])
    expected = expected + distance(norm, inputs[1])
    norm(inputs[1])
    found = norm.penalty()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(found, inputs, allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].abs().max() > 0


def test_a_penalty_that_a_backward_left_out_is_named_and_not_returned(warnings_of_rbn):
    norm, inputs = make_norm(), [make_tokens(2, 4), make_tokens(3, 4)]
    norm(inputs[0]).sum().backward()
    assert not warnings_of_rbn
    expected = distance(norm, inputs[1]).item()
    y = norm(inputs[1])
    (warning,) = warnings_of_rbn
    assert re.fullmatch(r"RBN's penalty was left out of a backward.*add norm_penalty\(model\) to the loss.*", warning)
    assert is_one_sentence(warning)
    found = norm.penalty()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    (y.sum() + found).backward()
    assert len(warnings_of_rbn) == 1


def test_no_penalty_after_the_backward(warnings_of_rbn):
    norm = make_norm()
    norm(make_tokens(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="before its backward") as error:
        norm_penalty(norm)
    assert is_one_sentence(error.value)
    assert len(warnings_of_rbn) == 1


def test_a_graph_that_is_retained_is_not_lost(warnings_of_rbn):
    norm, x = make_norm(), make_tokens(2, 4)
    expected = distance(norm, x)
    norm(x).sum().backward(retain_graph=True)
    found = norm.penalty()
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, expected)))
    assert not warnings_of_rbn


def test_looking_for_lost_penalties_runs_no_checkpointed_block_again(kernels, warnings_of_rbn):
    calls = []

    class Block(nn.Sequential):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    block = Block(*(RegularizedBatchNorm(CHANNELS) for _ in range(3)))
    run = checkpoint_norms(partial(checkpoint, use_reentrant=False))
    outputs = [run(block, torch.randn(rows, CHANNELS, requires_grad=True)) for rows in (9, 5)]
    penalty = norm_penalty(block)
    assert len(calls) == 2
    (sum(y.square().sum() for y in outputs) + penalty).backward()
    assert len(calls) == 4
    assert not warnings_of_rbn


def test_graphs_that_nobody_asks_for_bring_a_warning(warnings_of_rbn):
    norm = make_norm()
    for number in range(1, 21):
        norm(make_tokens(2, 4))
        assert bool(warnings_of_rbn) == (number > 16)
    assert is_one_sentence(warnings_of_rbn[0])
    assert len(norm.penalties) == 20
    norm.penalty().backward()


def test_values_without_a_graph_do_not_pile_up(warnings_of_rbn):
    norm = make_norm()
    norm(make_tokens(2, 4))
    (pending,) = norm.penalties
    with torch.no_grad():
        for _ in range(40):
            norm(make_tokens(2, 4))
    assert len(norm.penalties) == 17
    assert norm.penalties[0] is pending
    assert not warnings_of_rbn


def test_a_second_forward_before_the_penalty_crashes_nothing():
    norm, first, second = make_norm(), make_tokens(2, 4), make_tokens(2, 3)
    norm(first)
    of_first = norm.penalty()
    norm(second)
    of_second = norm.penalty()
    gradients = torch.autograd.grad(of_first + of_second, [first, second])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_norm_penalty_sums_over_layers_and_takes_a_shared_one_once():
    norms = make_norm(momentum=0.0), make_norm("sigma_l2", momentum=0.0)
    model = nn.ModuleList([*norms, norms[0], BatchNorm(CHANNELS).double()])
    x, expected = make_tokens(2, 4), 0.0
    for norm in norms:
        norm(x)
        expected += norm.penalty().item()
        norm(x)
    assert norm_penalty(model).item() == pytest.approx(expected, rel=1e-12)


def test_norm_penalty_without_rbn_is_zero():
    assert norm_penalty(nn.ModuleList([BatchNorm(CHANNELS)])).item() == 0
    rbn = RegularizedBatchNorm(CHANNELS).eval()  # frozen: it regularises nothing
    assert norm_penalty(nn.ModuleList([rbn])).item() == 0


def test_no_real_token_gives_no_penalty():
    norm, x = make_norm(), make_tokens(2, 4)
    y = norm(x, torch.zeros(2, 4, dtype=torch.bool))
    penalty = norm.penalty()
    assert penalty.item() == 0
    (dx,) = torch.autograd.grad(penalty + 0 * y.sum(), x)
    assert dx.eq(0).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_constant_channels_have_a_finite_gradient(distance):
    norm = RegularizedBatchNorm(CHANNELS, distance=distance)
    x = torch.full((2, 4, CHANNELS), 3.0, requires_grad=True)
    norm(x)
    penalty = norm.penalty()
    (dx,) = torch.autograd.grad(penalty, x)
    assert penalty.isfinite()
    assert dx.isfinite().all()


def test_unknown_distances_are_named():
    with pytest.raises(ValueError, match="'relative', 'sigma_l2', 'var_l1'.*'cosine'"):
        RegularizedBatchNorm(4, distance="cosine")


@pytest.mark.parametrize(("earlier", "distance"), [("paper", "sigma_l2"), ("reference", "var_l1")])
def test_distances_have_their_earlier_names_too(earlier, distance, tmp_path):
    assert RegularizedBatchNorm(4, distance=earlier).distance == distance
    model = swap_norm(tiny_model("bert"), NormSwapConfig("rbn", distance=earlier))
    assert {entry["options"]["distance"] for entry in model.config.norm_swap["norms"]} == {distance}
    old = copy.deepcopy(model.config)
    for entry in old.norm_swap["norms"]:
        entry["options"]["distance"] = earlier
    assert {site.module.distance for site in find_norms(type(model)(old)) if site.kind == "rbn"} == {distance}


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("count", [0.0, 7.0])
def test_the_gradient_in_closed_form(distance, count):
    packed = torch.cat([torch.tensor([count]), torch.randn(4), torch.rand(4)]).double().requires_grad_()
    running = torch.randn(4).double(), torch.rand(4).double()
    options = *running, 1e-3, distance, (0.3, 0.7)
    expected = penalty(Moments(packed), *options)
    value, gradient = penalty_with_grad(Moments(packed.detach()), *options)
    assert value.item() == expected.item()
    (exact,) = torch.autograd.grad(expected, packed)
    torch.testing.assert_close(gradient[1:], exact[1:], rtol=1e-12, atol=1e-12)


def test_a_checkpointed_block_runs_twice_in_all(kernels):
    calls = 0

    class Block(nn.Sequential):
        def forward(self, x):
            nonlocal calls
            calls += 1
            return super().forward(x)

    block = Block(*(RegularizedBatchNorm(CHANNELS) for _ in range(3)))
    run = checkpoint_norms(partial(checkpoint, use_reentrant=False))
    y = run(block, torch.randn(9, CHANNELS, requires_grad=True))
    assert calls == 1
    (y.square().sum() + norm_penalty(block)).backward()
    assert calls == 2


def test_training_mode_without_any_graph(kernels):
    with torch.inference_mode():
        norm = RegularizedBatchNorm(CHANNELS)
        norm(torch.randn(9, CHANNELS))
        assert norm.penalty() > 0


def test_statistics_hold_no_graph():
    norm = make_norm()
    norm(make_tokens(5), None)
    (record,), (pending,) = norm.records, norm.penalties
    assert not record.moments.packed.requires_grad
    assert pending.value.requires_grad
    gone = weakref.ref(norm)
    del norm, record, pending
    assert gone() is None
