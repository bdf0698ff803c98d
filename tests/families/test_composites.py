"""Swapped models inside of models that know of no norms: checkpointing switched on for the whole of them."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    RobertaModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from hf_normswap import norm_penalty, swap_norm
from tests.helpers.models import tiny_config
from tests.helpers.persistence import clone, is_one_sentence, same


_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
_VIT |= {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_to_bert(norm):
    encoder = swap_norm(BertModel(tiny_config("bert")), norm)
    decoder = BertLMHeadModel(tiny_config("bert", is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=encoder, decoder=swap_norm(decoder, norm))


def roberta_to_gpt2(norm):
    decoder = swap_norm(GPT2LMHeadModel(tiny_config("gpt2", add_cross_attention=True)), norm)
    return EncoderDecoderModel(encoder=RobertaModel(tiny_config("roberta")), decoder=decoder)


def image_to_gpt2(norm):
    decoder = swap_norm(GPT2LMHeadModel(tiny_config("gpt2", add_cross_attention=True)), norm)
    return VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**_VIT)), decoder=decoder)


def build(make, norm):
    torch.manual_seed(0)
    model = make(norm).train()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def batch_for(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 38, (3, 6), generator=generator)
    if isinstance(model, VisionEncoderDecoderModel):
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator), "labels": ids}
    return {"input_ids": ids.flip(1), "labels": ids}


def step(model):
    (model(**batch_for(model), use_cache=False).loss + norm_penalty(model)).backward()
    return clone((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("norm", ["batchnorm", "rbn", "powernorm", "pnv", "rmsnorm"])
@pytest.mark.parametrize("make", [bert_to_bert, roberta_to_gpt2, image_to_gpt2])
def test_checkpointing_through_the_whole_model(make, norm):
    plain, model = build(make, norm), build(make, norm)
    model.activation_checkpointing_enable({"use_reentrant": False})
    expected, gradients = step(plain), step(model)
    assert same(gradients, expected)
    assert same(model.state_dict(), plain.state_dict())  # statistics, updated once


def test_reentrant_checkpointing_through_the_whole_model():
    plain, model = (build(bert_to_bert, "batchnorm") for _ in range(2))
    model.activation_checkpointing_enable({"use_reentrant": True})
    expected, gradients = step(plain), step(model)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    assert same(dict(model.named_buffers()), dict(plain.named_buffers()))
    other = build(bert_to_bert, "rbn")
    other.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="'use_reentrant': False") as caught:
        step(other)
    assert is_one_sentence(caught.value)


def test_switched_off_and_on_again():
    plain, model = (build(bert_to_bert, "batchnorm") for _ in range(2))
    for each in (plain, model):
        step(each)
    model.activation_checkpointing_enable({"use_reentrant": False})
    step(model)
    model.activation_checkpointing_disable()
    step(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        step(plain)
    step(model)
    step(plain)
    assert same(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_in_a_module_of_the_user():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build(bert_to_bert, "batchnorm")

    pair = Pair()
    twin = copy.deepcopy(pair.model)
    pair.model.activation_checkpointing_enable({"use_reentrant": False})
    assert same(step(pair.model), step(twin))
