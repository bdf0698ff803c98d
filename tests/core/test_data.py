"""Data of every kind as batches; of a wrong kind, what it is and what to pass."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertTokenizer, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_normswap import calibrate, convert_norms, make_batches, sample_batches, swap_norm
from hf_normswap.core.data import complete_batches
from tests.helpers.calibration import WORDS, states
from tests.helpers.counting import SPELLINGS
from tests.helpers.models import tiny_model
from tests.helpers.persistence import is_one_sentence


IDS = torch.randint(5, 30, (4, 6), generator=torch.Generator().manual_seed(0))
TEXTS = ["word1 word2", "word3"]


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=24)


class Examples(torch.utils.data.Dataset):
    """A data set of PyTorch: examples, not batches."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index >= 2:
            raise IndexError
        return {"input_ids": IDS[index]}


def stream():
    return IterableDataset.from_generator(lambda: iter([{"text": "word1"}]))


# Each with a part of what the error says: what the data is, and what to pass.
REFUSED = {
    "tuples of tensors": ([(IDS, IDS)], r"yields a tuple of 2 Tensor: .*dictionaries of tensors, such as"),
    "loader of tensors": (DataLoader(TensorDataset(IDS, IDS), 2), r"yields a list of 2 Tensor: .*dictionaries"),
    "data set of tensors": (TensorDataset(IDS, IDS), r"yields a tuple of 2 Tensor"),
    "tensor": (IDS, r"yields a Tensor: .*dictionaries"),
    "ids": ([[5, 6, 7], [8, 9]], r"yields a list of 3 int: .*dictionaries"),
    "lists of batches": ([[{"input_ids": IDS}]], r"yields a list of 1 dict"),
    "bytes": ([b"word1"], r"yields a bytes"),
    "lists for tensors": ([{"input_ids": [[5, 6, 7]]}], r"input_ids of a batch is a list of 1 list: .*return_tensors"),
    "arrays for tensors": ([{"input_ids": IDS.numpy()}], r"input_ids of a batch is a ndarray: .*tensor"),
    "examples": ([{"input_ids": IDS[0]}], r"shape \(6,\), that of one example: pass batches"),
    "data set of examples": (Examples(), r"shape \(6,\), that of one example: .*DataLoader"),
    "embeddings for ids": ([{"input_ids": IDS.float()}], r"torch.float32: token ids are whole numbers"),
    "ids of another tokenizer": ([{"input_ids": IDS + 90}], r"from 9\d to 1\d\d, and the model has 40 tokens"),
    "ids below 0": ([{"input_ids": IDS - 99}], r"from -9\d to -\d\d, and the model has 40 tokens"),
    "stream": (stream(), r"a stream: .*Dataset.from_list"),
    "splits of streams": (IterableDatasetDict({"train": stream()}), r"splits train"),
    "splits": (DatasetDict({"train": Dataset.from_dict({"text": TEXTS})}), r"splits train"),
    "rows of text": ([{"text": "word1"}], r"has text and no tensor input_ids: pass the texts themselves"),
    "table": (pd.DataFrame({"text": TEXTS}), r"a DataFrame: pass its column"),
    "missing text": (["word1", None], r"a str and None for texts"),
    "missing text in a data set": (Dataset.from_dict({"text": ["word1", None]}), r"a str and None for texts"),
    "triples": ([("word1", "word2", "word3")], r"a tuple of 3 str for texts: .*pairs"),
    "texts and pairs": (["word1", ("word2", "word3")], r"a str and a tuple of 2 str for texts"),
    "texts and batches": (["word1", {"input_ids": IDS}], r"a str and a dict for texts"),
    "pairs that lack one": ([("word1", "word2"), ("word3",)], r"a tuple of 2 str and a tuple of 1 str for texts"),
    "path": (Path("texts.txt"), r"is a PosixPath: pass a list of texts"),
    "nothing": (None, r"is a NoneType: pass"),
    "class": (Dataset, r"is a type: pass"),
    "bytes alone": (b"word1", r"single text"),
}


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_kinds_say_what_they_are(case, with_tokenizer, tokenizer):
    data, message = REFUSED[case]
    model = swap_norm(tiny_model("bert").eval(), "batchnorm", where="all")
    before = states(model)
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(model, data, tokenizer=tokenizer if with_tokenizer else None)
    assert is_one_sentence(caught.value), caught.value
    assert all(torch.equal(value, before[name]) for name, value in states(model).items())


