"""A run whose processes are killed goes on from its last whole checkpoint, to the same weights."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_normswap.checkpoints import find_last_checkpoint
from tests.distributed.launch import TORCHRUN, run, start
from tests.recipes.conftest import model_folder, write_task  # noqa: F401


STEPS = 24


@pytest.fixture
def command(tmp_path, model_folder):  # noqa: F811
    data = write_task(tmp_path / "glue", "sst2", {"train": 64, "validation": 10})

    def command(output, *options):
        shared = [f"--dataset_name={data}", f"--model_name_or_path={model_folder}", "--task_name=sst2"]
        shared += ["--max_length=20", "--learning_rate=0.01", "--use_cpu", "--norm=rbn", "--where=all"]
        shared += [f"--max_steps={STEPS}", "--save_steps=3", "--save_total_limit=2", "--report_to=none"]
        return ["-m", "recipes.glue", *shared, f"--output_dir={output}", *options]

    return command


def kill_one(launcher):
    """Kills one of the processes that a launcher started, with no time to clean up."""
    tasks = Path("/proc", str(launcher.pid), "task").glob("*/children")
    os.kill(int(random.choice([child for task in tasks for child in task.read_text().split()])), signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a launcher in /proc")
def test_a_run_that_was_killed_three_times_ends_as_one_that_was_not(command, tmp_path):
    run(*TORCHRUN, *command(tmp_path / "whole"))
    output, resume = tmp_path / "killed", []
    for _ in range(3):
        before = find_last_checkpoint(output)
        launcher = start(*TORCHRUN, *command(output, *resume))
        while find_last_checkpoint(output) == before:
            assert launcher.poll() is None, launcher.communicate()[0][-3000:]
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        kill_one(launcher)
        launcher.communicate(timeout=120)
        assert launcher.returncode != 0
        resume = ["--resume_from_checkpoint=true"]
    assert not (output / "result.json").exists()
    run(*TORCHRUN, *command(output, *resume))
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(TORCHRUN, [sys.executable]), ([sys.executable], TORCHRUN)])
def test_another_number_of_processes_goes_on(command, first, then, tmp_path):
    output = tmp_path / "output"
    run(*first, *command(output, "--max_steps=6"))
    run(*then, *command(output, "--max_steps=9", "--resume_from_checkpoint=true"))
    tracked = {
        name: value.item()
        for name, value in load_file(output / "model.safetensors").items()
        if name.endswith("num_batches_tracked")
    }
    assert tracked
    assert set(tracked.values()) == {9}
