"""Models inside of other models know what the model around them was given."""

import pytest
import torch
from torch import nn
from transformers import (
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
    EncoderDecoderModel,
    GPT2LMHeadModel,
    RobertaForCausalLM,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

from hf_normswap import padding_mask, swap_norm
from hf_normswap.modeling.padding_mask import SCOPE, current_mask, watch_masks
from tests.helpers.counting import EXACT, assert_counts, swapped_model
from tests.helpers.models import tiny_batch, tiny_config


MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]])
OTHER = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]])


@pytest.fixture(autouse=True)
def no_mask_is_left_behind():
    yield
    assert SCOPE.masks == []


class Pooler(BertPreTrainedModel):
    """A model of the user, which needs the mask for itself and does not hand it on."""

    def __init__(self, config, bert=None):
        super().__init__(config)
        self.bert = BertModel(config) if bert is None else bert
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.read(input_ids)
        weights = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return (states * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)

    def read(self, input_ids):
        return self.bert(input_ids).last_hidden_state


class PoolerOfEmbeddings(Pooler):
    def read(self, input_ids):
        return self.bert(inputs_embeds=self.bert.get_input_embeddings()(input_ids)).last_hidden_state


class PoolerOfNoise(Pooler):
    def read(self, input_ids):
        return self.bert((input_ids + 1) % 40).last_hidden_state


class PoolerWithItsOwnAttention(Pooler):
    def read(self, input_ids):
        return self.bert(input_ids, torch.ones(2, 1, 8, 8, dtype=torch.bool)).last_hidden_state


POOLERS = [Pooler, PoolerOfEmbeddings, PoolerOfNoise, PoolerWithItsOwnAttention]


def assert_inside_counts(model, bert):
    batch = tiny_batch(bert, (5, 3), 8)
    for mask in (MASK, OTHER):  # the first call is like all others
        batch["attention_mask"] = mask
        assert_counts(bert, batch, lambda site, mask=mask: mask.bool(), lambda _, batch: model(**batch))
        with padding_mask(1 - mask):
            assert_counts(bert, batch, lambda site, mask=mask: mask.eq(0), lambda _, batch: model(**batch))
    del batch["attention_mask"]
    assert_counts(bert, batch, lambda site: None, lambda _, batch: model(**batch))


@pytest.mark.parametrize("cls", POOLERS)
def test_a_part_that_was_swapped_before(cls):
    bert = swapped_model(EXACT, "bert", "BertModel")
    assert_inside_counts(cls(tiny_config("bert"), bert).double().train(), bert)


@pytest.mark.parametrize("cls", POOLERS)
def test_a_part_that_was_swapped_in_its_place(cls):
    model = cls(tiny_config("bert")).double().train()
    assert_inside_counts(model, swap_norm(model.bert, EXACT, where="all"))


@pytest.mark.parametrize("cls", POOLERS)
def test_a_model_of_the_user_that_was_swapped(cls):
    model = swap_norm(cls(tiny_config("bert")).double().train(), EXACT, where="all")
    assert_inside_counts(model, model.bert)


def test_a_part_of_a_part():
    bert = swapped_model(EXACT, "bert", "BertModel")

    class Outer(Pooler):
        def read(self, input_ids):
            return self.bert(input_ids).unsqueeze(1)

    model = Outer(tiny_config("bert"), Pooler(tiny_config("bert"), bert)).double().train()
    assert_inside_counts(model, bert)


@pytest.mark.slow
@pytest.mark.parametrize("swap", ["whole", "part"])
def test_a_model_that_is_compiled(swap):
    """A part that was swapped by itself knows the model around it from their first call, which is not compiled."""
    torch._dynamo.reset()
    model = PoolerOfEmbeddings(tiny_config("bert", num_hidden_layers=1)).double().train()
    swap_norm(model if swap == "whole" else model.bert, EXACT, where="all")
    batch = {"input_ids": torch.full((2, 8), 9), "attention_mask": MASK}
    model(**batch)
    expected = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    model(batch["input_ids"], OTHER)
    torch.compile(model, backend="eager", fullgraph=True)(**batch)
    results = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
    torch.testing.assert_close(results, expected)
    torch._dynamo.reset()