def test_sources_alone_are_no_pairs(tokenizer):
    model = tiny_model("marian")
    with pytest.raises(ValueError, match="a tuple of 1 str for texts"):
        make_batches(model, [("word1",)], tokenizer)
    assert "labels" in make_batches(model, [("word1", "word2")], tokenizer)[0]
    assert "labels" not in make_batches(model, ["word1"], tokenizer)[0]


def test_a_tokenizer_that_cannot_pad_is_refused(tokenizer):
    without = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, pad_token=None)
    for data in (TEXTS, Dataset.from_dict({"input_ids": [[5, 6], [7]]})):
        with pytest.raises(ValueError, match="no padding token"):
            make_batches(tiny_model("bert"), data, without)
        assert make_batches(tiny_model("bert"), data, tokenizer)


@pytest.mark.parametrize("style", [None, "torch", "numpy"])
def test_the_format_of_a_data_set_does_not_matter(style, tokenizer):
    """In another format than lists, labels were left out, and the model's own output stood for them."""
    rows = {"input_ids": [[5, 6, 7], [8, 9]], "attention_mask": [[1, 1, 1], [1, 1]], "labels": [[7, 8], [9, 10, 11]]}
    data = Dataset.from_dict(rows)
    (batch,) = make_batches(tiny_model("marian"), data.with_format(style), tokenizer)
    assert batch["labels"].tolist() == [[9, 10, 11], [7, 8, -100]]
    assert batch["input_ids"].tolist() == [[8, 9, 0], [5, 6, 7]]


def test_more_that_is_right(tokenizer):
    model, expected = tiny_model("bert"), make_batches(tiny_model("bert"), TEXTS, tokenizer)
    for data in (pd.Series(TEXTS), tuple(TEXTS), np.array(TEXTS), [[text] for text in TEXTS], iter(TEXTS)):
        batches = make_batches(model, data, tokenizer)
        assert all(torch.equal(batch["input_ids"], other["input_ids"]) for batch, other in zip(batches, expected))
    choices = tiny_model("bert", "BertForMultipleChoice")
    assert make_batches(choices, [{"input_ids": IDS[None]}])[0]["input_ids"].shape == (1, 4, 6)


class Around(nn.Module):
    """A module that calls a swapped model with inputs of other names."""

    def __init__(self, **more):
        super().__init__()
        self.inside = swap_norm(tiny_model("bert"), "batchnorm")

    def forward(self, query, mask=None):
        return self.inside(query, attention_mask=mask)


class TakesAll(Around):
    def forward(self, extra=None, **inputs):
        return self.inside(**inputs["nested"])


def test_batches_of_a_module_around_swapped_models():
    batch = {"query": IDS, "mask": torch.ones_like(IDS), "idx": torch.arange(4)}
    assert make_batches(Around(), [batch])[0].keys() == {"query", "mask"}
    nested = {"nested": {"input_ids": IDS}, "note": "kept as it is"}
    assert make_batches(TakesAll(), [nested]) == [nested]
    assert complete_batches(Around(), make_batches(Around(), [batch]))
    with pytest.raises(ValueError, match="data is empty"):
        complete_batches(Around(), [])


@pytest.mark.parametrize("data", [TEXTS, [("word1", "word2")], Dataset.from_dict({"text": TEXTS}), [(IDS,)]])
def test_a_module_around_swapped_models_takes_batches_alone(data, tokenizer):
    with pytest.raises(ValueError, match="Around takes neither texts nor a data set: pass batches") as caught:
        make_batches(Around(), data, tokenizer)
    assert is_one_sentence(caught.value)


# Masks of other forms than (B, T)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_real_tokens_are_counted_in_masks_of_every_form(spelling):
    """0 stands for a real token in an additive mask."""
    model = tiny_model("bert").eval()
    seen = torch.ones(4, 1, 1, 6, dtype=torch.bool)
    batch = {"input_ids": IDS, "attention_mask": SPELLINGS[spelling](seen)}
    assert complete_batches(model, [batch]) == [batch]
    nothing = {"input_ids": IDS, "attention_mask": SPELLINGS[spelling](~seen)}
    assert complete_batches(model, [nothing, batch]) == [nothing, batch]
    with pytest.raises(ValueError, match="no real tokens"):
        complete_batches(model, [nothing])


# Batches of a sorted loader


