"""The recipe of images, on the handwritten digits of scikit-learn."""

import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_normswap import find_norms
from hf_normswap.reporting.results import load_results
from recipes import image_classification


CHANCE = 0.1
SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of PNGs for each class, for training, validation and test."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    data = load_digits()
    for number, (pixels, label) in enumerate(zip(data.images[:480], data.target)):
        split = "train" if number < 320 else "validation" if number < 400 else "test"
        path = folder / split / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
    return str(folder)


@pytest.fixture
def run(tmp_path, digits):
    def run(*options, sizes=SIZES, data=digits):
        start = [] if any("model_name_or_path" in option for option in options) else ["--model_type=vit"]
        fixed = [f"--dataset_name={data}", *start, f"--config_overrides={json.dumps(sizes)}", "--max_steps=2"]
        fixed += ["--use_cpu", "--disable_tqdm=true", "--learning_rate=1e-2", "--logging_steps=10"]
        fixed += [
            "--per_device_train_batch_size=64",
            "--per_device_eval_batch_size=100",
            "--dataloader_pin_memory=false",
        ]
        image_classification.main([*fixed, f"--output_dir={tmp_path / 'output'}", *options])
        return load_results(tmp_path / "output" / "result.json")[0]

    return run


@pytest.mark.parametrize("norm", ["batchnorm", None])
def test_a_vit_learns_from_scratch(norm, run, digits, tmp_path):
    """The score is that of the saved model with its saved processor. Without a norm it is the baseline."""
    options = [f"--norm={norm}", "--where=all"] if norm else []
    result = run(*options, "--max_steps=40", "--test_split=test")
    assert (result["task"], result["norm"], result["model"]) == ("digits", norm or "layernorm", "vit from scratch")
    assert result["arguments"]["train_examples"] == 320
    assert result["arguments"]["eval_examples"] == 160
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "output").eval()
    assert {site.kind for site in find_norms(model) if norm or site.stack} == {norm or "layernorm"}
    assert model.config.id2label == {number: str(number) for number in range(10)}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "output")
    for split, score in {"validation": "accuracy", "test": "test_accuracy"}.items():
        rows = load_dataset(digits, split=split, cache_dir=tmp_path / "cache")
        batch = processor(images=[image.convert("L") for image in rows["image"]], return_tensors="pt")
        with torch.no_grad():
            right = model(**batch).logits.argmax(-1) == torch.tensor(rows["label"][:])
        assert result["metrics"][score] == pytest.approx(right.double().mean().item())
        assert result["metrics"][score] > 4 * CHANCE


@pytest.mark.parametrize("layout", ["colours", "parquet"])
def test_a_checkpoint_goes_on_with_calibrated_norms(layout, run, digits, tmp_path):
    sizes = {**SIZES, "num_channels": 3}
    ViTForImageClassification(ViTConfig(**sizes, num_labels=4)).base_model.save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    data, more = digits, []
    if layout == "parquet":
        columns = {"image": "picture", "label": "digit"}
        for split, rows in load_dataset(digits, cache_dir=tmp_path / "cache").items():
            (tmp_path / "saved").mkdir(exist_ok=True)
            rows.rename_columns(columns).to_parquet(tmp_path / "saved" / f"{split}-00000-of-00001.parquet")
        data, more = tmp_path / "saved", ["--image_column=picture", "--label_column=digit"]
    options = ["--norm=rbn", "--calibrate=64", "--validation_share=0.2", *more]
    result = run(f"--model_name_or_path={tmp_path / 'base'}", *options, sizes={}, data=data)
    assert (result["model"], result["norm"]) == ("base", "rbn")
    assert result["arguments"]["train_examples"] == 256
    assert len(result["norm_swap"]["calibration"]) == 4
    again = run(f"--model_name_or_path={tmp_path / 'output'}", "--validation_share=0.2", *more, sizes={}, data=data)
    assert again["norm"] == "rbn"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, assert_resumes):
    """transformers saves the weights of ViT under other names than they have in the model."""
    assert_resumes(lambda *options: run("--norm=rbn", *options))


def test_the_best_model_is_what_is_saved(run, tmp_path):
    """The learning rate is so large that the first checkpoint is the best one."""
    options = ["--max_steps=12", "--eval_strategy=steps", "--save_strategy=steps", "--eval_steps=2", "--save_steps=2"]
    options += ["--load_best_model_at_end", "--metric_for_best_model=loss", "--early_stopping=2", "--learning_rate=9"]
    result = run("--norm=batchnorm", *options)
    losses = [entry["eval_loss"] for entry in result["history"] if "eval_loss" in entry]
    best = 2 * (1 + int(np.argmin(losses)))
    assert len(losses) == best // 2 + 2
    weights = "model.safetensors"
    assert (tmp_path / "output" / weights).read_bytes() == (
        tmp_path / "output" / f"checkpoint-{best}" / weights
    ).read_bytes()


@pytest.mark.parametrize("family", ["deit", "swin"])
def test_other_families(family, run, tmp_path):
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    sizes |= {
        "deit": {key: SIZES[key] for key in SIZES if key not in sizes},
        "swin": {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2},
    }[family]
    result = run(f"--model_type={family}", "--norm=batchnorm", "--where=all", sizes=sizes)
    assert (result["model"], result["norm"]) == (f"{family} from scratch", "batchnorm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_type=vitt"], "There is no model_type 'vitt' for images: did you mean 'vit'?"),
        (["--model_type=bert"], "There is no model_type 'bert' for images"),
        (["--model_name_or_path=nowhere/at-all", "--model_type=vit"], "Say either model_name_or_path, to go on, or"),
        (["--model_name_or_path=nowhere/at-all"], "nowhere/at-all cannot be loaded"),
        (["--image_column=img"], "has no column 'img', only image, label"),
        (["--image_column=label"], "image_column and label_column are both 'label'"),
        (["--validation_split=dev"], "has no split 'dev', only train, validation, test"),
        (["--validation_share=1"], "validation_share is a share of the training split, not 1.0"),
        (["--norm=bachnorm"], "did you mean 'batchnorm'"),
        (["--where=decoder"], "matches"),
        (["--vocab_size=30"], "There is no option 'vocab_size'"),
    ],
)
def test_bad_input_is_refused(options, message, run, refused):
    refused(lambda: run(*options), message)


def test_a_column_of_texts_is_refused(run, sst2, refused):
    options = [f"--dataset_name={sst2}", "--dataset_config_name=sst2", "--image_column=sentence"]
    refused(lambda: run(*options), "The column 'sentence' of")
