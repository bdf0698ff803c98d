"""Starts processes that train together."""

import os
import subprocess
import sys

from tests.helpers.persistence import ROOT


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*command, **environment):
    """Starts a command in the root of the project, offline; its output can be read from `stdout`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command, **environment):
    """Runs a command to its end, and returns what it printed."""
    process = start(*command, **environment)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output
