"""Tiny GLUE folders and a tiny checkpoint, for recipes that run in seconds."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BertConfig, BertModel, BertTokenizer


WORDS = "the a good bad film plot is was not very dull bright".split()


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
