"""Norms with statistics of a sentence: their equations sentence by sentence, and where they are refused."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_normswap import calibrate, find_norms, fold_norms, get_norm, padding_mask, swap_norm
from hf_normswap.modeling.norms import FRN, AttentiveNorm, InstanceNorm, SwitchableNorm
from tests.helpers import reference
from tests.helpers.calibration import batches, stock
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.norms import SENTENCE_NORMS, assert_gradients_are_those_of_differences, make_norm, make_tokens
from tests.helpers.persistence import is_one_sentence, outputs, same, train
from tests.helpers.surgery import refuses


MASK = torch.tensor([[True, True, True, True], [False, True, True, False], [True, False, False, False]])
EPS = 1e-2
every_norm = pytest.mark.parametrize("name", SENTENCE_NORMS)


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def assert_each_sentence_follows(norm, formula):
    """`γ formula(x) + β` of the real tokens of each sentence alone, `(n, C)`, in training and in evaluation."""
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(norm.bias)
    x = make_tokens(3, 4)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    for training in (True, False):
        y = norm.train(training)(x, MASK)
        for sentence, tokens, mask in zip(y.detach(), x, MASK, strict=True):
            expected = weight * formula(tokens[mask].numpy()) + bias
            np.testing.assert_allclose(sentence[mask].numpy(), expected, rtol=1e-11, atol=1e-12)


def test_instance_norm():
    norm = InstanceNorm(4, eps=EPS, dtype=torch.float64)
    assert_each_sentence_follows(norm, lambda x: (x - x.mean(0)) / np.sqrt(x.var(0) + EPS))
    x = make_tokens(3, 4)
    theirs = nn.functional.instance_norm(x.mT, weight=norm.weight, bias=norm.bias, eps=EPS).mT
    torch.testing.assert_close(norm(x), theirs)


def test_filter_response_norm():
    norm = FRN(4, eps=EPS, tlu=False, dtype=torch.float64)
    assert_each_sentence_follows(norm, lambda x: x / np.sqrt((x**2).mean(0) + EPS))
    with_threshold = FRN(4, eps=EPS, dtype=torch.float64)
    assert not with_threshold.threshold.any()
    with_threshold.load_state_dict({**norm.state_dict(), "threshold": torch.tensor([-1.0, -0.1, 0.0, 0.3])})
    x = make_tokens(3, 4)
    expected = np.maximum(norm(x, MASK).detach().numpy(), [-1.0, -0.1, 0.0, 0.3])
    np.testing.assert_allclose(with_threshold(x, MASK).detach().numpy(), expected)
    assert 0 < (norm(x) != with_threshold(x)).sum() < x.numel()


def test_switchable_norm():
    norm = SwitchableNorm(4, eps=EPS, momentum=0.3, dtype=torch.float64)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    assert not norm.mean_logits.any()
    logits = np.array([0.3, -0.2, 0.5]), np.array([-0.4, 0.1, 0.2])
    norm.mean_logits.data.copy_(torch.from_numpy(logits[0]))
    norm.var_logits.data.copy_(torch.from_numpy(logits[1]))
    (a_in, a_bn, a_ln), (b_in, b_bn, b_ln) = map(softmax, logits)
    x, running = make_tokens(3, 4), (np.zeros(4), np.ones(4))
    rows = x[MASK].numpy()
    for training in (True, False):
        y = norm.train(training)(x, MASK)
        mean_bn, var_bn = (rows.mean(0), rows.var(0)) if training else running
        for sentence, tokens, mask in zip(y.detach(), x, MASK, strict=True):
            real = tokens[mask].numpy()
            mean = a_in * real.mean(0) + a_bn * mean_bn + a_ln * real.mean(1, keepdims=True)
            var = b_in * real.var(0) + b_bn * var_bn + b_ln * real.var(1, keepdims=True)
            expected = norm.weight.detach().numpy() * (real - mean) / np.sqrt(var + EPS) + norm.bias.detach().numpy()
            np.testing.assert_allclose(sentence[mask].numpy(), expected, rtol=1e-11, atol=1e-12)
        running = 0.3 * rows.mean(0), 0.7 + 0.3 * rows.var(0)
        np.testing.assert_allclose(norm.running_mean.numpy(), running[0], rtol=1e-11)
        np.testing.assert_allclose(norm.running_var.numpy(), running[1], rtol=1e-11)
    assert norm.affine_map() is None


def test_attentive_norm():
    norm = AttentiveNorm(4, num_maps=3, eps=EPS, dtype=torch.float64)
    x = make_tokens(3, 4)
    # At the start it is LayerNorm, and the maps differ.
    theirs = nn.functional.layer_norm(x, (4,), eps=EPS)
    torch.testing.assert_close(norm(x, MASK), theirs, rtol=1e-6, atol=1e-6)
    assert len(norm.gains.unique(dim=0)) == 3
    for parameter in (norm.gains, norm.shifts, norm.attention):
        nn.init.normal_(parameter)
    gains, shifts, attention = (p.detach().numpy() for p in (norm.gains, norm.shifts, norm.attention))

    def formula(tokens):
        shares = softmax(attention @ (tokens.mean(0) / np.sqrt(tokens.var(0) + EPS)))
        x_hat = reference.layernorm(tokens, EPS)
        return sum(share * (a * x_hat + b) for share, a, b in zip(shares, gains, shifts, strict=True))

    assert_each_sentence_follows(norm, formula)


def test_the_number_of_maps():
    with pytest.raises(ValueError, match="num_maps"):
        AttentiveNorm(4, num_maps=0)


@every_norm
@pytest.mark.parametrize("mask", [None, MASK[:2]], ids=["no_pads", "pads"])
def test_gradients(name, mask):
    norm = make_norm(name)
    norm.eps = 0.1
    assert_gradients_are_those_of_differences(norm, mask)


@every_norm
def test_what_pads_hold_changes_nothing_in_evaluation(name):
    """The norm of a model that evaluates needs the mask, too."""
    model = train(swap_norm(tiny_model("bert"), name, where="all"))
    batch = tiny_batch(model, (6, 3), labels=False)
    expected = outputs(model, batch)
    short = {key: value[1:, :3] for key, value in batch.items()}
    torch.testing.assert_close(outputs(model, short)["logits"], expected["logits"][1:])
    batch["input_ids"][1, 3:] = 7
    assert same(outputs(model, batch), expected)
    # What the context says counts before the arguments.
    with padding_mask(batch["attention_mask"]):
        assert same(outputs(model, {**batch}), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_does_not_know_its_padding_warns(training, caplog):
    transformers_logging.warning_once.cache_clear()
    model = swap_norm(tiny_model("bert"), "instancenorm", where="all").train(training)
    find_norms(model)  # follows the forward of a copy
    outputs(model)
    assert "padding" not in caplog.text
    model.train(training).bert.encoder(torch.randn(2, 3, 16))
    (warning,) = [record.getMessage() for record in caplog.records if "padding" in record.getMessage()]
    assert is_one_sentence(warning)
    assert warning.startswith("Norms with statistics of a sentence ran without knowing which tokens are padding")


@every_norm
@pytest.mark.parametrize(
    ("family", "head", "where"),
    [
        ("gpt2", None, "blocks"),
        ("gpt2", None, "final"),
        ("marian", None, "blocks"),
        ("marian", None, "decoder.attention"),
        ("bert", "BertLMHeadModel", "blocks"),
    ],
)
def test_causal_stacks_refuse(name, family, head, where):
    model = tiny_model(family, head)
    refuses(model, lambda: swap_norm(model, name, where=where), "stands in a causal stack")


def test_an_encoder_beside_a_decoder_takes_it():
    model = swap_norm(tiny_model("marian"), "instancenorm", where="encoder")
    assert {site.stack for site in find_norms(model) if site.kind == "instancenorm"} == {"encoder"}
    outputs(model)


@every_norm
def test_tokens_without_sentences_are_refused(name):
    with pytest.raises(ValueError, match="cannot tell them apart in tokens of shape") as error:
        make_norm(name)(make_tokens(8))
    assert is_one_sentence(str(error.value))


@every_norm
def test_parts_of_a_sentence_are_refused(name):
    model = tiny_model("bert", chunk_size_feed_forward=2)
    refuses(model, lambda: swap_norm(model, name), "chunk_size_feed_forward")


@every_norm
def test_it_calibrates_and_does_not_fold(name):
    model, data = stock("bert"), batches(stock("bert"))
    before = outputs(model, data[0])["logits"]
    report = calibrate(swap_norm(model, name), data)
    assert len(report) == 4
    assert all(fit.r2 > 0.5 for fit in report)
    distance = (outputs(model, data[0])["logits"] - before).norm() / before.norm()
    assert distance < 0.5
    with pytest.raises(ValueError, match="needs statistics of each") as error:
        fold_norms(model)
    assert is_one_sentence(str(error.value))
    assert get_norm(name).norm_name in str(error.value)
