"""What transformers and PEFT look up by name: pipelines, label shifting, tokenizers, adapters."""

import logging
import string

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_normswap import restore_norm, swap_norm
from tests.helpers.models import FAMILIES, VOCABULARY, tiny_batch, tiny_model
from tests.helpers.persistence import run_fresh, train


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[SEP]", *string.ascii_lowercase, *NUMBERS]
assert len(WORDS) == VOCABULARY


def tiny_tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save(model, folder, tokenizer=None, norm="powernorm"):
    train(swap_norm(model, norm, where="all")).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return model


@pytest.fixture
def complaints(caplog):
    """What transformers logs while a pipeline is made, such as that it does not know the model's class."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if "not supported" in record.getMessage()]
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "BertForSequenceClassification"), ("gpt2", "GPT2ForSequenceClassification")]
)
def test_text_classification(family, head, complaints, tmp_path):
    model = save(tiny_model(family, head, pad_token_id=0), tmp_path)
    results = pipeline("text-classification", model=str(tmp_path), device="cpu")("one a b two", top_k=None)
    ids = torch.tensor([[WORDS.index(word) for word in "one a b two".split()]])
    with torch.no_grad():
        expected = model(ids).logits.softmax(-1)[0]
    scores = {result["label"]: result["score"] for result in results}
    assert scores == pytest.approx({f"LABEL_{n}": float(score) for n, score in enumerate(expected)})
    assert not complaints()


@pytest.mark.parametrize(("family", "head"), [("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM")])
def test_fill_mask(family, head, complaints, tmp_path):
    model = save(tiny_model(family, head, pad_token_id=0), tmp_path)
    results = pipeline("fill-mask", model=str(tmp_path), device="cpu")("a [MASK] b", top_k=3)
    ids = torch.tensor([[WORDS.index(word) for word in ("a", "[MASK]", "b")]])
    with torch.no_grad():
        expected = model(ids).logits[0, 1].softmax(-1).topk(3)
    assert [result["token"] for result in results] == expected.indices.tolist()
    assert [result["score"] for result in results] == pytest.approx(expected.values.tolist())
    assert not complaints()


def test_token_classification(complaints, tmp_path):
    model = save(tiny_model("bert", "BertForTokenClassification"), tmp_path)
    results = pipeline("token-classification", model=str(tmp_path), device="cpu", ignore_labels=[])("one b two")
    ids = torch.tensor([[WORDS.index(word) for word in ("one", "b", "two")]])
    with torch.no_grad():
        expected = model(ids).logits[0].softmax(-1).max(-1).values
    assert [result["score"] for result in results] == pytest.approx(expected.tolist())
    assert not complaints()


@pytest.mark.parametrize(("family", "head"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertLMHeadModel")])
def test_text_generation(family, head, complaints, tmp_path):
    model = save(tiny_model(family, head, pad_token_id=0, eos_token_id=None), tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (result,) = generate("one a", max_new_tokens=4, do_sample=False)
    ids = [WORDS.index("one"), WORDS.index("a")]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    words = [WORDS[number] for number in ids if number >= WORDS.index("a")]
    assert result["generated_text"].replace(" ", "") == "".join(words)
    assert not complaints()


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "BertModel"), ("roberta", "RobertaModel"), ("gpt2", "GPT2Model")]
)
def test_feature_extraction(family, head, complaints, tmp_path):
    model = save(tiny_model(family, head, pad_token_id=0), tmp_path)
    features = pipeline("feature-extraction", model=str(tmp_path), device="cpu")("one a b two", return_tensors="pt")
    ids = torch.tensor([[WORDS.index(word) for word in "one a b two".split()]])
    with torch.no_grad():
        assert torch.equal(features, model(ids).last_hidden_state)
    assert not complaints()


TEXTS = ["one a b two", "three", "b [MASK]", "c d e f g four", "nine eight"]


@pytest.mark.parametrize(
    ("task", "family", "head", "options"),
    [
        ("text-classification", "bert", "BertForSequenceClassification", {"top_k": None}),
        ("text-classification", "roberta", "RobertaForSequenceClassification", {"top_k": None}),
        ("text-classification", "gpt2", "GPT2ForSequenceClassification", {"top_k": None}),
        ("token-classification", "roberta", "RobertaForTokenClassification", {"ignore_labels": []}),
        ("fill-mask", "bert", "BertForMaskedLM", {}),
        ("text-generation", "gpt2", "GPT2LMHeadModel", {"max_new_tokens": 4, "do_sample": False}),
    ],
)
@pytest.mark.parametrize("norm", ["rbn", "powernorm"])
def test_a_batch_with_padding_gives_what_single_texts_give(task, family, head, options, norm, tmp_path):
    save(tiny_model(family, head, pad_token_id=0, eos_token_id=None), tmp_path, norm=norm)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    if task == "text-generation":
        pipe.tokenizer.padding_side = "left"
    texts = [f"{text} [MASK]" for text in TEXTS if "MASK" not in text] if task == "fill-mask" else TEXTS
    together, alone = (list(flat(pipe(texts, batch_size=size, **options))) for size in (4, 1))
    assert len(alone) >= len(texts)
    assert together == [value if isinstance(value, str) else pytest.approx(value, rel=1e-5) for value in alone]


def flat(results):
    """The values of nested lists and dicts, in order."""
    if isinstance(results, dict):
        results = results.values()
    elif not isinstance(results, list):
        yield results
        return
    for result in results:
        yield from flat(result)


def test_translation_by_generate(tmp_path):
    """transformers has no translation pipeline any more."""
    model = save(tiny_model("marian"), tmp_path).eval()
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    inputs = tiny_batch(model, labels=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2), expected)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertLMHeadModel"),
        ("roberta", "RobertaForCausalLM"),
        ("marian", "MarianForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForTokenClassification"),
    ],
)
def test_label_smoothing_shifts_the_labels_of_causal_models_alone(family, head, tmp_path):
    """The smoothed loss is that of the unswapped model, which transformers knows: both compute the same."""
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    model = tiny_model(family, head).eval()
    losses = []
    for change in (lambda stock: stock, lambda stock: swap_norm(stock, "layernorm"), restore_norm):
        change(model)
        losses.append(Trainer(model, arguments).compute_loss(model, tiny_batch(model)).item())
    assert losses[0] == losses[1] == losses[2]
    # By hand: smoothed cross entropy of the next token, or of the same one.
    batch = tiny_batch(model)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    if "Causal" in head or "LMHead" in head:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != -100
    logs = logits.log_softmax(-1)[chosen]
    right = -logs.gather(-1, labels[chosen].unsqueeze(-1)).mean()
    assert losses[1] == pytest.approx(float(0.9 * right - 0.1 * logs.mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_tokenizer_of_a_saved_folder(family, tmp_path):
    """It is the one that transformers gives beside the stock model."""
    pieces = [*string.ascii_lowercase, "Ġ", "<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = {
        "bert": lambda: BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}),
        "roberta": lambda: RobertaTokenizer(vocab=vocabulary, merges=[]),
        "gpt2": lambda: GPT2Tokenizer(vocab=vocabulary, merges=[]),
    }[family]()
    model = tiny_model(family)
    for folder in ("stock", "swapped"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        if folder == "stock":
            swap_norm(model, "pn")
    stock, ours = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("stock", "swapped"))
    assert type(ours) is type(stock)
    assert ours("a b one") == stock("a b one")
    # Folders from before tokenizers named their class go by the model alone.
    for folder in ("stock", "swapped"):
        (tmp_path / folder / "tokenizer_config.json").unlink()
    stock, ours = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("stock", "swapped"))
    assert type(ours) is type(stock) is type(tokenizer)
    assert ours("a b one") == stock("a b one")


@pytest.mark.parametrize("peft_first", [True, False])
def test_adapters_find_their_default_places(peft_first, tmp_path):
    pytest.importorskip("peft")
    script = f"""
