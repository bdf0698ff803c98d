"""Attention to the last tokens alone, against a mask of four dimensions made by hand."""

import pytest
import torch

from hf_normswap import swap_norm
from recipes.ngram import limit_attention
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import is_one_sentence


FAMILIES = ["gpt2", "marian"]


def model_and_batch(family):
    model = tiny_model(family).eval()
    model.set_attn_implementation("sdpa")
    return model, tiny_batch(model, lengths=(9, 9, 9))


@torch.no_grad()
def logits(model, batch, **more):
    return model(**batch, **more).logits


@pytest.mark.parametrize("more", [0, 1, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_limit_as_long_as_the_text_changes_no_bit(family, more):
    model, batch = model_and_batch(family)
    before = logits(model, batch)
    limit_attention(model, before.shape[1] + more)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_window_is_that_of_a_mask_by_hand(size):
    model, batch = model_and_batch("gpt2")
    rows, length = batch["input_ids"].shape
    query, key = torch.arange(length)[:, None], torch.arange(length)
    window = (key <= query) & (key > query - size)
    by_hand = logits(model, {**batch, "attention_mask": window.expand(rows, 1, length, length)})
    plain = logits(model, batch)
    limit_attention(model, size)
    torch.testing.assert_close(logits(model, batch), by_hand)
    assert not torch.allclose(by_hand, plain)


def test_only_the_decoder_of_a_translation_model_is_limited():
    model, batch = model_and_batch("marian")
    with torch.no_grad():
        encoded = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    plain = logits(model, batch)
    limit_attention(model, 2)
    with torch.no_grad():
        again = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    limited = logits(model, batch)
    assert torch.equal(encoded, again)
    torch.testing.assert_close(limited[:, :2], plain[:, :2])  # the first two see all that there is
    assert not torch.allclose(limited[:, 4:], plain[:, 4:])
    # A change of the last word of the source reaches every token of the target, through the cross-attention.
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 8] = 7 + (other["input_ids"][:, 8] == 7).long()
    assert not torch.isclose(logits(model, other), limited).all(-1).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_writes_what_it_writes_without(family):
    model, batch = model_and_batch(family)
    swap_norm(model, "rmsnorm")
    limit_attention(model, 3)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    with_cache, without = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_what_cannot_be_limited_is_refused():
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    for size, said in ((0, "1 or more"), (4, "sdpa")):
        with pytest.raises(ValueError, match=said) as caught:
            limit_attention(model, size)
        assert is_one_sentence(caught.value)