def test_a_mask_that_is_said_inside_wins():
    class Telling(Pooler):
        def read(self, input_ids):
            with padding_mask(OTHER):
                return self.bert(input_ids).last_hidden_state

    bert = swapped_model(EXACT, "bert", "BertModel")
    model = Telling(tiny_config("bert"), bert).double().train()
    batch = tiny_batch(bert, (5, 3), 8)
    for _ in range(2):
        with padding_mask(MASK):
            assert_counts(bert, batch, lambda site: OTHER.bool(), lambda _, batch: model(**batch))


def test_a_module_around_that_gives_no_mask_is_worth_a_warning(warnings):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = swapped_model(EXACT, "bert", "BertModel")

        def forward(self, input_ids, attention_mask):
            return self.encoder(input_ids).last_hidden_state * attention_mask.unsqueeze(-1)

    tagger = Tagger()
    batch = tiny_batch(tagger.encoder, (5, 3), 8)
    mask = batch["attention_mask"].bool()
    with padding_mask(mask):
        assert_counts(tagger.encoder, batch, lambda site: mask, lambda _, batch: tagger(**batch))
    assert not warnings()
    assert_counts(tagger.encoder, batch, lambda site: None, lambda _, batch: tagger(**batch))
    assert len(warnings()) == 1


def test_other_tokens_have_another_mask(warnings):
    class Shorter(Pooler):
        def read(self, input_ids):
            return self.bert(input_ids[:, :6]).last_hidden_state.mean(1, keepdim=True)

    bert = swapped_model(EXACT, "bert", "BertModel")
    model = Shorter(tiny_config("bert"), bert).double().train()
    batch = tiny_batch(bert, (5, 3), 8)
    assert_counts(bert, batch, lambda site: None, lambda _, batch: model(**batch))
    assert len(warnings()) == 1


def test_a_decoder_does_not_take_the_mask_of_what_it_attends_to():
    """Source and target have the same shape, and the model around does not say which of its parts is a decoder."""

    class Translator(Pooler):
        def __init__(self, config, bert, decoder):
            super().__init__(config, bert)
            self.writer = decoder

        def read(self, input_ids):
            states = self.bert(input_ids).last_hidden_state
            self.writer(torch.full((2, 8), 9), encoder_hidden_states=states)
            return states

    bert = swapped_model(EXACT, "bert", "BertModel")
    decoder = swapped_model(EXACT, "bert", "BertLMHeadModel", add_cross_attention=True)
    model = Translator(tiny_config("bert"), bert, decoder).double().train()
    batch = tiny_batch(bert, (5, 3), 8)
    assert_counts(bert, batch, lambda site: batch["attention_mask"].bool(), lambda _, batch: model(**batch))
    assert_counts(decoder, batch, lambda site: None, lambda _, batch: model(**batch))


# Two models as encoder and decoder of one

_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
_VIT |= {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_to_bert():
    decoder = BertLMHeadModel(tiny_config("bert", is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=BertModel(tiny_config("bert")), decoder=decoder)


def roberta_to_roberta():
    decoder = RobertaForCausalLM(tiny_config("roberta", is_decoder=True, add_cross_attention=True))
    return EncoderDecoderModel(encoder=RobertaModel(tiny_config("roberta")), decoder=decoder)


def bert_to_gpt2():
    decoder = GPT2LMHeadModel(tiny_config("gpt2", add_cross_attention=True))
    return EncoderDecoderModel(encoder=BertModel(tiny_config("bert")), decoder=decoder)


def image_to_gpt2():
    decoder = GPT2LMHeadModel(tiny_config("gpt2", add_cross_attention=True))
    return VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**_VIT)), decoder=decoder)


TEXT_TO_TEXT = [bert_to_bert, roberta_to_roberta, bert_to_gpt2]
EVERY = [*TEXT_TO_TEXT, image_to_gpt2]
START, END = 3, 4


def build(make, norm="batchnorm", watched=False):
    torch.manual_seed(0)
    model = make().double().train()
    for part in (model.encoder, model.decoder):
        if not isinstance(part, ViTModel):
            swap_norm(part, norm, where="all")
    if watched:
        watch_masks(model)
    model.config.decoder_start_token_id, model.config.eos_token_id = START, END
    model.config.pad_token_id = model.config.decoder.pad_token_id
    return model


