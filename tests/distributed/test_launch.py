"""The launch configurations, as they are: on one machine, and on two that know each other by address alone."""

import os
import re
import socket
import stat
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from hf_normswap.reporting.results import load_results
from tests.helpers.launch import ROOT, TORCHRUN, run, start


FOLDER = ROOT / "recipes" / "launch"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_them(path):
    config = load_config_from_file(str(path))
    assert vars(config).items() >= yaml.safe_load(path.read_text()).items()
    assert f"recipes/launch/{path.name}" in path.read_text()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "ddp"])
def test_one_machine(name, command, tmp_path):
    configured = ["--config_file", FOLDER / f"{name}.yaml", "--main_process_port", "0"]
    run(*LAUNCH, *configured, *command(tmp_path / "output", "--max_steps=4"), ACCELERATE_USE_CPU="true")
    (result,) = load_results(tmp_path / "output" / "result.json")
    processes = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["num_processes"]
    assert ("--num_processes 2" in result["command"]) == (processes == 2)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("norm", ["rbn", "powernorm"])
def test_deepspeed_zero_2_trains_as_data_parallel(norm, command, tmp_path):
    pytest.importorskip("deepspeed")
    options = [f"--norm={norm}", "--logging_steps=1", "--gradient_accumulation_steps=2", "--norm_warmup_ratio=0.5"]
    more = {"plain": [], "zero": ["--deepspeed", FOLDER / "zero2.json"]}
    losses = {}
    for name, deepspeed in more.items():
        run(*TORCHRUN, *command(tmp_path / name, "--max_steps=4", *options, *deepspeed), DS_ACCELERATOR="cpu")
        (result,) = load_results(tmp_path / name / "result.json")
        losses[name] = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses["plain"]) == 4
    assert losses["zero"] == pytest.approx(losses["plain"], abs=1e-4)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_machines(command, tmp_path, free_port):
    launch = [*LAUNCH, "--config_file", FOLDER / "nodes.yaml", "--main_process_ip", "127.0.0.1"]
    launch += ["--main_process_port", free_port]
    machines = [
        start(
            *launch,
            f"--machine_rank={rank}",
            "--module",
            "tests.distributed.recipe_worker",
            *command(tmp_path / f"machine{rank}", "--max_steps=4")[2:],
            ACCELERATE_USE_CPU="true",
            HF_HOME=str(tmp_path / f"home{rank}"),
        )
        for rank in (0, 1)
    ]
    ended = []
    for machine in machines:
        output, _ = machine.communicate(timeout=300)
        assert machine.returncode == 0, output[-3000:]
        ended += re.findall(r"^rank (\d) of (\d): (\w+)$", output, re.MULTILINE)
    assert [(rank, world) for rank, world, _ in ended] == [("0", "2"), ("1", "2")]
    assert ended[0][2] == ended[1][2]
    assert [(tmp_path / f"machine{rank}" / "model.safetensors").exists() for rank in (0, 1)] == [True, False]
    (result,) = load_results(tmp_path / "machine0" / "result.json")
    assert "--num_processes 2" in result["command"]


def test_the_slurm_script_starts_each_machine(tmp_path):
    tools = {
        "scontrol": "echo first; echo second",
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, body in tools.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "4", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x"}
    arguments = ["-m", "recipes.glue", "a.yaml", f"--output_dir={tmp_path}/output", '--norm_options={"momentum": 0.2}']
    printed = run(
        "bash",
        FOLDER / "slurm.sbatch",
        *arguments,
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        **slurm,
    )
    lines = printed.splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert f"--num_machines 2 --num_processes 8 --machine_rank {rank} --main_process_ip first" in line
        assert line.endswith(" ".join([*arguments, "--resume_from_checkpoint auto"]))
