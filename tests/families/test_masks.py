"""The padding mask reaches every norm of every model: neither the amount of padding nor its content matters."""

import functools
import threading

import pytest
import torch
from torch import nn

from hf_normswap import BatchNorm, find_norms, norm_penalty
from hf_normswap.modeling.padding_mask import SCOPE, current_mask
from tests.helpers.counting import EXACT, SPELLINGS, assert_counts, swapped_model
from tests.helpers.models import FAMILIES, all_heads, tiny_batch


NORMS = ["batchnorm", "rbn", "powernorm", "pnv"]
# These read the first column.
READS_FIRST_TOKEN = (
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "RobertaForMultipleChoice",
    "RobertaForSequenceClassification",
)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True)
def no_mask_is_left_behind():
    yield
    assert SCOPE.masks == []


def positions_of(model, mask):
    """Position ids that count the real tokens, as left padding needs them."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0).flatten(0, -2)
    return positions + 2 if model.config.model_type.endswith("roberta") else positions


def make_batch(model, padding_side="right", extra=0, filler=None, seed=0, lengths=(5, 3)):
    batch = tiny_batch(model, lengths, max(lengths) + extra, padding_side, filler, seed=seed)
    if type(model).__name__.endswith("QuestionAnswering"):
        # Their loss is a softmax over all positions, padded or not.
        batch = {name: value for name, value in batch.items() if not name.endswith("_positions")}
    if padding_side == "left":
        batch["position_ids"] = positions_of(model, batch["attention_mask"])
    return batch


def real_targets(batch):
    """Mask of the decoder's tokens, known by how [`tiny_batch`] makes them."""
    if "labels" in batch:
        return batch["labels"].ne(-100)
    lengths = batch["attention_mask"].sum(-1).flip(0) + 1
    return torch.arange(batch["decoder_input_ids"].shape[-1]) < lengths.unsqueeze(-1)


def outputs_at_real_tokens(model, batch, output):
    """The model's outputs by name: one row for each real token, or the whole where an output is of the sequence."""
    source = batch["attention_mask"].bool()
    selected = {}
    for name, value in output.items():
        if not isinstance(value, torch.Tensor) or name == "loss":
            continue
        is_target = model.config.is_encoder_decoder and not name.startswith("encoder")
        mask = real_targets(batch) if is_target else source
        if value.shape[: mask.dim()] == mask.shape:
            selected[name] = value[mask]
        elif batch.get("position_ids") is None or name != "pooler_output":
            selected[name] = value
    assert selected
    return selected


def train_step(model, batch, call=None):
    """Outputs at real tokens, loss, penalty and gradients, and the buffers after the step."""
    model.zero_grad()
    output = call(model, batch) if call else model(**batch)
    selected = outputs_at_real_tokens(model, batch, output)
    penalty = norm_penalty(model)
    # A loss on every output, beside that of the head, where a head has one.
    generator = torch.Generator().manual_seed(0)
    loss = penalty + sum(
        (value * torch.randn(value.shape, dtype=value.dtype, generator=generator)).mean()
        for name, value in selected.items()
        if name != "pooler_output"
    )
    if output.get("loss") is not None:
        selected["loss"] = output["loss"]
        if selected["loss"].dtype == torch.float64:  # some heads compute theirs in float32
            loss = loss + selected["loss"]
    loss.backward()
    results = {**selected, "penalty": penalty}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    results |= dict(model.named_buffers())
    return {name: value.detach().clone() for name, value in results.items()}


