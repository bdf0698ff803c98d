"""The last norm of a model, fitted to its predictions: against numpy, and tokens told by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertTokenizer

from hf_normswap import calibrate, convert_norms, find_norms, make_batches, swap_norm
from hf_normswap.conversion.predictions import (
    find_predictors,
    fit_to_predictions,
    logits_layer,
    tokens_of_predictions,
)
from tests.helpers.architectures import tiny_architecture
from tests.helpers.calibration import WORDS, batches, stock
from tests.helpers.models import tiny_batch, tiny_model


def divergence(logits, wanted):
    """The mean Kullback–Leibler divergence in numpy."""
    logs = [values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in (logits, wanted)]
    return (np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1).mean()


def drawn(seed=0, rows=900, width=6, classes=9):
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    linear = nn.Linear(width, classes, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return x, noise, linear


@pytest.mark.parametrize("has_shift", [True, False])
def test_a_map_that_can_be_found_is_found(has_shift):
    x, _, linear = drawn()
    gain = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64) if has_shift else None
    target = x * gain if shift is None else x * gain + shift
    ones, zeros = torch.ones_like(gain), torch.zeros_like(gain)
    found, moved = fit_to_predictions(x, target, linear, ones, zeros if has_shift else None)
    torch.testing.assert_close(found, gain, rtol=0.02, atol=0)
    assert moved is None if shift is None else torch.allclose(moved, shift, atol=0.02)


def test_new_tokens_are_predicted_better_than_by_least_squares():
    x, noise, linear = drawn()
    target = functional.layer_norm(x + 0.3 * noise, (6,)) * 1.5
    fitted, new = slice(0, 600), slice(600, None)
    slopes = [np.polyfit(x[fitted, c], target[fitted, c], 1) for c in range(6)]
    gain, shift = (torch.tensor(np.array(slopes)[:, column]) for column in (0, 1))
    better = fit_to_predictions(x[fitted], target[fitted], linear, gain, shift)
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    wanted = target[new].numpy() @ weight.T + bias
    before, after = (
        divergence((x[new] * a + b).numpy() @ weight.T + bias, wanted) for a, b in ((gain, shift), better)
    )
    assert after < 0.9 * before


def test_the_order_of_tokens_does_not_matter():
    x, noise, linear = drawn()
    start = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    first = fit_to_predictions(x, noise, linear, *start)
    second = fit_to_predictions(x[order], noise[order], linear, *start)
    torch.testing.assert_close(first, second)


def test_what_cannot_be_improved_stays():
    x, _, linear = drawn()
    gain, shift = torch.full((6,), 1.5, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64)
    found = fit_to_predictions(x, x * gain + shift, linear, gain, shift)
    torch.testing.assert_close(found, (gain, shift), rtol=1e-6, atol=1e-6)
    one_output = nn.Linear(6, 1, dtype=torch.float64)  # a regression has no softmax
    torch.testing.assert_close(fit_to_predictions(x, 3 * x, one_output, gain, shift), (gain, shift))


@pytest.mark.parametrize(
    ("name", "norm", "linear"),
    [
        ("gpt2", "transformer.ln_f", "lm_head"),
        ("llama", "model.norm", "lm_head"),
        ("electra", "electra.encoder.layer.1.output.LayerNorm", "classifier"),
        ("vit", "vit.layernorm", "classifier"),
        ("roberta", "lm_head.layer_norm", "lm_head.decoder"),
        ("bert", None, None),  # a pooler comes between
        ("t5", "decoder.final_layer_norm", "lm_head"),  # its states are multiplied by a number first
        ("marian", "model.decoder.layers.1.final_layer_norm", "lm_head"),  # it adds a constant to them
        ("gemma2", None, None),  # it bends them
    ],
)
def test_the_linear_layer_that_predicts(name, norm, linear):
    model, batch = tiny_architecture(name)
    assert find_predictors(model, find_norms(model)) == ({} if norm is None else {norm: linear})
    if norm is None:
        return
    if name == "marian":
        model.final_logits_bias.normal_()
    seen = []
    model.get_submodule(norm).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        logits = model(**batch).logits
    found = logits_layer(model, [batch], norm, linear)(seen[0])
    torch.testing.assert_close(found[:, 0] if name == "vit" else found, logits, rtol=1e-5, atol=1e-5)


def test_the_tokens_that_predictions_are_made_of():
    vit, batch = tiny_architecture("vit")
    (tokens,) = tokens_of_predictions(vit, [batch], "vit.layernorm", "classifier")
    assert tokens.sum(-1).tolist() == [1, 1]
    assert tokens[:, 0].all()
    gpt2, batch = tiny_architecture("gpt2")
    (tokens,) = tokens_of_predictions(gpt2, [batch], "transformer.ln_f", "lm_head")
    assert tokens.shape == batch["input_ids"].shape
    assert tokens.all()
    roberta, batch = tiny_architecture("roberta")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2] = labels[1, 1] = 7
    (tokens,) = tokens_of_predictions(roberta, [{**batch, "labels": labels}], "lm_head.layer_norm", "lm_head.decoder")
    assert tokens.nonzero().tolist() == [[0, 2], [1, 1]]


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


TEXTS = [f"word{n % 9} word{n % 7} word{n % 5} word{n % 4} word{n % 11}" for n in range(200)]


def test_texts_of_a_masked_language_model_are_masked(tokenizer):
    model = tiny_model("bert", "BertForMaskedLM")
    plain = make_batches(tiny_model("bert"), TEXTS, tokenizer)
    masked = make_batches(model, TEXTS, tokenizer)
    labels = torch.cat([batch["labels"].flatten() for batch in masked])
    before, after = (torch.cat([batch["input_ids"].flatten() for batch in each]) for each in (plain, masked))
    predicted = labels != -100
    assert (labels[predicted] == before[predicted]).all()
    assert (before == after)[~predicted].all()
    assert 0.1 < predicted.sum() / 1000 < 0.2  # of 200 texts of 5 words; no special token is one of them
    assert not predicted[before < 5].any()
    assert 0.7 < (after[predicted] == tokenizer.mask_token_id).double().mean() < 0.9
    again = make_batches(model, TEXTS, tokenizer)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(masked, again, strict=True))
    assert "labels" not in plain[0]
    assert "labels" not in make_batches(tiny_model("gpt2", "GPT2LMHeadModel"), masked)[0]


def test_the_last_norm_of_a_masked_language_model_is_that_of_masked_tokens(tokenizer):
    original = stock("bert", "BertForMaskedLM")
    model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
    data = make_batches(model, TEXTS, tokenizer)
    report = calibrate(model, data)
    name, masked = "cls.predictions.transform.LayerNorm", sum(int((each["labels"] != -100).sum()) for each in data)
    assert (report[-1].name, report[-1].tokens, report[-1].is_last) == (name, masked, True)
    assert "fitted to the predictions" in str(report)
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    x = torch.cat([each[batch["labels"] != -100] for each, batch in zip(seen, data, strict=True)]).numpy()
    norm = model.get_submodule(name)
    np.testing.assert_allclose(norm.running_mean, x.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(norm.running_var, x.var(0), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_predictions_are_nearer_than_with_least_squares(monkeypatch):
    """The divergence on other data than that of the fit; least squares is what there is without a predictor."""
    original = stock("gpt2", "GPT2LMHeadModel", initializer_range=0.4, tie_word_embeddings=False)
    original.lm_head.weight[:, :2] *= 5  # a few directions decide
    data = batches(original, rows=96)
    new = [tiny_batch(original, lengths=(9, 8, 7, 6), seed=900 + n) for n in range(6)]

    def distance():
        model = swap_norm(copy.deepcopy(original), "batchnorm", where=["final"])
        calibrate(model, data, linears=False)
        found = []
        for batch in new:
            real = batch["attention_mask"].bool()
            found.append(divergence(*(each(**batch).logits[real].numpy() for each in (model, original))))
        return np.mean(found)

    fitted = distance()
    monkeypatch.setattr("hf_normswap.conversion.calibrate.find_predictors", lambda model, sites: {})
    assert fitted < 0.9 * distance()


def test_a_conversion_of_a_masked_language_model_is_measured_where_tokens_are_masked(tokenizer):
    original = tiny_model("bert", "BertForMaskedLM").eval()
    model = copy.deepcopy(original)
    report = convert_norms(model, TEXTS, tokenizer=tokenizer, holdout=0.25)
    held_out = report.norms[-1]
    assert held_out.name == "cls.predictions.transform.LayerNorm"
    assert held_out.tokens < 60
    assert report.norms[0].tokens > 200  # of every other norm it is all real tokens


def test_inference_mode_does_not_matter():
    original = stock("gpt2", "GPT2LMHeadModel")
    data, models = batches(original), []
    for is_on in (False, True):
        model = swap_norm(copy.deepcopy(original), "batchnorm", where="all")
        with torch.inference_mode(is_on):
            assert calibrate(model, data)[-1].is_last
        models.append(model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
