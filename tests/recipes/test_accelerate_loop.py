"""The loop without the Trainer trains as the Trainer does."""

import pytest

import accelerate_loop
import glue
from hf_normswap.results import load_results
from tests.recipes.conftest import write_task


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
