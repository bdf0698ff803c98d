"""Tiny models of the four families with every head of transformers, and batches for them. Nothing is downloaded."""

import functools
import importlib

import torch
from torch import nn
from transformers import BertConfig, GPT2Config, MarianConfig, PreTrainedModel, RobertaConfig

from hf_normswap.modeling.activation_checkpointing import CHECKPOINTING


if CHECKPOINTING == "gradient_checkpointing":  # for tests that know the newer name alone
    PreTrainedModel.activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable
    PreTrainedModel.activation_checkpointing_disable = PreTrainedModel.gradient_checkpointing_disable
    PreTrainedModel.is_activation_checkpointing = PreTrainedModel.is_gradient_checkpointing

FAMILIES = ("bert", "roberta", "marian", "gpt2")
VOCABULARY, LABELS, CHOICES = 40, 3, 2

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_CONFIGS = {
    "bert": (BertConfig, {**_ENCODER, "pad_token_id": 0}),
    "roberta": (RobertaConfig, {**_ENCODER, "type_vocab_size": 1, "bos_token_id": 0, "pad_token_id": 1}),
    "marian": (
        MarianConfig,
        {
            "vocab_size": VOCABULARY,
            "decoder_vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 40,
            "init_std": 0.2,
            "dropout": 0.0,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "pad_token_id": VOCABULARY - 1,
            "decoder_start_token_id": VOCABULARY - 1,
        },
    ),
    "gpt2": (
        GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 24,
            "n_positions": 40,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "summary_first_dropout": 0.0,
            "classifier_dropout": 0.0,
            "bos_token_id": VOCABULARY - 1,
            "eos_token_id": VOCABULARY - 1,
            "pad_token_id": VOCABULARY - 1,
        },
    ),
}
# The usual head of each family: the one to take where a test needs no particular one.
USUAL_HEAD = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForMaskedLM",
    "marian": "MarianMTModel",
    "gpt2": "GPT2LMHeadModel",
}


@functools.cache
def _modeling(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def heads(family: str) -> list[str]:
    """Names of all model classes of transformers for `family`, the base model among them."""
    module = _modeling(family)
    classes = {name: getattr(module, name) for name in module.__all__}
    return sorted(
        name
        for name, cls in classes.items()
        if issubclass(cls, PreTrainedModel) and not name.endswith("PreTrainedModel")
    )


def all_heads() -> list[tuple[str, str]]:
    """`(family, head)` for every head of every family."""
    return [(family, head) for family in FAMILIES for head in heads(family)]


def tiny_config(family: str, head: str | None = None, **overrides):
    """Configuration of [`tiny_model`]; `overrides` are its fields."""
    config_class, fields = _CONFIGS[family]
    fields = {**fields, "num_labels": LABELS}
    if head in ("BertLMHeadModel", "RobertaForCausalLM"):
        fields["is_decoder"] = True
    if head == "GPT2DoubleHeadsModel":
        fields["num_labels"] = 1  # one score for each choice
    if head and head.endswith("QuestionAnswering"):
        fields["num_labels"] = 2  # start and end
    return config_class(**{**fields, **overrides})


def tiny_model(family: str, head: str | None = None, seed: int = 0, **overrides) -> PreTrainedModel:
    """A stock model of two layers and 16 channels without dropout, in float32 and in training mode.

    Its LayerNorms have gains and shifts that are not 1 and 0. `overrides` are fields of its configuration.
    """
    head = head or USUAL_HEAD[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(_modeling(family), head)(tiny_config(family, head, **overrides))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.train()


def tiny_batch(
    model: PreTrainedModel,
    lengths: tuple[int, ...] = (6, 3),
    columns: int | None = None,
    padding_side: str = "right",
    filler: int | None = None,
    labels: bool = True,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Inputs for `model`, one row for each length.

    The real tokens depend on `lengths` and `seed` alone: `columns`, `padding_side` and `filler` (the id at the pads,
    by default the padding token) say what stands around them. Labels are -100 at pads.
    """
    head = type(model).__name__.removeprefix("FSDP").removeprefix("NormSwap")
    config = model.config
    columns = columns or max(lengths)
    filler = config.pad_token_id if filler is None else filler
    generator = torch.Generator().manual_seed(seed)

    def tokens(lengths, columns, filler, side=padding_side):
        rows = torch.full((len(lengths), columns), filler)
        for row, length in zip(rows, lengths):
            # Above the special tokens at the low end, below those at the high end of the vocabulary.
            row[_real(length, columns, side)] = torch.randint(5, VOCABULARY - 2, (length,), generator=generator)
        return rows

    mask = torch.zeros(len(lengths), columns, dtype=torch.long)
    for row, length in zip(mask, lengths):
        row[_real(length, columns, padding_side)] = 1
    batch = {"input_ids": tokens(lengths, columns, filler), "attention_mask": mask}
    if "MultipleChoice" in head or "DoubleHeads" in head:
        second = tokens(lengths, columns, filler)
        batch = {
            "input_ids": torch.stack([batch["input_ids"], second], dim=1),
            "attention_mask": torch.stack([mask] * CHOICES, dim=1),
        }
    if head in ("MarianModel", "MarianMTModel"):
        # Targets have other lengths than the sources, and are padded on the right, as decoding starts on the left.
        target_lengths = [length + 1 for length in reversed(lengths)]
        targets = tokens(target_lengths, columns + 1, -100, side="right")
        for row, length in zip(targets, target_lengths):
            row[length - 1] = config.eos_token_id
        if head == "MarianMTModel" and labels:
            batch["labels"] = targets
        else:
            shifted = targets.masked_fill(targets == -100, config.pad_token_id).roll(1, dims=1)
            shifted[:, 0] = config.decoder_start_token_id
            batch["decoder_input_ids"] = shifted
        return batch
    return {**batch, **_labels(head, batch, generator)} if labels else batch


def _real(length: int, columns: int, padding_side: str) -> slice:
    return slice(length) if padding_side == "right" else slice(columns - length, columns)


def _labels(head: str, batch: dict, generator: torch.Generator) -> dict:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = ids.shape[0]
    first = mask.reshape(-1, mask.shape[-1]).argmax(-1).view(mask.shape[:-1])
    last = first + mask.sum(-1) - 1
    if head.endswith("QuestionAnswering"):
        return {"start_positions": first, "end_positions": last}
    if head.endswith("SequenceClassification"):
        return {"labels": torch.arange(rows) % LABELS}
    if head.endswith(("MultipleChoice", "NextSentencePrediction")):
        return {"labels": torch.arange(rows) % 2}
    if head.endswith("TokenClassification"):
        return {"labels": torch.where(mask.bool(), ids % LABELS, -100)}
    of_tokens = {"labels": torch.where(mask.bool(), ids, -100)}
    if head.endswith(("CausalLM", "LMHeadModel", "DoubleHeadsModel")):
        # The first token of a row is predicted from nothing, or from the padding on its left.
        of_tokens["labels"].scatter_(-1, first.unsqueeze(-1), -100)
    if head == "BertForPreTraining":
        return {**of_tokens, "next_sentence_label": torch.arange(rows) % 2}
    if head == "GPT2DoubleHeadsModel":
        return {**of_tokens, "mc_token_ids": last, "mc_labels": torch.arange(rows) % CHOICES}
    if head.endswith(("MaskedLM", "CausalLM", "LMHeadModel")):
        return of_tokens
    return {}
