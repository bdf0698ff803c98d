"""The recipe of language modelling, on tiny data."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from hf_normswap.reporting.results import load_results
from recipes import lm
from recipes.loading import apply_norm_args
from recipes.vocabulary import train_tokenizer
from tests.helpers.recipes import sentences


SIZES = {
    "gpt2": '{"n_embd": 16, "n_layer": 1, "n_head": 2}',
    "bert": '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}',
    "roberta": '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}',
}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for number, (split, count) in enumerate({"train": 120, "validation": 30, "test": 25}.items()):
        rows = {"text": [*sentences(count, number), "", "  "]}
        Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.fixture
def run(tmp_path, text):
    def run(*options, norm="rbn"):
        fixed = ["--max_steps=3", "--learning_rate=0.01", "--logging_steps=1", "--use_cpu", "--block_size=16"]
        names = [f"--dataset_name={text}", f"--norm={norm}", f"--output_dir={tmp_path / 'output'}"]
        lm.main([*names, *fixed, "--disable_tqdm=true", *options])
        return load_results(tmp_path / "output" / "result.json")[0]

    return run


@pytest.mark.parametrize("family", SIZES)
def test_from_scratch(family, run, tmp_path):
    options = [f"--model_type={family}", f"--config_overrides={SIZES[family]}", "--vocab_size=300"]
    result = run(*options, "--test_split=test", "--where=all", "--eval_strategy=steps", "--eval_steps=3")
    metrics = result["metrics"]
    assert set(metrics) == {"loss", "perplexity", "test_loss", "test_perplexity"}
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert result["model"] == f"{family} from scratch"
    last = [entry for entry in result["history"] if "eval_perplexity" in entry][-1]
    assert last["eval_perplexity"] == pytest.approx(metrics["perplexity"], rel=1e-5)
    auto = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    assert auto.from_pretrained(tmp_path / "output").config.norm_swap["norms"][0]["norm"] == "rbn"


def test_a_model_that_is_converted_after_its_training_is_scored_twice(run):
    options = ["--model_type=gpt2", f"--config_overrides={SIZES['gpt2']}", "--vocab_size=300", "--convert=40"]
    metrics = run(*options, norm="layernorm")["metrics"]
    assert set(metrics) == {"loss", "perplexity", "converted_loss", "converted_perplexity"}
    assert metrics["converted_loss"] == pytest.approx(metrics["loss"], rel=0.1)
    assert metrics["converted_loss"] != metrics["loss"]


def test_the_perplexity_is_that_of_the_saved_model(run, tmp_path, text):
    """Over the words of the validation split, in blocks, each but the first predicted from those before it."""
    options = ["--model_type=gpt2", f"--config_overrides={SIZES['gpt2']}", "--vocabulary=words", "--vocab_size=50"]
    result = run(*options, norm="powernorm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output").eval()
    words = " </s> ".join(sentences(30, 1)).split() + ["</s>"]
    ids = tokenizer.convert_tokens_to_ids(words)
    blocks = torch.tensor([ids[start : start + 16] for start in range(0, len(ids) - 15, 16)])
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    assert result["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert len(tokenizer) < 30


def test_a_trained_model_goes_on(run, tmp_path, model_folder):
    BertForMaskedLM.from_pretrained(model_folder).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "bert")
    first = run(f"--model_name_or_path={tmp_path / 'bert'}")
    second = run(f"--model_name_or_path={tmp_path / 'bert'}", norm="layernorm")
    assert first["norm"] == "rbn"
    # The masks of the evaluation are the same ones.
    assert first["metrics"]["loss"] != second["metrics"]["loss"]
    assert run(f"--model_name_or_path={tmp_path / 'bert'}", norm="layernorm")["metrics"] == second["metrics"]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, assert_resumes):
    assert_resumes(run, "--model_type=bert", f"--config_overrides={SIZES['bert']}", "--vocab_size=300")


def test_the_weights_of_the_paper_are_said(run, capsys):
    options = ["--model_type=gpt2", f"--config_overrides={SIZES['gpt2']}", "--per_device_train_batch_size=4"]
    run(*options, '--norm_options={"distance": "var_l1", "lambda_mean": 0.5}')
    assert "lambda_mean 0.5 of a mean loss is 32 of a sum over 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either model_name_or_path"),
        (["--model_type=gpt2", "--model_name_or_path=x"], "either model_name_or_path"),
        (["--model_type=t5"], "invalid choice: 't5'"),
        (["--model_type=gpt2", "--config_overrides=[1]"], "no JSON object"),
        (["--model_type=gpt2", "--block_size=4000"], "less than one block"),
        (["--model_type=gpt2", "--text_column=words"], "has no column 'words'"),
    ],
)
def test_bad_input_is_refused(run, refused, options, message):
    refused(lambda: run(*options), message)


def test_the_real_data_is_read():
    root = os.environ.get("NORMSWAP_DATA")
    if not root or not Path(root, "ptb-text-only").is_dir():
        pytest.skip("NORMSWAP_DATA names no folder with ptb-text-only/ptb_text_only")
    data = lm.load_splits(str(Path(root, "ptb-text-only/ptb_text_only")), None, ["train", "validation"], ["text"])
    assert len(data["train"]) == 42068


def test_a_special_token_that_is_a_word_of_the_text():
    """As <unk> is in Penn Treebank: every token has a number below the size of the vocabulary."""
    lines = ["the <unk> runs", "a dog <unk> the mask", "the <mask> of <s> dog"] * 4
    tokenizer = train_tokenizer(iter(lines), "$A </s>", 16, 100, words=True)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer("the <unk> zebra")["input_ids"][1:] == [tokenizer.unk_token_id] * 2 + [tokenizer.eos_token_id]


def test_seed_0_masks_alike_in_every_run():
    tokenizer = train_tokenizer(iter(sentences(50)), "<s> $A </s>", 16, 60, words=True)
    rows = Dataset.from_dict({"input_ids": tokenizer(sentences(20))["input_ids"]}).filter(
        lambda row: len(row["input_ids"]) > 2
    )
    arguments = SimpleNamespace(mlm_probability=0.5)
    masked = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        masked.append(lm.mask(rows, tokenizer, arguments, seed=0)["labels"][:])
    assert masked[0] == masked[1]
    assert masked[0] != lm.mask(rows, tokenizer, arguments, seed=1)["labels"][:]


def test_a_new_model_gets_the_weights_of_its_norm_and_its_placement():
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    args = {"norm_options": {}, "calibrate": 0, "where": ["all"], "placement": None}

    def weights(is_new, **options):
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
        apply_norm_args(model, None, SimpleNamespace(**{"norm": None, **args, **options}), None, is_new=is_new)
        layer = model.bert.encoder.layer[1]
        return layer.attention.self.value.weight, layer.output.dense.weight

    for options, factors in [
        ({"norm": "fixup"}, (0.5, 0)),  # 4 branches of two layers: 4 ** (-1 / 2)
        ({"placement": "deep"}, (0.5, 0.5)),  # (8 · 2) ** (-1 / 4)
        ({"placement": "peri"}, (1, 1)),
    ]:
        for is_new in (True, False):
            for old, new, factor in zip(weights(False), weights(is_new, **options), factors, strict=True):
                torch.testing.assert_close(new, old * (factor if is_new else 1))
