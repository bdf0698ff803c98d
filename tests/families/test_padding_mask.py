"""Norms that the user tells which tokens are real, and norms that cannot know it."""

import copy
import importlib.util
import threading

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_normswap import BatchNorm, measure_tid, norm_penalty, padding_mask, probe_activations, reestimate_statistics
from hf_normswap.modeling import padding_mask as mask_module
from hf_normswap.modeling.padding_mask import SCOPE, current_mask
from tests.helpers.counting import EXACT, assert_counts, assert_part_counts, swapped_model
from tests.helpers.models import FAMILIES, tiny_batch
from tests.helpers.persistence import is_one_sentence


MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]])
OTHER = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]])
STATES = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_mask_is_left_behind():
    yield
    assert SCOPE.masks == []


# What the user says


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_what_the_user_says_wins_over_the_arguments(family):
    model = swapped_model(EXACT, family)
    batch = tiny_batch(model, (5, 3), 8)
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    for given in (batch, without):
        with padding_mask(OTHER):
            assert_counts(model, given, lambda site: OTHER.bool())


def test_the_user_may_say_that_all_tokens_are_real(warnings):
    model = swapped_model(EXACT, "bert")
    batch = tiny_batch(model, (5, 3), 8)
    with padding_mask(None):
        assert_counts(model, batch, lambda site: None)
        del batch["attention_mask"]
        assert_counts(model, batch, lambda site: None)
        assert_part_counts(model, None, lambda model: model.bert.encoder(STATES))
    assert not warnings()


def test_both_stacks_are_told():
    model = swapped_model(EXACT, "marian")
    batch = tiny_batch(model, (5, 3), 8)
    target = torch.tensor([[1] * 3 + [0] * 6, [1] * 9])
    masks = {"encoder": OTHER.bool(), "decoder": target.bool()}
    with padding_mask(OTHER, decoder_mask=target):
        assert_counts(model, batch, lambda site: masks[site.stack])
    # Without a mask of its own the decoder reads the labels.
    masks["decoder"] = batch["labels"].ne(-100)
    for encoder_mask, counts in ((OTHER, OTHER.bool()), (None, None)):
        masks["encoder"] = counts
        with padding_mask(encoder_mask):
            assert_counts(model, batch, lambda site: masks[site.stack])


def test_the_stacks_of_a_pair_may_be_called_one_by_one():
    model = swapped_model(EXACT, "marian", "MarianModel")
    ids = tiny_batch(model, (5, 3), 8)["input_ids"]
    masks = {"encoder": MASK.bool(), "decoder": OTHER.bool()}

    class Pair(nn.Module):
        def forward(self, model):
            states = model.encoder(ids).last_hidden_state
            return model.decoder(ids, encoder_hidden_states=states)

    with padding_mask(MASK, OTHER):
        assert_counts(model, None, lambda site: masks[site.stack], lambda model, batch: Pair()(model))
    with padding_mask(OTHER):
        assert_part_counts(
            model, OTHER.bool(), lambda model: model.decoder(inputs_embeds=STATES, encoder_hidden_states=STATES)
        )


PARTS = {
    "bert": lambda model: model.bert.encoder(STATES),
    "roberta": lambda model: model.roberta.encoder(STATES, attention_mask=MASK[:, None, None].bool()),
    "gpt2": lambda model: model.transformer.h[1](STATES),
    "marian": lambda model: model.model.decoder.layers[0](STATES, encoder_hidden_states=STATES),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_is_called_by_itself_knows_what_it_is_told(family, warnings):
    model = swapped_model(EXACT, family)
    with padding_mask(MASK):
        assert_part_counts(model, MASK.bool(), PARTS[family])
    assert not warnings()
    assert_part_counts(model, None, PARTS[family])
    assert_part_counts(model, None, PARTS[family])
    (warning,) = warnings()
    assert "padding_mask(mask)" in warning


def test_multiple_choice_is_told_of_every_choice():
    model = swapped_model(EXACT, "bert", "BertForMultipleChoice")
    batch = tiny_batch(model, (5, 3), 8)
    mask = torch.stack([MASK, OTHER], dim=1)
    with padding_mask(mask):
        assert_counts(model, batch, lambda site: mask.bool().flatten(0, 1))


def test_the_innermost_mask_counts():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.passage = swapped_model(EXACT, "bert", "BertModel"), swapped_model(EXACT, "roberta")

        def forward(self):
            with padding_mask(OTHER[:, :5]):
                self.passage(torch.full((2, 5), 9))
            return self.query(torch.full((2, 8), 9))

    towers = Towers()

    def call(*args):
        with padding_mask(MASK):
            towers()

    assert_counts(towers.query, None, lambda site: MASK.bool(), call)
    assert_counts(towers.passage, None, lambda site: OTHER[:, :5].bool(), call)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [MASK[:, :5], MASK[:1], MASK.repeat(1, 2)], ids=["short", "rows", "long"])
