"""Tiny GLUE folders and a tiny checkpoint, for recipes that run in seconds."""

import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertModel, BertTokenizer


WORDS = "the a good bad film plot is was not very dull bright".split()


@pytest.fixture(autouse=True)
def caches_of_its_own(tmp_path, monkeypatch):
    # Offline, `datasets` takes what an earlier run left in its cache for the data set of that name.
    for module in ("datasets.config", "recipes.loading"):
        monkeypatch.setattr(f"{module}.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A stock BERT of two layers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=24)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=24,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(count, offset=0):
    return [
        " ".join(WORDS[(offset + 3 * i + j * (1 + i % 5)) % len(WORDS)] for j in range(3 + i % 7))
        for i in range(count)
    ]


def write_task(folder, config, splits, columns=("sentence",), classes=2, label="label", label_type=None):
    """Writes parquet files and the README by which the Hub, and `datasets`, know them."""
    features = Features(
        {name: Value("string") for name in columns} | {label: label_type or ClassLabel(num_classes=classes)}
    )
    readme = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for number, (split, count) in enumerate(splits.items()):
        rows = {name: sentences(count, number + place) for place, name in enumerate(columns)}
        rows[label] = [i % classes if label_type is None else (i % 11) / 2 for i in range(count)]
        (folder / config).mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
        readme += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*readme, "---", ""]))
    return str(folder)


@pytest.fixture
def sst2(tmp_path):
    return write_task(tmp_path / "glue", "sst2", {"train": 24, "validation": 10})


@pytest.fixture
def assert_resumes(tmp_path):
    """Runs a recipe, then goes on from its checkpoint of step 2: the weights are the same, bit for bit."""

    def assert_resumes(run, *options):
        weights = tmp_path / "output" / "model.safetensors"
        run(*options, "--max_steps=4", "--save_strategy=steps", "--save_steps=2")
        uninterrupted = weights.read_bytes()
        weights.unlink()
        run(*options, "--max_steps=4", f"--resume_from_checkpoint={tmp_path}/output/checkpoint-2")
        assert weights.read_bytes() == uninterrupted

    return assert_resumes


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that a run is refused in one sentence, before anything is written."""

    def refused(call, message):
        before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        with pytest.raises(SystemExit) as exit:
            call()
        assert exit.value.code == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert message in error[0]
        assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before

    return refused


@pytest.fixture(scope="session")
def real_glue():
    """The real data set, laid out as on the Hub."""
    root = os.environ.get("NORMSWAP_DATA")
    if not root or not Path(root, "nyu-mll", "glue").is_dir():
        pytest.skip("NORMSWAP_DATA names no folder with nyu-mll/glue")
    return str(Path(root, "nyu-mll", "glue"))
