"""The families of models that the benchmarks train: real text, model, and the scores of each."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DistilBertForMaskedLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    default_data_collator,
)

from hf_normswap.metrics import SacrebleuMetric


sys.path.append(str(Path(__file__).parents[1]))  # a script finds its own folder only

from recipes.vocabulary import train_tokenizer  # noqa: E402


MAX_LENGTH = 128
MASKED = 0.15


@dataclass
class Task:
    """What a family is trained on, converted with and scored by."""

    model_class: type[PreTrainedModel]
    config: dict
    tokenizer: PreTrainedTokenizerFast | None  # none for images
    collator: Callable
    train: Dataset
    inputs: dict[str, Dataset]  # to calibrate on: such as are scored, then a kind that is easier to come by
    score: Callable[[PreTrainedModel], dict[str, float]]


def fields_of_texts(tokenizer):
    """What the configuration of a model of texts has besides its sizes."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH + 2, **ids}  # RoBERTa counts from 2


def gpt2(data, args):
    """GPT-2, as in [`packed_language_model`]."""
    return packed_language_model(data, args, GPT2LMHeadModel, {})


def llama(data, args):
    """Llama, whose norms are RMSNorms, as in [`packed_language_model`]."""
    config = {"intermediate_size": 3 * args.hidden_size, "num_key_value_heads": args.heads}
    return packed_language_model(data, args, LlamaForCausalLM, config)


def packed_language_model(data, args, model_class, config):
    """Language model: perplexity per token of the test split, packed into blocks."""
    tokenizer, lines = tokenize(data, "$A </s>", args)

    def pack(rows):
        tokens = list(chain(*rows["input_ids"]))
        blocks = [tokens[end - MAX_LENGTH : end] for end in range(MAX_LENGTH, len(tokens) + 1, MAX_LENGTH)]
        return {"input_ids": blocks, "labels": [[-100, *block[1:]] for block in blocks]}  # nothing predicts the first

    columns = lines["train"].column_names
    blocks = lines.map(pack, batched=True, batch_size=None, remove_columns=columns, desc="Packing")
    inputs = {"blocks": draw(blocks, args), "lines": draw(lines, args)}
    collator = DataCollatorForSeq2Seq(tokenizer)

    def score(model):
        return perplexity(model, blocks["test"], tokenizer)

    config = fields_of_texts(tokenizer) | config
    return Task(model_class, config, tokenizer, collator, blocks["train"], inputs, score)


def roberta(data, args):
    """RoBERTa, as in [`masked_language_model`]."""
    config = {"intermediate_size": 4 * args.hidden_size, "type_vocab_size": 1}
    return masked_language_model(data, args, RobertaForMaskedLM, config)


def distilbert(data, args):
    """DistilBERT, as in [`masked_language_model`]."""
    return masked_language_model(data, args, DistilBertForMaskedLM, {"hidden_dim": 4 * args.hidden_size})


def masked_language_model(data, args, model_class, config):
    """Masked language model: perplexity per masked token of the test split, with the same masks for every model."""
    tokenizer, lines = tokenize(data, "<s> $A </s>", args)

    def mask(rows):
        fixed = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=args.seed)
        fixed.create_rng()  # transformers 5.17 takes seed 0 for none
        return rows.map(lambda row: {name: value[0] for name, value in fixed([row]).items()}, desc="Masking")

    sample = draw(lines, args)
    inputs = {"masked lines": mask(sample), "lines": sample}
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    test = mask(lines["test"])

    def score(model):
        return perplexity(model, test, tokenizer)

    config = fields_of_texts(tokenizer) | config
    return Task(model_class, config, tokenizer, collator, lines["train"], inputs, score)


def marian(data, args):
    """Marian, as in [`translation_model`]."""
    config = {
        "scale_embedding": True,
        "decoder_layers": args.layers,
        "decoder_attention_heads": args.heads,
        "encoder_ffn_dim": 4 * args.hidden_size,
        "decoder_ffn_dim": 4 * args.hidden_size,
    }
    return translation_model(data, args, MarianMTModel, config)


def t5(data, args):
    """T5 with pre-norm blocks of RMSNorms, as in [`translation_model`]."""
    config = {
        "num_decoder_layers": args.layers,  # or it would be that of T5, whatever `num_hidden_layers` says
        "d_kv": args.hidden_size // args.heads,
        "d_ff": 4 * args.hidden_size,
    }
    return translation_model(data, args, T5ForConditionalGeneration, config)


