"""A run whose processes are killed goes on from its last whole checkpoint, to the same weights."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_normswap.training.checkpoints import find_last_checkpoint
from tests.helpers.launch import TORCHRUN, run, start
from tests.helpers.versions import BEFORE_5_23, NO_RESUME_ON_CPU_RANKS


RUN = ["--where=all", "--max_steps=24", "--save_steps=3", "--save_total_limit=2"]


def kill_one(launcher):
    """Kills one of the processes that a launcher started, with no time to clean up."""
    tasks = Path("/proc", str(launcher.pid), "task").glob("*/children")
    os.kill(int(random.choice([child for task in tasks for child in task.read_text().split()])), signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a launcher in /proc")
@pytest.mark.skipif(BEFORE_5_23, reason=NO_RESUME_ON_CPU_RANKS)
@pytest.mark.release
def test_a_run_that_was_killed_three_times_ends_as_one_that_was_not(command, tmp_path):
    run(*TORCHRUN, *command(tmp_path / "whole", *RUN))
    output, resume = tmp_path / "killed", []
    for _ in range(3):
        before = find_last_checkpoint(output)
        launcher = start(*TORCHRUN, *command(output, *RUN, *resume))
        while find_last_checkpoint(output) == before:
            assert launcher.poll() is None, launcher.communicate()[0][-3000:]
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        kill_one(launcher)
        launcher.communicate(timeout=120)
        assert launcher.returncode != 0
        resume = ["--resume_from_checkpoint=true"]
    assert not (output / "result.json").exists()
    run(*TORCHRUN, *command(output, *RUN, *resume))
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [pytest.param(TORCHRUN, [sys.executable], marks=pytest.mark.release), ([sys.executable], TORCHRUN)],
)
@pytest.mark.skipif(BEFORE_5_23, reason=NO_RESUME_ON_CPU_RANKS)
def test_another_number_of_processes_goes_on(command, first, then, tmp_path):
    output = tmp_path / "output"
    run(*first, *command(output, *RUN, "--max_steps=6"))
    run(*then, *command(output, *RUN, "--max_steps=9", "--resume_from_checkpoint=true"))
    tracked = {
        name: value.item()
        for name, value in load_file(output / "model.safetensors").items()
        if name.endswith("num_batches_tracked")
    }
    assert tracked
    assert set(tracked.values()) == {9}