@pytest.mark.parametrize("number", [1, 10, 99, 100, 1000])
def test_batches_of_a_loader_are_chosen_at_random(number):
    loader = DataLoader(list(range(100)), batch_size=1)
    found = [int(batch) for batch in sample_batches(loader, number)]
    assert len(set(found)) == min(number, 100)
    assert found == sorted(found)
    assert found == [int(batch) for batch in sample_batches(loader, number)]
    assert (found == [int(batch) for batch in sample_batches(loader, number, seed=1)]) == (number >= 100)


def test_rows_that_are_not_chosen_are_not_read():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            read.append(index)
            return {"input_ids": torch.tensor([index])}

    read, loader = [], DataLoader(Rows(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    found = sample_batches(loader, 3)
    assert [batch["input_ids"].shape for batch in found] == [(4, 1)] * 3
    assert read == torch.cat([batch["input_ids"] for batch in found]).flatten().tolist()
    assert sample_batches(DataLoader(Rows(), batch_size=None), 2)[1].keys() == {"input_ids"}
    assert len(sample_batches(DataLoader(stream(), batch_size=1), 2)) == 1


def test_a_stream_with_a_length_ends():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 10

        def __iter__(self):
            return iter(range(10))

    assert len(sample_batches(DataLoader(Stream(), batch_size=2), 3)) == 3


def test_batches_of_a_loader_without_a_length_are_the_first_ones():
    assert sample_batches((batch for batch in "abc"), 2) == ["a", "b"]


def test_batches_of_grouped_rows_have_the_lengths_of_all_rows():
    """Half of an epoch that begins with the longest rows."""
    lengths = torch.randint(1, 60, (4000,)).tolist()
    sampler = LengthGroupedSampler(8, lengths=lengths, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(lengths, batch_size=8, sampler=sampler)
    first = torch.cat(list(itertools.islice(loader, 25))).float()
    spread = torch.cat(sample_batches(loader, 25)).float()
    everything = torch.tensor(lengths).float()
    assert first.mean() > everything.mean() + 5
    assert abs(spread.mean() - everything.mean()) < 3


@pytest.mark.parametrize("kind", [list, lambda texts: Dataset.from_dict({"text": texts})])
def test_texts_without_tokens_are_left_out(kind):
    """A tokenizer without special tokens makes nothing of an empty text, and empty texts fill batches of their own."""
    backend = tokenizers.Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    model = tiny_model("gpt2").eval()
    found = make_batches(model, kind(["word1 word2"] * 6 + [""] * 9), plain, batch_size=4)
    assert sum(int(batch["attention_mask"].sum()) for batch in found) == 12
    assert all(batch["input_ids"].numel() for batch in found)
    convert_norms(model, kind([f"word{n} word{n + 1}" for n in range(20)] + [""] * 9), tokenizer=plain, batch_size=4)
    with pytest.raises(ValueError, match="The data is empty"):
        calibrate(swap_norm(tiny_model("gpt2").eval(), "batchnorm"), kind(["", ""]), tokenizer=plain)


@pytest.mark.parametrize("value", [np.ones((4, 6), dtype=int), [[1] * 6] * 4, (1, 1)])
def test_what_is_no_tensor_is_not_left_out_in_silence(value):
    """A mask that is dropped makes padding count."""
    with pytest.raises(ValueError, match="attention_mask of a batch is an? ") as error:
        make_batches(tiny_model("bert"), [{"input_ids": IDS, "attention_mask": value}])
    assert is_one_sentence(error.value)


def test_what_the_forward_does_not_take_may_be_anything():
    (batch,) = make_batches(
        tiny_model("bert"), [{"input_ids": IDS, "text": TEXTS, "attention_mask": None, "use_cache": False}]
    )
    assert list(batch) == ["input_ids"]


def test_the_labels_of_tokens_go_before_that_of_a_text(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7], "label": 1, "labels": [-100, 6, -100]},
        {"input_ids": [8], "labels": [8], "label": 0},
    ]
    (batch,) = make_batches(tiny_model("bert", "BertForMaskedLM"), Dataset.from_list(rows), tokenizer)
    assert batch["labels"].tolist() == [[8, -100, -100], [-100, 6, -100]]  # by length


@pytest.mark.parametrize("setting", [{"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True}])
def test_what_a_model_writes_does_not_depend_on_its_settings(setting):
    model = tiny_model("marian").eval()
    batch = {"input_ids": IDS}
    (expected,) = complete_batches(model, [batch])
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    (found,) = complete_batches(model, [batch])
    assert torch.equal(found["labels"], expected["labels"])
