"""Data of several kinds as batches of model inputs."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_normswap.modeling.moments import sum_over_ranks
from hf_normswap.modeling.padding_mask import read_mask

from .example_inputs import text_config
from .model_state import device_of, is_composite, unwrap


if TYPE_CHECKING:  # an import of it takes long, and training needs none
    from datasets import Dataset

_LABELS = ("labels", "label", "label_ids")


def make_batches(
    model: nn.Module,
    data: Iterable,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Batches of inputs for `model`, with what its `forward` does not take left out.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that shall read them.
        data: one of

            - texts: a list of `str`, or of pairs of them. For a model that translates, pairs are sources and targets;
              it also takes `{language: text, language: text}`, in the direction that the tokenizer has, else as given;
            - a [`~datasets.Dataset`]: with `input_ids` as they are, else with its one or two columns of text, or with
              a column `translation`;
            - batches: a [`~torch.utils.data.DataLoader`] or any iterable of dictionaries of tensors. They are all that
              a module around swapped models takes, with whatever its `forward` reads.
        tokenizer (*optional*): for texts, and to pad a data set of `input_ids`.
        batch_size (`int`, *optional*, defaults to 32): rows of a batch, except where `data` has batches already.

    Returns:
        `list[dict[str, torch.Tensor]]`: labels only for encoder-decoder models, whose decoder reads them.

    Raises:
        ValueError: when there is no data, no tokenizer for texts, or the kind of data is unknown.
    """
    model = unwrap(model)
    _check_kind(data)
    if is_composite(model):
        return [_call_of_composite(model, batch) for batch in _batches_alone(model, data)]
    if _is_of_datasets(data, "Dataset"):
        batches = _of_dataset(model, data.with_format(None), tokenizer, batch_size)
    else:
        batches = list(data)
        if not isinstance(data, DataLoader) and any(_is_text(model, row) for row in batches):
            batches = _of_texts(model, batches, tokenizer, batch_size)
    return [_inputs(model, batch) for batch in batches]


def _check_kind(data) -> None:
    """Raises `ValueError` for data that would be read in another way than it is meant."""
    if _is_of_datasets(data, "DatasetDict", "IterableDatasetDict"):
        raise ValueError(f"The data has splits {', '.join(data)}: pass one of them.")
    if isinstance(data, str | bytes | Mapping):
        raise ValueError("The data is a single text or batch: pass a list of them.")
    if _is_of_datasets(data, "IterableDataset"):
        raise ValueError("The data is a stream: pass a part of it, as in Dataset.from_list(list(data.take(512))).")
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a table of pandas: iterating gives the names of columns
        raise ValueError("The data is a DataFrame: pass its column of text, or Dataset.from_pandas(data).")
    if isinstance(data, type) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise ValueError(f"The data is a {type(data).__name__}: pass a list of texts, a data set, or batches.")


def complete_batches(model: nn.Module, batches: list[dict]) -> list[dict]:
    """The batches with what the decoder of a translation model reads: labels, or else the model's own greedy output.

    Those of a module around swapped models stay as they are.

    Raises:
        ValueError: when there is not one real token, on all ranks together.
    """
    is_plain = not is_composite(model)
    tokens = sum(map(_count_tokens, batches)) if is_plain else len(batches)
    count, tokens = sum_over_ranks(torch.tensor([len(batches), tokens], device=device_of(model))).tolist()
    if not count:
        raise ValueError("The data is empty: pass a few hundred texts.")
    if not tokens:
        raise ValueError("The data has no real tokens, its attention_mask hides all of them: pass some text.")
    if not is_plain or not model.config.is_encoder_decoder:
        return batches
    return [batch if {"labels", "decoder_input_ids"} & set(batch) else _translated(model, batch) for batch in batches]


def _count_tokens(batch: dict) -> int:
    if "input_ids" in batch:
        ids = batch["input_ids"]
    elif "inputs_embeds" in batch:
        ids = batch["inputs_embeds"][..., 0]
    else:  # images or sound, whose tokens the model makes
        return max(len(values) for values in batch.values())
    tokens = read_mask(batch.get("attention_mask"), (ids.shape[:-1].numel(), ids.shape[-1]))
    return ids.numel() if tokens is None else int(tokens.real.sum())


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