import sys
import transformers
import torch
{"import peft" if peft_first else ""}
from hf_normswap import swap_norm
from tests.helpers.models import tiny_batch, tiny_model

# PEFT has no default places for Marian.
swapped = {{family: swap_norm(tiny_model(family), "powernorm") for family in ("bert", "roberta", "gpt2")}}
assert ("peft" in sys.modules) is {peft_first}
import peft

for family, model in swapped.items():
    torch.manual_seed(0)
    stock = peft.get_peft_model(tiny_model(family), peft.LoraConfig())
    ours = peft.get_peft_model(model, peft.LoraConfig())
    places = [
        sorted(name for name, _ in each.named_modules() if name.endswith("lora_A.default")) for each in (ours, stock)
    ]
    assert places[0] and places[0] == places[1], places
    loss = ours(**tiny_batch(model)).loss
    loss.backward()
    trained = [name for name, parameter in ours.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name for name in trained), trained
print("done")
"""
    assert run_fresh(script, tmp_path).stdout.splitlines()[-1] == "done"


def test_every_table_that_knows_a_stock_class_knows_the_swapped_one():
    """By the tables of transformers themselves: for each name of a stock head there is ours."""
    from transformers.models.auto import modeling_auto

    for family in FAMILIES:
        swap_norm(tiny_model(family), "layernorm")
        tables = {
            name: table
            for name, table in vars(modeling_auto).items()
            if name.startswith("MODEL_") and name.endswith("_NAMES") and family in table
        }
        assert len(tables) >= 3
        for table in tables.values():
            assert table[f"normswap_{family}"] == f"NormSwap{table[family]}"
