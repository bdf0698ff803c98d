"""What sentence-transformers needs beside a model goes along with it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast

from hf_normswap import NormSwapConfig, calibrate, copy_sentence_modules, fold_norms, save_stock, swap_norm
from hf_normswap.cli import main
from hf_normswap.core.files import atomic_directory
from tests.helpers.persistence import is_one_sentence


TEXTS = ["a cat sat on the mat", "the dog ran", "a mat", "the cat ran on a dog"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
MODULES = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
POOLING = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}


@pytest.fixture
def source(tmp_path):
    """A folder as the Hub has them, without one for the module that has no files."""
    folder = tmp_path / "source"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(**sizes, vocab_size=len(WORDS), initializer_range=0.2)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    names = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(MODULES)
    ]
    (folder / "modules.json").write_text(json.dumps(names))
    prompts = {"prompts": {"query": "the "}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    return folder


COPIED = ["1_Pooling", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"]


def test_files_are_copied(source, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    assert copy_sentence_modules(source, output) == COPIED
    for name in [*COPIED[1:], "1_Pooling/config.json"]:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert not (output / "config.json").exists()


def test_other_sources_have_nothing_to_copy(tmp_path):
    assert copy_sentence_modules(tmp_path, tmp_path / "output") == []
    assert copy_sentence_modules("someone/a-model", tmp_path / "output") == []
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"path": ""}, {"path": "../elsewhere"}], "is not in"),
        ([{"path": ""}, {"path": "/etc"}], "is not in"),
        ([{"path": "0_Transformer"}], "folder of its own"),
        ([{"name": "0"}], "no list of modules"),
        ({"path": ""}, "no list of modules"),
    ],
)
def test_a_list_that_leads_elsewhere_is_refused(modules, message, source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (source / "modules.json").write_text(json.dumps(modules))
    output = tmp_path / "output"
    with pytest.raises(ValueError, match=message) as error:
        copy_sentence_modules(source, output)
    assert is_one_sentence(error.value)
    assert not output.exists()


@pytest.mark.parametrize("verb", ["swap", "calibrate", "convert", "fold"])
def test_the_command_line_keeps_the_folder_one_of_sentence_transformers(verb, source, tmp_path):
    output, texts = tmp_path / "output", tmp_path / "texts.txt"
    texts.write_text("\n".join([*TEXTS, "the the", "the"]))
    command = [verb, str(source), str(output), "--norm", "rbn"]
    assert main(command if verb == "swap" else [*command, "--texts", str(texts)]) == 0
    assert all((output / name).exists() for name in COPIED)


def embeddings_of(folder):
    """Mean pooling and unit length, by hand."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), BertTokenizerFast.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    return pooled / pooled.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("kind", ["calibrated", "folded", "stock"])
def test_sentence_transformers_loads_it(kind, source, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, tokenizer = BertModel.from_pretrained(source).eval(), BertTokenizerFast.from_pretrained(source)
    swap_norm(model, NormSwapConfig("batchnorm", center_tokens=kind == "stock"), where="all")
    calibrate(model, TEXTS, tokenizer=tokenizer)
    output = tmp_path / "output"
    if kind == "folded":
        fold_norms(model)
    if kind == "stock":
        save_stock(model, output)
    else:
        model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    copy_sentence_modules(source, output)
    encoder = sentence_transformers.SentenceTransformer(str(output), device="cpu")
    assert encoder.prompts["query"] == "the "
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    assert (found - embeddings_of(output)).abs().max() < 1e-5


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    """Nothing can take its place in the end, as in `docker run -v ./out:/out`."""
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="is a mount point") as error, atomic_directory(tmp_path):
        raise AssertionError("The work began.")
    assert is_one_sentence(error.value)
    with atomic_directory(tmp_path / "inside") as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