def _is_text(model, row) -> bool:
    """Whether a row of data is a text, a pair of texts or a translation."""
    if isinstance(row, Mapping):
        return model.config.is_encoder_decoder and all(isinstance(text, str) for text in row.values())
    return isinstance(row, str) or (isinstance(row, tuple | list) and all(isinstance(text, str) for text in row))


def _is_of_datasets(data, *names: str) -> bool:
    """Whether `data` is an instance of one of these classes of `datasets`: of none where nobody has imported it."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, tuple(getattr(module, name) for name in names))


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
    rows = list(rows)
    _check_texts(model, rows)
    _need(tokenizer, "read texts")
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
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token, for GPT-2 to its eos_token.")


def _check_texts(model, rows: list) -> None:
    """Raises `ValueError` unless all rows are texts, pairs of texts, or translations: a tokenizer reads no mixture."""
    kinds = {len(row) if isinstance(row, tuple | list) else "one" for row in rows}
    allowed = {"one", 2} if model.config.is_encoder_decoder else {"one", 1, 2}
    if not all(_is_text(model, row) for row in rows) or len(kinds) > 1 or not kinds <= allowed:
        found = " and ".join(dict.fromkeys(_describe(row) for row in rows))
        raise ValueError(f"The data has {found} for texts: pass a list of str, or a list of pairs of them.")


def _describe(value) -> str:
    """What a value is, in a sentence."""
    if value is None:
        return "None"
    name = type(value).__name__
    content = f" of {len(value)} {type(value[0]).__name__}" if isinstance(value, tuple | list) and value else ""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}{content}"


def _batches_alone(model, data) -> list[Mapping]:
    """The batches of a module around swapped models."""
    is_data_set = _is_of_datasets(data, "Dataset")
    batches = [] if is_data_set else list(data)
    if is_data_set or not all(isinstance(batch, Mapping) for batch in batches):
        raise ValueError(
            f"A {type(model).__name__} takes neither texts nor a data set: pass batches, dictionaries of what its "
            "forward takes."
        )
    return batches


def _call_of_composite(model, batch: Mapping) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_all &= not isinstance(model, PreTrainedModel)  # these pass on names that nothing reads
    inputs = {name: value for name, value in batch.items() if takes_all or name in parameters}
    if not inputs:
        raise ValueError(
            f"A batch has {', '.join(map(str, batch))}, which the forward of {type(model).__name__} does not take: "
            "pass what it takes."
        )
    return inputs


def _inputs(model, batch) -> dict[str, torch.Tensor]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The data yields {_describe(batch)}: pass texts, a data set, or batches that are dictionaries of "
            'tensors, such as {"input_ids": ids, "attention_mask": mask}.'
        )
    taken = set(inspect.signature(model.forward).parameters)
    if not model.config.is_encoder_decoder:
        taken -= set(_LABELS)
    inputs = {name: value for name, value in batch.items() if name in taken and isinstance(value, torch.Tensor)}
    if "input_ids" in inputs:
        _check_ids(model, inputs["input_ids"])
    elif "input_ids" in batch:
        raise ValueError(
            f"input_ids of a batch is {_describe(batch['input_ids'])}: make it a tensor, as the tokenizer does with "
            "return_tensors='pt', or pass a data set and the tokenizer."
        )
    elif "inputs_embeds" not in inputs and getattr(model, "main_input_name", "input_ids") not in inputs:
        is_text = all(isinstance(value, str) for value in batch.values())
        cure = "the texts themselves, or Dataset.from_list(rows)" if is_text else "inputs of the model"
        raise ValueError(f"A batch has {', '.join(batch)} and no tensor input_ids: pass {cure}.")
    return inputs


def _check_ids(model, ids: torch.Tensor) -> None:
    if ids.dim() < 2:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}, that of one example: pass batches, as a DataLoader makes them."
        )
    if ids.is_floating_point():
        raise ValueError(f"input_ids is {ids.dtype}: token ids are whole numbers, and embeddings go to inputs_embeds.")
    size = text_config(model).vocab_size
    if ids.numel() and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(
            f"input_ids go from {ids.min()} to {ids.max()}, and the model has {size} tokens: use the tokenizer of the "
            "model."
        )
