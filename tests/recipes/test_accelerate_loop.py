"""The loop without the Trainer trains as the Trainer does."""

import pytest

from hf_normswap.reporting.results import load_results
from recipes import accelerate_loop, glue
from tests.helpers.recipes import write_task


@pytest.mark.parametrize(("norm", "accumulation"), [("rbn", 1), ("powernorm", 2), ("batchnorm", 1)])
def test_its_losses_are_those_of_the_trainer(norm, accumulation, tmp_path, model_folder):
    data = write_task(tmp_path / "glue", "sst2", {"train": 96, "validation": 10})
    shared = [f"--dataset_name={data}", f"--model_name_or_path={model_folder}", f"--norm={norm}", "--task_name=sst2"]
    shared += ["--max_length=20", "--max_steps=20", "--learning_rate=0.01", "--per_device_train_batch_size=8"]
    shared += ["--use_cpu", f"--gradient_accumulation_steps={accumulation}", "--seed=3"]
    accelerate_loop.main([*shared, f"--output_dir={tmp_path / 'loop'}"])
    more = ["--logging_steps=1", "--warmup_steps=0.1", "--weight_decay=0", "--disable_tqdm=true", "--save_strategy=no"]
    glue.main([*shared, *more, f"--output_dir={tmp_path / 'trainer'}"])
    (loop,), (trainer,) = (load_results(tmp_path / name / "result.json") for name in ("loop", "trainer"))
    penalties = [entry.get("rbn_penalty", 0.0) for entry in trainer["history"] if "loss" in entry]
    losses = [entry["loss"] for entry in trainer["history"] if "loss" in entry]
    task_losses = [loss - penalty for loss, penalty in zip(losses, penalties, strict=True)]
    assert [entry["loss"] for entry in loop["history"]] == pytest.approx(task_losses, abs=2e-5)
    assert len(losses) == 20
    assert loop["metrics"] == trainer["metrics"]
    assert loop["norm_swap"] == trainer["norm_swap"]


@pytest.mark.parametrize("option", ["--progressive=0.5", "--early_stopping=2", "--convert=8", "--reestimate=8"])
def test_what_the_loop_does_not_do_is_refused(option, refused, model_folder, sst2, tmp_path):
    options = ["--task_name=sst2", f"--dataset_name={sst2}", f"--model_name_or_path={model_folder}", option]
    options += ["--norm=rbn"] if option == "--reestimate=8" else []
    message = f"This loop has no {option.strip('-').partition('=')[0]}"
    refused(lambda: accelerate_loop.main([*options, f"--output_dir={tmp_path / 'loop'}"]), message)


def test_a_test_split_is_scored_too(model_folder, tmp_path):
    data = write_task(tmp_path / "glue", "sst2", {"train": 24, "validation": 10, "test": 9})
    options = ["--task_name=sst2", f"--dataset_name={data}", f"--model_name_or_path={model_folder}", "--use_cpu"]
    options += ["--max_length=20", "--max_steps=1", "--test_split=test", "--validation_share=0.25"]
    accelerate_loop.main([*options, f"--output_dir={tmp_path / 'loop'}"])
    (result,) = load_results(tmp_path / "loop" / "result.json")
    assert set(result["metrics"]) == {"accuracy", "test_accuracy"}