def test_a_mask_that_does_not_fit_is_refused(family, mask):
    model = swapped_model(EXACT, family)
    before = copy.deepcopy(model.state_dict())
    for call in (lambda model: model(**tiny_batch(model, (5, 3), 8)), PARTS[family]):
        with padding_mask(mask), pytest.raises(ValueError, match=r"padding_mask has shape \(\d, \d+\)") as error:
            call(model)
        assert is_one_sentence(error.value)
        assert SCOPE.masks == []
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_in_evaluation_no_mask_is_asked_for():
    model = swapped_model(EXACT, "bert").eval()
    batch = tiny_batch(model, (5, 3), 8)
    expected = model(**batch).logits
    with padding_mask(MASK[:, :5]):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [MASK[0], MASK[:, None, None].bool(), [[1, 0]]], ids=["row", "who_sees_whom", "list"])
def test_what_is_no_mask_of_tokens_is_refused(mask):
    for arguments in ((mask,), (MASK, mask)):
        with pytest.raises(ValueError, match="one entry per token") as error:
            padding_mask(*arguments)
        assert is_one_sentence(error.value)


def test_an_error_inside_leaves_no_mask_behind():
    model = swapped_model(EXACT, "bert")

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(interrupt)
    batch = tiny_batch(model, (5, 3), 8)
    with pytest.raises(KeyboardInterrupt), padding_mask(MASK):
        model(**batch)
    assert SCOPE.masks == []
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    with padding_mask(OTHER):  # what the call left behind does not count, nor does it keep this mask
        assert_counts(model, batch, lambda site: OTHER.bool())
    del batch["attention_mask"]
    assert_counts(model, batch, lambda site: None)


def test_one_context_may_be_entered_again():
    context = padding_mask(MASK)
    norm = BatchNorm(16, momentum=1.0).double()
    with context:
        with context:
            norm(STATES)
        norm(STATES)
        torch.testing.assert_close(norm.running_mean, STATES[MASK.bool()].mean(0))
    norm(STATES)
    torch.testing.assert_close(norm.running_mean, STATES.mean((0, 1)))


def test_each_thread_is_told_by_itself():
    masks = []
    with padding_mask(MASK):
        thread = threading.Thread(target=lambda: masks.append(current_mask(STATES)))
        thread.start()
        thread.join()
        assert masks == [None]
        assert current_mask(STATES).equal(MASK.bool())


