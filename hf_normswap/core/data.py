"""Data of several kinds as batches of model inputs."""

import inspect
import itertools
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorForLanguageModeling, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_normswap.modeling.moments import sum_over_ranks
from hf_normswap.modeling.padding_mask import read_mask

from .example_inputs import parameters_of, text_config, vocabulary_of
from .model_state import device_of, is_composite, unwrap


if TYPE_CHECKING:  # an import of these takes long, and training needs none
    from datasets import Dataset
    from transformers import BaseImageProcessor, FeatureExtractionMixin, ProcessorMixin

# What turns data into inputs of a model.
Processor: TypeAlias = Union[PreTrainedTokenizerBase, "BaseImageProcessor", "FeatureExtractionMixin", "ProcessorMixin"]

_LABELS = ("labels", "label", "label_ids")
# The kind of data behind the main input of a model, and what makes this input.
_TEXTS, _IMAGES, _RECORDINGS = "texts", "images", "recordings"
_KINDS = {
    "input_ids": _TEXTS,
    "pixel_values": _IMAGES,
    "input_values": _RECORDINGS,
    "input_features": _RECORDINGS,
}
_MAKERS = {_TEXTS: "tokenizer", _IMAGES: "image processor", _RECORDINGS: "feature extractor"}
_MODES = {1: "L", 3: "RGB"}  # of PIL, by the number of channels


