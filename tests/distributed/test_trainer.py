"""Two processes are one process with the batches of both."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.invariant.test_accumulation import assert_same, rows, train


ROOT = Path(__file__).parents[2]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "norm", "warmup"),
    [
        ("bert", "batchnorm", 0.0),
        ("bert", "powernorm", 0.0),
        ("bert", "powernorm", 1.0),
        ("gpt2", "rbn", 0.0),
        ("gpt2", "powernorm", 0.5),
        ("marian", "rbn", 0.0),
        ("marian", "pnv", 0.0),
        ("marian", "layernorm", 0.0),
    ],
)
def test_two_ranks_of_four_are_one_of_eight(family, norm, warmup, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.worker", family, norm, str(warmup), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks = [SimpleNamespace(**torch.load(tmp_path / f"rank{rank}.pt")) for rank in (0, 1)]
    alone = train(family, norm, rows(family, 16), tmp_path, batch=8, accumulation=1, norm_warmup_ratio=warmup)
    for rank in ranks:
        assert_same(alone, rank)
    for ours, theirs in zip(ranks[0].buffers, ranks[1].buffers, strict=True):
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