def translation_model(data, args, model_class, config):
    """Translation from German to English: BLEU of greedy decoding on the test split, loss on the validation split."""
    if "translation" in data["train"].column_names:
        data = data.map(lambda row: row["translation"], remove_columns="translation")
    tokenizer, pairs = tokenize(data, "$A </s>", args, "de", "en")
    config |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
    config = fields_of_texts(tokenizer) | config
    sample = draw(pairs, args)
    inputs = {"pairs": sample, "sources": sample.remove_columns("labels")}
    test = pairs["test"].add_column("reference", data["test"]["en"][:])

    def score(model):
        loss = perplexity(model, pairs["validation"], tokenizer)["loss"]
        return {"bleu": bleu(model, test, tokenizer), "validation_loss": loss}

    return Task(model_class, config, tokenizer, DataCollatorForSeq2Seq(tokenizer), pairs["train"], inputs, score)


def vit(data, args):
    """ViT on images of one size: accuracy on the test split."""
    rows = data.with_format("torch")
    size = rows["train"][0]["pixel_values"].shape
    config = {
        "image_size": size[-1],
        "num_channels": size[0],
        "patch_size": 2,
        "intermediate_size": 4 * args.hidden_size,
        "num_labels": data["train"].features["labels"].num_classes,
        "hidden_dropout_prob": 0.1,
    }
    inputs = {"images": draw(data.remove_columns("labels"), args)}

    @torch.inference_mode()
    def score(model):
        test = rows["test"][:]
        is_right = model(test["pixel_values"]).logits.argmax(-1) == test["labels"]
        return {"accuracy": 100 * is_right.float().mean().item()}

    return Task(ViTForImageClassification, config, None, default_data_collator, data["train"], inputs, score)


def digits():
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn has, a fifth of them to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    names = ClassLabel(names=[str(name) for name in found.target_names])
    pixels = Array3D((1, 8, 8), "float32")
    rows = {"pixel_values": found.images[:, None].astype("float32") / 8 - 1, "labels": found.target}
    data = Dataset.from_dict(rows, Features({"pixel_values": pixels, "labels": names}))
    return data.train_test_split(0.2, seed=0, stratify_by_column="labels")


DIGITS = "digits"
PTB = {"dataset_name": "ptb-text-only/ptb_text_only", "layers": 4}
MULTI30K = {"dataset_name": "bentrevett/multi30k", "layers": 3}
# The function of each family, and its options where none are given. A block is worth four lines.
FAMILIES = {
    "gpt2": (gpt2, {**PTB, "batch_size": 8, "max_steps": 2000, "examples": [64, 256, 1024]}),
    "roberta": (roberta, {**PTB, "batch_size": 32, "max_steps": 3000, "examples": [256, 1024, 4096]}),
    "marian": (marian, {**MULTI30K, "batch_size": 32, "max_steps": 2800, "examples": [256, 1024, 4096]}),
    "llama": (llama, {**PTB, "batch_size": 8, "max_steps": 2000, "examples": [256]}),
    "distilbert": (distilbert, {**PTB, "batch_size": 32, "max_steps": 2000, "examples": [1024]}),
    "t5": (t5, {**MULTI30K, "batch_size": 32, "max_steps": 2000, "examples": [1024]}),
    "vit": (vit, {"dataset_name": DIGITS, "layers": 4, "batch_size": 32, "max_steps": 1000, "examples": [512]}),
}


def tokenize(data, template, args, source=None, target=None):
    """The tokenizer, that of the trained model if there is one, and the data in it, `template` around each text."""
    source = source or data["train"].column_names[0]
    if args.record.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder)
    else:
        texts = chain(*(data["train"][column][:] for column in (source, target) if column))
        tokenizer = train_tokenizer(texts, template, MAX_LENGTH, args.vocab_size)

    def encode(rows):
        return tokenizer(rows[source], text_target=rows[target] if target else None, truncation=True)

    return tokenizer, data.map(encode, batched=True, remove_columns=data["train"].column_names, desc="Tokenizing")


def draw(data, args):
    """The examples to calibrate on; fewer of them are the first of these."""
    rows = data["train"].shuffle(seed=args.seed)
    return rows.select(range(min(max(args.examples), len(rows))))


def grouped(rows, size=32):
    """Rows of similar length together, for little padding."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    return tqdm([rows[start : start + size] for start in range(0, len(rows), size)], "Scoring")


@torch.inference_mode()
def perplexity(model, rows, tokenizer):
    """Mean loss over all tokens of `rows` that are predicted, and the perplexity that it makes."""
    total = count = 0
    for batch in map(DataCollatorForSeq2Seq(tokenizer), grouped(rows)):
        tokens = (batch["labels"] != -100).sum().item()
        total, count = total + tokens * model(**batch).loss.item(), count + tokens
    return {"perplexity": math.exp(total / count), "loss": total / count}


def bleu(model, rows, tokenizer):
    """BLEU of greedy decoding."""
    predictions, references = [], []
    for group in grouped(rows):
        batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in group], return_tensors="pt")
        written = model.generate(**batch, num_beams=1, do_sample=False, max_length=MAX_LENGTH)
        predictions += [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        references += [row["reference"] for row in group]
    return SacrebleuMetric().compute(predictions=predictions, references=references)["score"]