def make_batches(
    model: nn.Module,
    data: Iterable,
    tokenizer: Processor | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Batches of inputs for `model`, with what its `forward` does not take left out.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that shall read them.
        data: one of

            - texts: a list of `str`, or of pairs of them. For a model that translates, pairs are sources and targets;
              it also takes `{language: text, language: text}`, in the direction that the tokenizer has, else as given;
            - images: a list of PIL images. They are converted to the colours of the model, grey or RGB;
            - recordings: a list of one-dimensional arrays of floats, at the sampling rate of the feature extractor, or
              of `{"array": array, "sampling_rate": rate}`;
            - a [`~datasets.Dataset`]: with `input_ids`, `pixel_values`, `input_values` or `input_features` as they
              are, else with its one or two columns of text or a column `translation`, its one column of images, or its
              one column of recordings, which are resampled. The model decides which of these it reads;
            - batches: a [`~torch.utils.data.DataLoader`] or any iterable of dictionaries of tensors. A model that
              reads texts together with images or sound, such as CLIP, takes nothing else. The same is true of a module
              around swapped models, which gets whatever its `forward` reads.
        tokenizer (*optional*):
            the tokenizer, image processor, feature extractor or processor of the model. Texts, images and recordings
            need it, and so does a data set of `input_ids`, for padding.
        batch_size (`int`, *optional*, defaults to 32): rows of a batch, except where `data` has batches already.

    In texts for a masked language model 15 % of the tokens are masked, as in the training of BERT. A data set of
    `input_ids` and batches stay as they are.

    Returns:
        `list[dict[str, torch.Tensor]]`: labels only for encoder-decoder models, whose decoder reads them, and for
        masked language models, where they tell which tokens are predicted.

    Raises:
        ValueError: when there is no data, the model does not read data of this kind, the processor is missing or
            makes inputs of another model, or the kind of data is unknown.
        ImportError: when a column of recordings cannot be decoded because torchcodec is not installed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers import ViTConfig, ViTImageProcessorPil, ViTModel
    >>> from hf_normswap import make_batches
    >>> model = ViTModel(ViTConfig(hidden_size=8, num_attention_heads=2, image_size=16, patch_size=8))
    >>> processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    >>> (batch,) = make_batches(model, [Image.new("RGB", (20, 20)), Image.new("L", (9, 9))], processor)
    >>> batch["pixel_values"].shape
    torch.Size([2, 3, 16, 16])

    ```
    """
    model = unwrap(model)
    _check_kind(data)
    if is_composite(model):
        return [_call_of_composite(model, batch) for batch in _batches_alone(model, data)]
    if _is_of_datasets(data, "Dataset"):
        batches = _of_dataset(model, data.with_format(None), tokenizer, batch_size)
    else:
        batches = list(data)
        kinds = [] if isinstance(data, DataLoader) else filter(None, (_kind_of(model, row) for row in batches))
        if kind := next(iter(kinds), None):
            batches = _of_rows(model, kind, batches, tokenizer, batch_size)
    inputs = (_inputs(model, batch) for batch in batches)
    # Empty texts come together, and a tokenizer such as GPT-2's makes nothing of them.
    return [batch for batch in inputs if "input_ids" not in batch or batch["input_ids"].numel()]


def predicted_tokens(model: nn.Module, batch: Mapping) -> torch.Tensor | None:
    """Which tokens of a batch a masked language model predicts, `(B, T)`, as its labels tell; `None` for all."""
    labels = batch.get("labels")
    return labels != -100 if labels is not None and _predicts_masked_tokens(model) else None


def _predicts_masked_tokens(model) -> bool:
    if is_composite(model) or model.config.is_encoder_decoder:
        return False
    names = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    return any(base.__name__ in names for base in type(model).__mro__)


def _check_kind(data) -> None:
    """Raises `ValueError` for data that would be read in another way than it is meant."""
    if _is_of_datasets(data, "DatasetDict", "IterableDatasetDict"):
        raise ValueError(f"The data has splits {', '.join(data)}: pass one of them.")
    if isinstance(data, str | bytes | Mapping):
        raise ValueError("The data is a single text or batch: pass a list of them.")
    if _is_image(data):
        raise ValueError("The data is a single image: pass a list of them.")
    if _is_of_datasets(data, "IterableDataset"):
        raise ValueError("The data is a stream: pass a part of it, as in Dataset.from_list(list(data.take(512))).")
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a table of pandas: iterating gives the names of columns
        raise ValueError("The data is a DataFrame: pass its column of text, or Dataset.from_pandas(data).")
    if isinstance(data, type) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise ValueError(f"The data is a {type(data).__name__}: pass a list of texts, a data set, or batches.")


def split_data(data: Iterable, shares: Sequence[float], seed: int = 0) -> list:
    """Divide data at random into a first part and one for each of `shares`; the same seed gives the same parts.

    Examples stay whole, and batches do where `data` is in batches. Examples with the same text go to the same part.

    Args:
        data: as in [`make_batches`].
        shares (list of `float`): of the examples, for the parts after the first; each gets one example at least.
        seed (`int`, *optional*, defaults to 0): of the division.

    Returns:
        `list`: the parts, each of the kind of `data`.

    Raises:
        ValueError: when there is no data, or too little to give something to each part.
    """
    _check_kind(data)
    is_data_set = _is_of_datasets(data, "Dataset")
    rows = data if is_data_set else list(data)
    groups: dict = {}
    for index, key in enumerate(_texts_of(rows) if is_data_set else rows):
        if isinstance(key, list):
            key = tuple(key)
        is_text = isinstance(key, str) or isinstance(key, tuple) and all(isinstance(text, str) for text in key)
        groups.setdefault(key if is_text else index, []).append(index)
    if not groups:
        raise ValueError("The data is empty: pass a few hundred examples.")
    if len(groups) <= len(shares):
        raise ValueError(
            f"The data has {len(groups)} different examples or batches, too little for {len(shares) + 1} parts: pass "
            "a few hundred texts, or more and smaller batches."
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    members = list(groups.values())
    sizes = [max(1, round(share * len(groups))) for share in shares]
    while sum(sizes) >= len(groups):
        sizes[sizes.index(max(sizes))] -= 1
    parts, end = [], len(groups)
    for size in reversed(sizes):
        parts.append(order[end - size : end])
        end -= size
    parts.append(order[:end])
    chosen = [sorted(index for group in part for index in members[group]) for part in reversed(parts)]
    return [data.select(part) if is_data_set else [rows[index] for index in part] for part in chosen]


def sample_batches(loader: Iterable, number: int, seed: int = 0) -> list:
    """Some batches of a loader, chosen at random, in their order.

    The first batches are no sample where rows are sorted: with `group_by_length` they are the longest rows, and an
    epoch ends with the shortest.

    Args:
        loader: a `DataLoader`, or any other iterable of batches, which is read to its end.
        number (`int`): how many; all where there are not more.
        seed (`int`, *optional*, defaults to 0): of the choice.

    Returns:
        `list`: the batches; the first ones of a loader without a length.

    Example:

    ```python
    >>> from hf_normswap import sample_batches

    >>> sample_batches(["long", "medium", "short"] * 2, 3)
    ['long', 'long', 'short']

    ```
    """
    try:
        wanted = set(random.Random(seed).sample(range(len(loader)), min(number, len(loader))))
    except TypeError:
        return list(itertools.islice(loader, number))
    is_indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not is_indexed or loader.batch_sampler is None:
        return [batch for place, batch in enumerate(loader) if place in wanted]
    # Only the rows of these batches are read: an epoch of a large data set takes minutes.
    rows = [rows for place, rows in enumerate(loader.batch_sampler) if place in wanted]
    return list(DataLoader(loader.dataset, batch_sampler=rows, collate_fn=loader.collate_fn))


def refuse_non_finite(batches: Iterable[Mapping]) -> None:
    """Raises `ValueError` for inputs that are NaN or infinite."""
    for batch in batches:
        for name in ("inputs_embeds", *_KINDS):
            values = batch.get(name)
            if values is not None and values.is_floating_point() and not values.isfinite().all():
                raise ValueError(f"{name} of the data has values that are NaN or infinite: leave these examples out.")


def complete_batches(model: nn.Module, batches: list[dict]) -> list[dict]:
    """The batches with what the decoder of a model reads: labels, or else the model's own greedy output.

    Those of a module around swapped models stay as they are.

    Raises:
        ValueError: when there is not one real token, on all ranks together.
    """
    is_plain = not is_composite(model)
    tokens = sum(map(_count_tokens, batches)) if is_plain else len(batches)
    count, tokens = sum_over_ranks(torch.tensor([len(batches), tokens], device=device_of(model))).tolist()
    if not count:
        raise ValueError("The data is empty: pass a few hundred examples.")
    if not tokens:
        raise ValueError("The data has no real tokens, its attention_mask hides all of them: pass some text.")
    if not is_plain or not model.config.is_encoder_decoder:
        return batches
    return [batch if {"labels", "decoder_input_ids"} & set(batch) else _written(model, batch) for batch in batches]


def _count_tokens(batch: dict) -> int:
    if "input_ids" in batch:
        ids = batch["input_ids"]
    elif "inputs_embeds" in batch:
        ids = batch["inputs_embeds"][..., 0]
    else:  # images or sound, whose tokens the model makes
        return max(len(values) for values in batch.values())
    tokens = read_mask(batch.get("attention_mask"), (ids.shape[:-1].numel(), ids.shape[-1]))
    return ids.numel() if tokens is None else int(tokens.real.sum())


def _written(model, batch: dict) -> dict:
    """The batch with the model's own output as labels."""
    if not model.can_generate():
        raise ValueError("A decoder without a head writes nothing: pass batches with decoder_input_ids.")
    length = _decoder_positions(model.config) - 1
    # What the model's own settings may ask for in place of one text for each input.
    one = {"num_beams": 1, "do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}
    if "input_ids" in batch:
        length = min(2 * batch["input_ids"].shape[1] + 10, length)
    inputs = send_to_device(batch, model.device)
    # Whisper has a `generate` of its own, which adds a prompt and leaves it out of what it returns.
    written = GenerationMixin.generate(model, **inputs, **one, max_new_tokens=length)[:, 1:]
    labels = written.masked_fill(written == model.config.pad_token_id, -100)
    return {**batch, "labels": labels.to(next(iter(batch.values())).device)}


def _decoder_positions(config) -> int:
    """The longest output that the decoder takes."""
    for name in ("max_target_positions", "max_text_positions", "max_position_embeddings"):
        if limit := getattr(config, name, None):
            return limit
    return 512  # T5 and others without a limit


def _main_input(model) -> str:
    return getattr(model, "main_input_name", "input_ids")


def _kind_read_by(model) -> str:
    """The kind of data that the model reads; raises `ValueError` where rows of one kind are not enough."""
    main = _main_input(model)
    others = [name for name in _KINDS if name != "input_ids" and name in parameters_of(model)]
    if others and hasattr(model, "get_text_features"):  # two towers, as in CLIP
        raise ValueError(
            f"A {type(model).__name__} reads texts together with {_KINDS[others[0]]}: pass batches, as its processor "
            "makes them."
        )
    if main not in _KINDS:
        raise ValueError(
            f"A {type(model).__name__} reads {main}: pass batches, dictionaries of what its forward takes."
        )
    return _KINDS[main]


def _kind_of(model, row) -> str | None:
    """The kind of data that a row is, `None` for a batch and for what no model reads."""
    if _is_text(model, row):
        return _TEXTS
    if _is_image(row):
        return _IMAGES
    return _RECORDINGS if _is_recording(row) else None


def _is_image(row) -> bool:
    """Whether `row` is an image of PIL: none is where nobody has imported it."""
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(row, module.Image)


def _is_recording(row) -> bool:
    if isinstance(row, Mapping):
        return "array" in row
    if hasattr(row, "get_all_samples"):  # a decoder of `datasets`, which has the items of such a dictionary
        return True
    if isinstance(row, np.ndarray):
        return row.ndim == 1 and np.issubdtype(row.dtype, np.floating)
    if isinstance(row, torch.Tensor):
        return row.ndim == 1 and row.is_floating_point()
    return isinstance(row, tuple | list) and bool(row) and all(isinstance(value, float) for value in row)


def _is_text(model, row) -> bool:
    """Whether a row of data is a text, a pair of texts or a translation."""
    if isinstance(row, Mapping):
        return model.config.is_encoder_decoder and all(isinstance(text, str) for text in row.values())
    return isinstance(row, str) or (isinstance(row, tuple | list) and all(isinstance(text, str) for text in row))


def _is_of_datasets(data, *names: str) -> bool:
    """Whether `data` is an instance of one of these classes of `datasets`: of none where nobody has imported it."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(data, tuple(getattr(module, name) for name in names))


def _of_dataset(model, data: "Dataset", processor, batch_size) -> list[Mapping]:
    names, main = data.column_names, _main_input(model)
    if main in names:
        return _of_inputs(model, data, processor, batch_size)
    kind = _kind_read_by(model)
    if kind == _TEXTS and "translation" in names:
        return _of_texts(model, data["translation"], processor, batch_size)
    columns = [name for name in names if _is_column_of(kind, data.features[name])]
    if len(columns) not in ((1, 2) if kind == _TEXTS else (1,)):
        number, cure = ("one or two", "tokenize it") if kind == _TEXTS else ("one", f"make {main} of it")
        of = "text" if kind == _TEXTS else kind
        raise ValueError(
            f"The data set has columns {', '.join(names)}: keep the {number} of {of} with select_columns, or {cure}."
        )
    if kind == _RECORDINGS and _is_of_datasets(data.features[columns[0]], "Audio"):
        from datasets import Audio

        rate = _need(model, processor, "read recordings").sampling_rate
        data = data.cast_column(columns[0], Audio(sampling_rate=rate))
    if len(columns) == 2:
        return _of_texts(model, list(zip(*(data[name] for name in columns))), processor, batch_size)
    return _of_rows(model, kind, data[columns[0]], processor, batch_size)


def _of_inputs(model, data: "Dataset", processor, batch_size) -> list[Mapping]:
    """Batches of a data set that has the main input of the model."""
    main = _main_input(model)
    if main == "pixel_values":  # all of one size
        rows = data.with_format("torch", columns=[main])
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    processor = _need(model, processor, "pad a data set")
    kept = [name for name in data.column_names if name in (*processor.model_input_names, *_LABELS)]
    rows = list(data.select_columns(kept))
    return [_pad(model, processor, group) for group in _grouped(rows, lambda row: len(row[main]), batch_size)]


def _texts_of(data: "Dataset") -> Iterable:
    """The texts of each row of a data set, or its number where it has no columns of text."""
    columns = [name for name in data.column_names if _is_column_of(_TEXTS, data.features[name])]
    return zip(*(data[name] for name in columns)) if columns else range(len(data))


def _is_column_of(kind: str, feature) -> bool:
    """Whether a column of a data set has data of this kind."""
    if kind == _TEXTS:
        return getattr(feature, "dtype", None) in ("string", "large_string")
    if kind == _IMAGES:
        return _is_of_datasets(feature, "Image")
    samples = getattr(feature, "feature", None)  # of a list
    return _is_of_datasets(feature, "Audio") or str(getattr(samples, "dtype", "")).startswith("float")


def _of_rows(model, kind: str, rows: Sequence, processor, batch_size) -> list[Mapping]:
    """Batches of rows of one kind."""
    reads = _kind_read_by(model)
    if reads != kind:
        raise ValueError(f"The data has {kind}, and a {type(model).__name__} reads {reads}: pass these.")
    of_kind = {_TEXTS: _of_texts, _IMAGES: _of_images, _RECORDINGS: _of_recordings}[kind]
    return of_kind(model, rows, processor, batch_size)


def _of_images(model, rows: Sequence, processor, batch_size) -> list[Mapping]:
    processor = _need(model, processor, "read images")
    channels = _field(model.config, "num_channels", 3)
    if channels not in _MODES:
        raise ValueError(f"The model takes images of {channels} channels, not grey or RGB ones: pass batches.")

    def encode(group):
        _check_rows(group, _is_image, "images", "PIL images")
        return processor(images=[image.convert(_MODES[channels]) for image in group], return_tensors="pt")

    # A slice of a column decodes the images of one batch, not all of them at once.
    return [encode(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _of_recordings(model, rows: Sequence, extractor, batch_size) -> list[Mapping]:
    extractor = _need(model, extractor, "read recordings")
    waves = [_wave(row, extractor.sampling_rate) for row in rows]
    _check_rows(waves, _is_recording, "recordings", "one-dimensional arrays of floats")
    options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"}
    # Whisper and others always pad to one length, which their models need.
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    if padding is not None and not padding.default:
        options["padding"] = True
    return [extractor(group, **options) for group in _grouped(waves, len, batch_size)]


def _wave(row, rate: int):
    """The samples of a recording; anything else as it is."""
    if _is_recording(row) and (isinstance(row, Mapping) or hasattr(row, "get_all_samples")):
        if row["sampling_rate"] != rate:
            raise ValueError(
                f"A recording has {row['sampling_rate']} samples a second, and the feature extractor takes {rate}: "
                "resample it, as Dataset.cast_column with Audio(sampling_rate=...) does."
            )
        row = np.asarray(row["array"])
    return np.asarray(row) if _is_recording(row) else row


def _field(config, name: str, default):
    """A field of a configuration, or of the part of it that is about images."""
    for part in (config, getattr(config, "vision_config", None)):
        if (value := getattr(part, name, None)) is not None:
            return value
    return default


def _check_rows(rows: Iterable, is_right, kind: str, what: str) -> None:
    """Raises `ValueError` unless all rows are of one kind."""
    if not all(map(is_right, rows)):
        found = " and ".join(dict.fromkeys(map(_describe, rows)))
        raise ValueError(f"The data has {found} for {kind}: pass a list of {what}.")


def _of_texts(model, rows, tokenizer, batch_size) -> list[Mapping]:
    rows = list(rows)
    _check_texts(model, rows)
    tokenizer = _need(model, tokenizer, "read texts")
    limit = {"truncation": True, "max_length": min(tokenizer.model_max_length, _positions(model))}
    masking = None
    if _predicts_masked_tokens(model) and tokenizer.mask_token is not None:
        masking = DataCollatorForLanguageModeling(tokenizer, seed=1)
        masking.create_rng()

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
        encoded = tokenizer(*columns, padding=True, return_tensors="pt", **limit)
        if masking is not None:
            encoded["input_ids"], encoded["labels"] = masking.torch_mask_tokens(encoded["input_ids"])
        return encoded

    def length(row):
        return len(row) if isinstance(row, str) else sum(map(len, row.values() if isinstance(row, Mapping) else row))

    return [encode(group) for group in _grouped(rows, length, batch_size)]


def _positions(model) -> int:
    """The longest input that the model takes; a tokenizer does not always know."""
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize  # T5 has none
    # RoBERTa and its like count positions from behind the padding token on.
    tables = [
        module
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]
    return min([limit, *(table.num_embeddings - table.padding_idx - 1 for table in tables)])


def _grouped(rows: list, length, batch_size: int) -> list[list]:
    """Rows of similar length together, for little padding."""
    rows = sorted(rows, key=length)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def _pad(model, tokenizer, rows: list[dict]) -> Mapping:
    given = [[row.pop(name) for name in _LABELS if name in row] for row in rows]
    labels = [found[0] for found in given if found]
    batch = tokenizer.pad(rows, return_tensors="pt")
    if labels and isinstance(labels[0], list):  # of a translation, or of masked tokens; no other model reads them
        width = max(map(len, labels))
        pads = [[-100] * (width - len(row)) for row in labels]
        is_left = tokenizer.padding_side == "left" and _predicts_masked_tokens(model)
        pairs = zip(pads, labels) if is_left else zip(labels, pads)
        batch["labels"] = torch.tensor([first + second for first, second in pairs])
    return batch


def _need(model, processor, purpose: str):
    """The part of a processor that makes the main input of the model."""
    main, maker = _main_input(model), _MAKERS[_kind_read_by(model)]
    article = "An" if maker.startswith("i") else "A"
    if processor is None:
        raise ValueError(f"{article} {maker} is needed to {purpose}: pass tokenizer=....")
    parts = [getattr(processor, name.replace(" ", "_"), None) for name in _MAKERS.values()]
    for part in (*parts, processor):
        if main in getattr(part, "model_input_names", ()):
            break
    else:
        raise ValueError(
            f"A {type(processor).__name__} does not make {main}, which a {type(model).__name__} reads: pass the "
            f"{maker} of the model as tokenizer."
        )
    if getattr(part, "pad_token", "") is None:
        raise ValueError("The tokenizer has no padding token: set tokenizer.pad_token, for GPT-2 to its eos_token.")
    return part


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
    taken = set(parameters_of(model))
    if not model.config.is_encoder_decoder and not _predicts_masked_tokens(model):
        taken -= set(_LABELS)
    main = _main_input(model)
    inputs = {name: value for name, value in batch.items() if name in taken and isinstance(value, torch.Tensor)}
    for name in taken & batch.keys():  # a flag, such as return_loss of CLIP's processor, changes no activation
        value = batch[name]
        if isinstance(value, np.ndarray | list | tuple):
            maker = _MAKERS.get(_KINDS.get(main), "processor")
            raise ValueError(
                f"{name} of a batch is {_describe(value)}: make it a tensor, as the {maker} does with "
                f"return_tensors='pt', or pass a data set and the {maker}."
            )
    if "input_ids" in inputs:
        _check_ids(model, inputs["input_ids"])
    elif not {main, "inputs_embeds"} & set(inputs):
        is_text = main == "input_ids" and all(isinstance(value, str) for value in batch.values())
        cure = "the texts themselves, or Dataset.from_list(rows)" if is_text else "inputs of the model"
        raise ValueError(f"A batch has {', '.join(batch)} and no tensor {main}: pass {cure}.")
    return inputs


def _check_ids(model, ids: torch.Tensor) -> None:
    if ids.dim() < 2:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)}, that of one example: pass batches, as a DataLoader makes them."
        )
    if ids.is_floating_point():
        raise ValueError(f"input_ids is {ids.dtype}: token ids are whole numbers, and embeddings go to inputs_embeds.")
    size = vocabulary_of(model)
    if size and ids.numel() and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(
            f"input_ids go from {ids.min()} to {ids.max()}, and the model has {size} tokens: use the tokenizer of the "
            "model."
        )