def test_a_second_copy_of_the_code_is_told_too():
    """Code that came from the Hub beside the weights, while the package is installed."""
    spec = importlib.util.spec_from_file_location("code_from_the_hub", mask_module.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    with padding_mask(MASK):
        assert copied.current_mask(STATES).equal(MASK.bool())
    with copied.padding_mask(OTHER):
        assert current_mask(STATES).equal(OTHER.bool())
    model = swapped_model(EXACT, "bert")
    copied.watch_masks(model)
    batch = tiny_batch(model, (5, 3), 8)
    assert_counts(model, batch, lambda site: batch["attention_mask"].bool())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_blocks_that_run_again_are_told_the_same(use_reentrant):
    """The second run is in the backward, which is no longer inside the context."""
    results = []
    for checkpointing in (False, True):
        model = swapped_model("powernorm", "bert")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        batch = tiny_batch(model, (5, 3), 8)
        for mask in (MASK, OTHER):
            with padding_mask(mask):
                loss = model(**batch).loss + norm_penalty(model)
            loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def test_compiled_code_is_told_and_does_not_compile_again():
    torch._dynamo.reset()
    block = swapped_model(EXACT, "gpt2").transformer.h[0]
    eager = copy.deepcopy(block)

    def inside(states, mask):
        with padding_mask(mask):
            return block.ln_1(states)

    around = torch.compile(block, backend="eager", fullgraph=True)
    inside = torch.compile(inside, backend="eager", fullgraph=True)
    for step, mask in enumerate((MASK, OTHER, MASK)):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"), padding_mask(mask):
            torch.testing.assert_close(around(STATES), eager(STATES))
            torch.testing.assert_close(inside(STATES, 1 - mask), eager.ln_1(STATES, 1 - mask))
        torch.testing.assert_close(dict(block.named_buffers()), dict(eager.named_buffers()))
    torch._dynamo.reset()


def test_a_compiled_part_that_does_not_know_warns_too(warnings):
    torch._dynamo.reset()
    model = swapped_model(EXACT, "gpt2")
    torch.compile(model.transformer.h[0], backend="eager", fullgraph=True)(STATES)
    assert len(warnings()) == 1
    torch._dynamo.reset()


def test_observers_in_evaluation_are_told():
    model = swapped_model("batchnorm", "bert")
    model(**tiny_batch(model))  # statistics move
    model.eval()
    batch = tiny_batch(model, (5, 3), 8, labels=False)
    ids = {"input_ids": batch["input_ids"]}
    with padding_mask(OTHER):
        assert {probe.tokens for probe in probe_activations(model, [ids])} == {int(OTHER.sum())}
        (told, *_) = measure_tid(model, [ids])
    # The norm behind the embeddings has no attention before it: there the mask matters to the norm alone.
    (expected, *_) = measure_tid(model, [{**ids, "attention_mask": OTHER}])
    assert (told.mean, told.variance) == (expected.mean, expected.variance)
    norm, inputs = model.bert.embeddings.LayerNorm, []
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with padding_mask(OTHER):
        reestimate_statistics(model, [ids])
    torch.testing.assert_close(norm.running_mean, inputs[0][OTHER.bool()].mean(0))


# Norms that cannot know it


def test_norms_without_a_model_or_without_statistics_do_not_warn(warnings):
    BatchNorm(16).double()(STATES)
    for norm in ("layernorm", "rmsnorm"):
        PARTS["bert"](swapped_model(norm, "bert"))
    PARTS["bert"](swapped_model(EXACT, "bert").eval())
    assert not warnings()


def test_an_argument_that_tells_nothing_does_not_say_that_there_is_no_padding(warnings):
    """Such as a BlockMask of flex attention."""
    model = swapped_model(EXACT, "bert")
    with pytest.raises(Exception, match="object"):  # of the attention, behind the norm of the embeddings
        model(tiny_batch(model, (5, 3), 8)["input_ids"], attention_mask=object())
    assert len(warnings()) == 1


def ids_of(model, *rows):
    return torch.tensor([[model.config.pad_token_id if token == "pad" else token for token in row] for row in rows])


def test_padding_tokens_without_a_mask_are_worth_a_warning(warnings):
    model = swapped_model(EXACT, "bert", "BertModel")
    whole, padded = ids_of(model, (7, 8, 9), (7, 6, 9)), ids_of(model, (7, 8, 9), (7, 9, "pad"))
    model(whole)
    model(padded, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    model(padded, attention_mask=torch.ones(2, 3))  # the user says so
    with padding_mask(None):
        model(padded)
    model.eval()(padded)
    assert not warnings()
    model.train()(padded)
    model(padded)
    (warning,) = warnings()
    assert "padding_mask(mask)" in warning


def test_padding_tokens_are_searched_for_in_the_first_calls_alone(warnings):
    model = swapped_model(EXACT, "roberta")
    for _ in range(12):
        model(ids_of(model, (7, 8, 9), (7, 6, 9)))
    model(ids_of(model, (7, 8, 9), (7, 6, "pad")))
    assert not warnings()
    other = swapped_model(EXACT, "roberta")
    other(ids_of(model, (7, 8, 9), (7, 6, "pad")))
    assert len(warnings()) == 1


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_padding_tokens_do_not_matter_to_norms_of_one_token(norm, warnings):
    model = swapped_model(norm, "bert")
    model(ids_of(model, (7, 8, 9), (7, 9, "pad")))
    assert not warnings()


def test_a_padding_token_that_ends_sentences_is_none_by_itself(warnings):
    model = swapped_model(EXACT, "gpt2")
    assert model.config.pad_token_id == model.config.eos_token_id
    model(ids_of(model, (7, "pad", 9, 5), (7, 6, 9, "pad")))
    assert not warnings()
    model(ids_of(model, (7, 8, 9, 5), (7, 6, "pad", "pad")))
    assert len(warnings()) == 1


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_at_the_end_of_a_packed_row_is_worth_a_warning(family, warnings):
    """No mask tells it: neither positions that start again, nor a block of pads that see each other."""
    model = swapped_model(EXACT, family)
    ids = ids_of(model, (7, 8, 9, 7, 6, "pad", "pad"))
    number = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    seen = (number[:, None] == number)[None, None]
    real = ids.ne(model.config.pad_token_id)
    for packed in ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]])}, {"attention_mask": seen}):
        transformers_logging.warning_once.cache_clear()
        before = len(warnings())
        batch = {"input_ids": ids, **packed}
        with padding_mask(real):
            assert_counts(model, batch, lambda site: real)
        assert len(warnings()) == before
        assert_counts(swapped_model(EXACT, family), batch, lambda site: None)
        assert len(warnings()) == before + 1