def batch_for(model, columns, source_columns=8):
    """Targets of 5 and 3 tokens and their ends, in so many columns; as many columns of the source as they say."""
    labels = torch.full((2, columns), -100)
    labels[0, :6], labels[1, :4] = torch.tensor([11, 12, 13, 14, 15, END]), torch.tensor([21, 22, 23, END])
    if isinstance(model, VisionEncoderDecoderModel):
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"pixel_values": pixels, "labels": labels}
    mask = nn.functional.pad(MASK, (0, source_columns - 8))
    ids = torch.arange(5, 5 + source_columns).repeat(2, 1).masked_fill(mask.eq(0), model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_labels(model, batch):
    return model(**batch, use_cache=False)


def with_ids(model, batch):
    """As a trainer with label smoothing calls the model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return model(**inputs, decoder_input_ids=ids, use_cache=False)


def with_mask(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return model(**inputs, decoder_input_ids=ids, decoder_attention_mask=batch["labels"].ne(-100), use_cache=False)


CALLS = [with_labels, with_ids, with_mask]


def statistics(model, batches, call=with_labels):
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", EVERY)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_columns_of_padding_do_not_matter(make, call, watched):
    """The reference has no column of padding more than the longest row needs, and says what the padding is."""
    expected = build(make)
    mask = batch_for(expected, 6)["labels"].ne(-100)
    source = None if make is image_to_gpt2 else MASK
    with padding_mask(source, mask):
        expected = statistics(expected, [batch_for(expected, 6)] * 2)
    model = build(make, watched=watched)
    torch.testing.assert_close(statistics(model, [batch_for(model, 9, 10)] * 2, call), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", TEXT_TO_TEXT)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_special_tokens_may_be_those_of_the_decoder(make):
    model, other = build(make), build(make)
    batch = batch_for(model, 9)
    ids = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
    for name in ("pad_token_id", "eos_token_id"):
        setattr(other.config.decoder, name, getattr(model.config, name))
        setattr(other.config, name, None)
    batch["decoder_input_ids"] = ids
    torch.testing.assert_close(statistics(other, [batch]), statistics(model, [batch]))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("make", TEXT_TO_TEXT)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_encoder_does_not_take_the_mask_of_the_decoder(make, watched):
    """Source and target have the same shape, and only the target tells its padding."""
    model = build(make, EXACT, watched)
    batch = batch_for(model, 8)
    del batch["attention_mask"]
    batch["input_ids"] = torch.arange(5, 13).repeat(2, 1)
    assert_counts(model.encoder, batch, lambda site: None, lambda _, batch: with_labels(model, batch))
    real = batch["labels"].ne(-100)
    assert_counts(model.decoder, batch, lambda site: real, lambda _, batch: with_labels(model, batch))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pair_is_told():
    model = build(bert_to_gpt2, EXACT)
    batch = batch_for(model, 8)
    for _ in range(2):
        for part, mask in ((model.encoder, OTHER.bool()), (model.decoder, MASK.bool())):
            with padding_mask(OTHER, MASK):
                assert_counts(part, batch, lambda site, mask=mask: mask, lambda _, batch: with_labels(model, batch))
        with padding_mask(OTHER):
            real = batch["labels"].ne(-100)
            assert_counts(model.decoder, batch, lambda site, real=real: real, lambda _, b: with_labels(model, b))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_blocks_of_a_pair_that_run_again(use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = build(bert_to_bert, "powernorm")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        for columns in (7, 9):
            with_labels(model, batch_for(model, columns)).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({**gradients, **dict(model.named_buffers())})
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [True, False])
def test_both_stacks_of_t5_are_of_one_class(masked):
    """What the encoder and the decoder know is seen at their norms, which are not swapped."""
    size = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**size, decoder_start_token_id=0))
    watch_masks(model)
    seen = {}
    for stack in ("encoder", "decoder"):
        getattr(model, stack).final_layer_norm.register_forward_pre_hook(
            lambda module, args, stack=stack: seen.update({stack: current_mask(args[0])})
        )
    labels = torch.full((2, 8), 9).masked_fill(OTHER.eq(0), -100)
    model(input_ids=torch.full((2, 8), 7), labels=labels, **({"attention_mask": MASK} if masked else {}))
    assert seen["decoder"].equal(OTHER.bool())
    assert seen["encoder"].equal(MASK.bool()) if masked else seen["encoder"] is None