def assert_same(expected, results):
    for name, value in expected.items():
        if name in results:
            tolerance = {"rtol": 1e-6, "atol": 1e-6} if value.dtype == torch.float32 else CLOSE
            torch.testing.assert_close(
                results[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert expected.keys() - results.keys() <= {"pooler_output"}


@functools.cache
def expected_steps(norm, family, head):
    model = swapped_model(norm, family, head)
    return [train_step(model, make_batch(model, seed=seed)) for seed in range(2)]


def layouts(family, head):
    # GPT-2 finds the end of a sequence by the padding token.
    filler = None if head == "GPT2ForSequenceClassification" else 7
    yield "right", filler
    if head not in READS_FIRST_TOKEN and family != "marian":  # Marian has no position ids
        yield "left", filler


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("family", "head", "side", "filler"),
    [(family, head, *layout) for family, head in all_heads() for layout in layouts(family, head)],
    ids=lambda value: str(value),
)
def test_padding_does_not_matter(family, head, side, filler, norm):
    model = swapped_model(norm, family, head)
    for seed, expected in enumerate(expected_steps(norm, family, head)):
        results = train_step(model, make_batch(model, side, extra=3, filler=filler, seed=seed))
        assert_same(expected, results)


# Which tokens each norm counts, by what went into it


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_every_norm_counts_the_real_tokens(family):
    model = swapped_model(EXACT, family)
    batch = tiny_batch(model, (5, 3), 8)
    assert_counts(model, batch, lambda site: batch["attention_mask"].bool())


def without_labels(model, batch):
    """As a trainer with label smoothing calls the model: the labels are gone, the decoder's inputs are given."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch["labels"]))


def with_decoder_mask(model, batch):
    return model(**batch, decoder_attention_mask=batch["labels"].ne(-100).long())


def with_decoder_mask_alone(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    # Whatever stands at the pads, the mask decides.
    mask = batch["labels"].ne(-100)
    return model(**inputs, decoder_input_ids=ids.masked_fill(~mask, 9), decoder_attention_mask=mask.long())


def with_labels(model, batch):
    return model(**batch)


MARIAN_CALLS = [with_labels, without_labels, with_decoder_mask, with_decoder_mask_alone]


@pytest.mark.parametrize("call", MARIAN_CALLS)
def test_marian_decoder_norms_count_the_targets(call):
    model = swapped_model(EXACT, "marian")
    batch = tiny_batch(model, (5, 3), 8)
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"].ne(-100)}
    assert {site.sublayer for site in find_norms(model)} == {"attention", "cross_attention", "ffn"}
    assert_counts(model, batch, lambda site: masks[site.stack], call)


def test_marian_labels_decide_over_what_the_decoder_is_fed():
    """Targets of two sentences: the first one's end is fed to the decoder, and predicts the second one's start."""
    model = swapped_model(EXACT, "marian")
    batch = tiny_batch(model, (5, 3), 8)
    batch["labels"][1, 2] = model.config.eos_token_id
    real = batch["labels"].ne(-100)
    assert_counts(model, batch, lambda site: real if site.stack == "decoder" else batch["attention_mask"].bool())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("call", MARIAN_CALLS[1:])
def test_marian_trains_alike_however_its_targets_are_given(call, norm):
    models = [swapped_model(norm, "marian") for _ in range(2)]
    for seed in range(2):
        batch = tiny_batch(models[0], (5, 3), 7, seed=seed)

        def without_loss(model, batch, call):
            return {name: value for name, value in call(model, batch).items() if name != "loss"}

        expected, results = (
            train_step(model, batch, functools.partial(without_loss, call=how))
            for model, how in zip(models, (with_labels, call), strict=True)
        )
        assert_same(expected, results)


def test_marian_base_model_counts_the_start_token():
    """Decoding starts with the padding token, which is real there."""
    model = swapped_model(EXACT, "marian", "MarianModel")
    batch = tiny_batch(model, (5, 3), 8)
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": real_targets(batch)}
    assert batch["decoder_input_ids"][:, 0].eq(model.config.pad_token_id).all()
    assert_counts(model, batch, lambda site: masks[site.stack])


def test_marian_encoder_outputs_may_be_given():
    model = swapped_model(EXACT, "marian")
    batch = tiny_batch(model, (5, 3), 8)
    with torch.no_grad():
        encoded = model.get_encoder()(batch.pop("input_ids"), attention_mask=batch["attention_mask"])
    batch["encoder_outputs"] = encoded
    assert_counts(model, batch, lambda site: batch["labels"].ne(-100), stacks=["decoder"])


def test_marian_stacks_may_be_called_alone():
    model = swapped_model(EXACT, "marian", "MarianModel")
    batch = tiny_batch(model, (5, 3), 8)
    mask = batch["attention_mask"].bool()
    ids = batch["input_ids"]
    assert_counts(
        model, batch, lambda site: mask, lambda model, batch: model.encoder(ids, attention_mask=mask), ["encoder"]
    )
    states = torch.randn(2, 8, 16, dtype=torch.float64)
    for given in (mask, None):
        assert_counts(
            model,
            batch,
            lambda site, given=given: given,
            lambda model, batch, given=given: model.decoder(ids, attention_mask=given, encoder_hidden_states=states),
            ["decoder"],
        )


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta"])
def test_cross_attention_norms_are_the_decoders(family):
    head = {"bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    model = swapped_model(EXACT, family, head, add_cross_attention=True)
    assert any(site.sublayer == "cross_attention" for site in find_norms(model))
    batch = tiny_batch(model, (5, 3), 8)
    # As many encoder states as target tokens, so that a wrong mask would fit, with other padding.
    states = torch.randn(2, 8, 16, dtype=torch.float64)
    encoder_mask = torch.tensor([[1] * 2 + [0] * 6, [1] * 8])
    assert_counts(
        model,
        batch,
        lambda site: batch["attention_mask"].bool(),
        lambda model, batch: model(**batch, encoder_hidden_states=states, encoder_attention_mask=encoder_mask),
    )


def test_multiple_choice_counts_the_tokens_of_every_choice():
    model = swapped_model(EXACT, "bert", "BertForMultipleChoice")
    batch = tiny_batch(model, (5, 3), 8)
    batch["attention_mask"][0, 1, 4:] = 0  # the choices differ in length
    assert_counts(model, batch, lambda site: batch["attention_mask"].bool().flatten(0, 1))


@pytest.mark.parametrize("family", ["bert", "roberta", "marian"])
def test_mask_may_be_positional(family):
    model = swapped_model(EXACT, family, "MarianModel" if family == "marian" else None)
    batch = tiny_batch(model, (5, 3), 8)
    masks = {"encoder": batch["attention_mask"].bool()}
    arguments = [batch["input_ids"], batch["attention_mask"]]
    if family == "marian":
        arguments.append(batch["decoder_input_ids"])
        masks["decoder"] = real_targets(batch)
    assert_counts(model, batch, lambda site: masks[site.stack], lambda model, batch: model(*arguments))


def test_mask_may_be_positional_after_the_cache():
    model = swapped_model(EXACT, "gpt2")
    batch = tiny_batch(model, (5, 3), 8)
    mask = batch["attention_mask"]
    assert_counts(model, batch, lambda site: mask.bool(), lambda model, batch: model(batch["input_ids"], None, mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.long])
def test_mask_may_be_of_any_type(dtype):
    model = swapped_model(EXACT, "bert")
    batch = tiny_batch(model, (5, 3), 8)
    mask = batch["attention_mask"].bool()
    batch["attention_mask"] = mask.to(dtype)
    assert_counts(model, batch, lambda site: mask)


def test_embeddings_may_be_given_for_ids():
    model = swapped_model(EXACT, "bert")
    batch = tiny_batch(model, (5, 3), 8)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_counts(model, batch, lambda site: batch["attention_mask"].bool())


# Masks of who sees whom, (B, heads, queries, keys)


def for_each_head(seen):
    """Each head sees a part of the tokens: together they see all that may be seen."""
    keys = torch.arange(seen.shape[-1])
    heads = torch.stack([keys % 4 != head for head in range(4)])
    return seen & heads[:, None, :]


def who_sees_whom(mask, causal):
    queries = mask.shape[-1]
    seen = mask.bool()[:, None, None, :].expand(-1, 1, queries, -1)
    return seen & torch.ones(queries, queries, dtype=torch.bool).tril() if causal else seen


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("family", "head", "side"),
    [
        ("bert", "BertForTokenClassification", "right"),
        ("roberta", None, "left"),
        ("bert", "BertLMHeadModel", "left"),
        ("gpt2", None, "left"),
        ("gpt2", None, "right"),
    ],
)
def test_masks_of_who_sees_whom_tell_the_padding(family, head, side, spelling):
    """They are the 2-dimensional mask in another form: outputs, gradients and statistics are the same."""
    causal = family == "gpt2" or head == "BertLMHeadModel"

    def call(model, batch):
        seen = who_sees_whom(batch["attention_mask"], causal)
        return model(**{**batch, "attention_mask": SPELLINGS[spelling](seen)})

    models = [swapped_model("powernorm", family, head) for _ in range(2)]
    for seed in range(2):
        batch = make_batch(models[0], side, extra=3, filler=7, seed=seed)
        assert_same(train_step(models[0], batch), train_step(models[1], batch, call))


def test_a_mask_of_each_head_tells_the_padding_together_with_the_others():
    model = swapped_model(EXACT, "bert")
    batch = tiny_batch(model, (5, 3), 8)
    mask = batch["attention_mask"]
    batch["attention_mask"] = for_each_head(who_sees_whom(mask, causal=False))
    assert_counts(model, batch, lambda site: mask.bool())


@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_masks_of_who_sees_whom_may_be_numbers(dtype):
    model = swapped_model(EXACT, "bert", attn_implementation="eager")
    batch = tiny_batch(model, (5, 3), 8)
    mask = batch["attention_mask"]
    batch["attention_mask"] = who_sees_whom(mask, causal=False).to(dtype)
    assert_counts(model, batch, lambda site: mask.bool())


def test_one_mask_of_who_sees_whom_may_be_for_all_rows():
    model = swapped_model(EXACT, "gpt2")
    batch = tiny_batch(model, (5, 5), 8, padding_side="left")
    mask = batch["attention_mask"]
    batch["attention_mask"] = who_sees_whom(mask[:1], causal=True)
    assert_counts(model, batch, lambda site: mask.bool())


def test_both_stacks_take_masks_of_who_sees_whom():
    model = swapped_model(EXACT, "marian")
    batch = tiny_batch(model, (5, 3), 8)
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"].ne(-100)}
    ids = model.prepare_decoder_input_ids_from_labels(batch.pop("labels"))
    batch["attention_mask"] = who_sees_whom(masks["encoder"], causal=False)[:, :, -1:]  # the decoder reads it too
    batch |= {"decoder_input_ids": ids, "decoder_attention_mask": who_sees_whom(masks["decoder"], causal=True)}
    assert_counts(model, batch, lambda site: masks[site.stack])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_masks_that_hide_no_token_from_all_count_every_token(family):
    model = swapped_model(EXACT, family)
    batch = tiny_batch(model, (5, 3), 8)
    batch["attention_mask"] = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    assert_counts(model, batch, lambda site: None)


def test_with_a_cache_the_last_keys_count():
    model = swapped_model(EXACT, "gpt2")
    batch = tiny_batch(model, (5, 3), 8, padding_side="left", labels=False)
    mask = batch["attention_mask"]
    seen = who_sees_whom(mask, causal=True)
    with torch.no_grad():
        cache = model(batch["input_ids"][:, :4], attention_mask=seen[:, :, :4, :4]).past_key_values
    assert_counts(
        model,
        batch,
        lambda site: mask[:, 4:].bool(),
        lambda model, batch: model(batch["input_ids"][:, 4:], attention_mask=seen[:, :, 4:], past_key_values=cache),
    )


def pack(model, lengths, columns):
    """Sentences one behind the other in one row with padding at its end, and the same as rows of their own."""
    batch = tiny_batch(model, lengths, labels=False)
    mask = batch["attention_mask"].bool()
    tail = columns - int(mask.sum())
    start = positions_of(model, torch.ones(1, 1)).long()
    positions = torch.cat([start[0] + torch.arange(length) for length in lengths])
    number = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])
    seen = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
    packed = {
        "input_ids": nn.functional.pad(batch["input_ids"][mask], (0, tail), value=model.config.pad_token_id)[None],
        "position_ids": nn.functional.pad(positions, (0, tail), value=int(start))[None],
        "attention_mask": nn.functional.pad(seen, (0, tail, 0, tail))[None, None],
    }
    return batch, packed


@pytest.mark.parametrize("norm", ["batchnorm", "powernorm"])
@pytest.mark.parametrize(
    ("family", "head"), [("gpt2", "GPT2Model"), ("bert", "BertLMHeadModel"), ("roberta", "RobertaForCausalLM")]
)
def test_packed_rows_count_as_the_sentences_in_them(family, head, norm):
    models = [swapped_model(norm, family, head) for _ in range(2)]
    batch, packed = pack(models[0], (5, 3, 4), columns=16)
    with torch.no_grad():
        expected, result = models[0](**batch)[0], models[1](**packed)[0]
    torch.testing.assert_close(result[0, :12], expected[batch["attention_mask"].bool()], **CLOSE)
    for name, buffer in models[0].named_buffers():
        torch.testing.assert_close(dict(models[1].named_buffers())[name], buffer, **CLOSE, msg=name)


def test_a_mask_is_on_the_device_of_the_tokens():
    """As in a model whose blocks are on several devices."""
    model = swapped_model(EXACT, "bert", "BertModel")
    seen = []

    def look(module, args):
        seen.append(current_mask(args[0].to("meta")).device.type)

    model.encoder.layer[1].output.LayerNorm.register_forward_pre_hook(look)
    model(**tiny_batch(model, (5, 3), 8))
    assert seen == ["meta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask_every_token_counts(family):
    model = swapped_model(EXACT, family)
    batch = tiny_batch(model, (5, 3), 8)
    del batch["attention_mask"]
    # The targets say themselves which of them are real.
    masks = {"decoder": batch["labels"].ne(-100)} if family == "marian" else {}
    assert_counts(model, batch, lambda site: masks.get(site.stack))


def test_with_a_cache_the_last_columns_count():
    model = swapped_model(EXACT, "gpt2")
    batch = tiny_batch(model, (5, 3), 8, padding_side="left", labels=False)
    with torch.no_grad():
        cache = model(batch["input_ids"][:, :4], attention_mask=batch["attention_mask"][:, :4]).past_key_values
    mask = batch["attention_mask"]
    assert_counts(
        model,
        batch,
        lambda site: mask[:, 4:].bool(),
        lambda model, batch: model(batch["input_ids"][:, 4:], attention_mask=mask, past_key_values=cache),
    )


def test_a_swapped_model_inside_a_module_of_ones_own():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = swapped_model(EXACT, "bert", "BertModel")
            self.head = nn.Linear(16, 2).double()

        def forward(self, ids, padding):
            return self.head(self.encoder(ids, padding).last_hidden_state)

    tagger = Tagger()
    batch = tiny_batch(tagger.encoder, (5, 3), 8)
    mask = batch["attention_mask"]
    assert_counts(
        tagger.encoder, batch, lambda site: mask.bool(), lambda model, batch: tagger(batch["input_ids"], mask)
    )


def test_an_error_leaves_no_mask_behind():
    model = swapped_model("batchnorm", "marian")
    batch = tiny_batch(model)

    def fail(module, args):
        raise ZeroDivisionError

    handle = model.model.decoder.layers[1].final_layer_norm.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    assert SCOPE.masks == []
    handle.remove()
    model(**batch)


def test_an_interrupted_call_leaves_no_mask_for_the_next():
    """Ctrl-C in a notebook, and the cell is run again: hooks after a forward do not run then."""
    model = swapped_model(EXACT, "marian")
    first, second = (tiny_batch(model, lengths, 6) for lengths in ((5, 3), (2, 6)))

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.model.decoder.layers[1].final_layer_norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**first)
    handle.remove()
    del second["labels"]
    targets = torch.randint(5, 9, (2, 7))
    masks = {"encoder": second["attention_mask"].bool(), "decoder": torch.ones(2, 7, dtype=torch.bool)}
    try:
        assert_counts(
            model,
            second,
            lambda site: masks[site.stack],
            lambda model, batch: model(**batch, decoder_input_ids=targets),
        )
    finally:
        SCOPE.masks.clear()


def test_two_threads_that_train_at_once_keep_their_masks_apart():
    """Every norm of one thread waits for the same norm of the other: the two forwards are as entangled as can be."""
    batches = [
        tiny_batch(swapped_model(EXACT, "bert"), lengths, 6, seed=seed)
        for seed, lengths in enumerate([(5, 3), (2, 6)])
    ]
    expected, results = [], [None, None]
    for batch in batches:
        expected.append(train_step(swapped_model(EXACT, "bert"), batch))

    barrier = threading.Barrier(2, timeout=30)

    def wait(module, args):
        barrier.wait()

    models = [swapped_model(EXACT, "bert") for _ in batches]
    for model in models:
        for site in find_norms(model):
            site.module.register_forward_pre_hook(wait)

    def run(index):
        try:
            results[index] = train_step(models[index], batches[index])
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert_same(expected[index], results[index])


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_train_in_a_model_that_does_not_still_leave_padding_out(family):
    """As where statistics are estimated anew while everything else is frozen."""
    models = [swapped_model("batchnorm", family) for _ in range(2)]
    for model, columns in zip(models, (None, 11)):
        model.eval()
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.train()
        with torch.no_grad():
            model(**tiny_batch(model, columns=columns))
    padded = dict(models[1].named_buffers())
    for name, buffer in models[0].named_buffers():
        torch.testing.assert_close(padded[name], buffer, msg=name)


def test_an_exported_model_has_no_trace_of_the_mask_in_its_norms():
    model = swapped_model("powernorm", "bert").eval()
    batch = tiny_batch(model, labels=False)
    exported = torch.export.export(model, (), batch)
    torch.testing.assert_close(exported.module()(**batch).logits, model(**batch).logits)
    assert not SCOPE.masks
