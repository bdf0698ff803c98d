"""Data of several kinds as batches of model inputs."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .modeling.ranks import sum_over_ranks


if TYPE_CHECKING:  # an import of it takes long, and training needs none
    from datasets import Dataset

_LABELS = ("labels", "label", "label_ids")


def make_batches(
    model: PreTrainedModel,
    data: Iterable,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
) -> list[dict[str, torch.Tensor]]:
    """Batches of inputs for `model`, on the CPU, with what its `forward` does not take left out.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that shall read them.
        data: one of

            - texts: a list of `str`, or of pairs of them. For a model that translates, pairs are sources and targets;
              it also takes `{language: text, language: text}`, in the direction that the tokenizer has, else as given;
            - a [`~datasets.Dataset`]: with `input_ids` as they are, else with its one or two columns of text, or with
              a column `translation`;
            - batches: a [`~torch.utils.data.DataLoader`] or any iterable of dictionaries of tensors.
        tokenizer (*optional*): for texts, and to pad a data set of `input_ids`.
        batch_size (`int`, *optional*, defaults to 32): rows of a batch, except where `data` has batches already.

    Returns:
        `list[dict[str, torch.Tensor]]`: labels only for encoder-decoder models, whose decoder reads them.

    Raises:
        ValueError: when there is no data, no tokenizer for texts, or the kind of data is unknown.
    """
    if _is_of_datasets(data, "DatasetDict"):
        raise ValueError(f"The data has splits {', '.join(data)}: pass one of them.")
    if isinstance(data, str | Mapping):
        raise ValueError("The data is a single text or batch: pass a list of them.")
    if _is_of_datasets(data, "Dataset"):
        batches = _of_dataset(model, data, tokenizer, batch_size)
    elif isinstance(data, DataLoader):
        batches = list(data)
    else:
        rows = list(data)
        if not rows:
            return []
        is_text = all(isinstance(row, str | tuple | list) or _is_translation(model, row) for row in rows)
        batches = _of_texts(model, rows, tokenizer, batch_size) if is_text else rows
    return [_inputs(model, batch) for batch in batches]


def complete_batches(model: PreTrainedModel, batches: list[dict]) -> list[dict]:
    """The batches with what the decoder of a translation model reads: labels, or else the model's own greedy output.

    Raises:
        ValueError: when there is not one real token, on all ranks together.
    """
    tokens = torch.tensor([len(batches), sum(map(_count_tokens, batches))], device=model.device)
    count, tokens = sum_over_ranks(tokens).tolist()
    if not count:
        raise ValueError("The data is empty: pass a few hundred texts.")
    if not tokens:
        raise ValueError("The data has no real tokens, its attention_mask is 0 everywhere: pass some text.")
    if not model.config.is_encoder_decoder:
        return batches
    return [batch if {"labels", "decoder_input_ids"} & set(batch) else _translated(model, batch) for batch in batches]


def _count_tokens(batch: dict) -> int:
    inputs = batch.get("input_ids", batch.get("inputs_embeds"))
    mask = batch.get("attention_mask")
    return inputs.shape[:2].numel() if mask is None else int(mask.sum())


def _translated(model, batch: dict) -> dict:
    if not model.can_generate():
        raise ValueError("A decoder without a head writes nothing: pass batches with decoder_input_ids.")
    length = min(2 * batch["input_ids"].shape[1] + 10, model.config.max_position_embeddings - 1)
    inputs = send_to_device(batch, model.device)
    written = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=length)[:, 1:]
    return {
        **batch,
        "labels": written.masked_fill(written == model.config.pad_token_id, -100).to(batch["input_ids"].device),
    }


def _is_translation(model, row) -> bool:
    return (
        model.config.is_encoder_decoder
        and isinstance(row, Mapping)
        and all(isinstance(text, str) for text in row.values())
    )


def _is_of_datasets(data, name: str) -> bool:
    """Whether `data` is an instance of that class of `datasets`: of none where nobody has imported it."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, getattr(module, name))


def _of_dataset(model, data: "Dataset", tokenizer, batch_size) -> list[Mapping]:
    names = data.column_names
    if "input_ids" in names:
        _need(tokenizer, "pad a data set")
        kept = [name for name in names if name in (*tokenizer.model_input_names, *_LABELS)]
        rows = list(data.select_columns(kept))
        return [_pad(tokenizer, group) for group in _grouped(rows, lambda row: len(row["input_ids"]), batch_size)]
    if "translation" in names:
        return _of_texts(model, data["translation"], tokenizer, batch_size)
    texts = [name for name in names if getattr(data.features[name], "dtype", None) in ("string", "large_string")]
    if len(texts) not in (1, 2):
        raise ValueError(
            f"The data set has columns {', '.join(names)}: keep the one or two of text with select_columns, or "
            "tokenize it."
        )
    columns = [data[name] for name in texts]
    return _of_texts(model, list(zip(*columns)) if len(texts) == 2 else list(columns[0]), tokenizer, batch_size)


def _of_texts(model, rows, tokenizer, batch_size) -> list[Mapping]:
    _need(tokenizer, "read texts")
    rows = list(rows)
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token, for GPT-2 to its eos_token.")
    limit = {"truncation": True, "max_length": min(tokenizer.model_max_length, _positions(model.config))}

    def encode(group):
        if isinstance(group[0], Mapping):
            languages = [getattr(tokenizer, f"{side}_lang", None) for side in ("source", "target")]
            if not set(languages) <= set(group[0]):
                languages = list(group[0])
            group = [tuple(row[language] for language in languages) for row in group]
        if model.config.is_encoder_decoder and not isinstance(group[0], str):
            source, target = zip(*group)
            encoded = tokenizer(list(source), text_target=list(target), padding=True, return_tensors="pt", **limit)
            encoded["labels"] = encoded["labels"].masked_fill(encoded["labels"] == tokenizer.pad_token_id, -100)
            return encoded
        columns = [group] if isinstance(group[0], str) else [list(column) for column in zip(*group)]
        return tokenizer(*columns, padding=True, return_tensors="pt", **limit)

    def length(row):
        return len(row) if isinstance(row, str) else sum(map(len, row.values() if isinstance(row, Mapping) else row))

    return [encode(group) for group in _grouped(rows, length, batch_size)]


def _positions(config) -> int:
    """The longest input that the model takes; a tokenizer does not always know."""
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0  # RoBERTa counts from there
    return config.max_position_embeddings - offset


def _grouped(rows: list, length, batch_size: int) -> list[list]:
    """Rows of similar length together, for little padding."""
    rows = sorted(rows, key=length)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _pad(tokenizer, rows: list[dict]) -> Mapping:
    labels = [row.pop(name) for row in rows for name in _LABELS if name in row]
    batch = tokenizer.pad(rows, return_tensors="pt")
    if labels and isinstance(labels[0], list):  # those of a translation; no other model reads them
        width = max(map(len, labels))
        batch["labels"] = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    return batch


def _need(tokenizer, purpose: str) -> None:
    if tokenizer is None:
        raise ValueError(f"A tokenizer is needed to {purpose}: pass tokenizer=....")


def _inputs(model, batch) -> dict[str, torch.Tensor]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The data yields a {type(batch).__name__}: pass texts, a data set, or batches that are dictionaries."
        )
    taken = set(inspect.signature(model.forward).parameters)
    if not model.config.is_encoder_decoder:
        taken -= set(_LABELS)
    inputs = {name: value for name, value in batch.items() if name in taken and isinstance(value, torch.Tensor)}
    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        raise ValueError(f"A batch has {', '.join(batch)} and no tensor input_ids: pass inputs of the model.")
    return inputs
