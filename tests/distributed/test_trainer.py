"""Two processes are one process with the batches of both."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.launch import TORCHRUN, run
from tests.helpers.trainer import assert_same, rows, train


def train_on_ranks(family, norm, folder, ranks=2, environment=None, **options):
    launcher = [*TORCHRUN[:-1], ranks]
    run(*launcher, "-m", "tests.distributed.worker", family, norm, folder, json.dumps(options), **environment or {})
    recorders = [SimpleNamespace(**torch.load(folder / f"rank{rank}.pt")) for rank in range(ranks)]
    for recorder in recorders[1:]:
        for ours, theirs in zip(recorders[0].buffers, recorder.buffers, strict=True):
            for name, value in ours.items():
                assert torch.equal(value, theirs[name]), name
    return recorders


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "norm", "warmup"),
    [
        ("bert", "batchnorm", 0.0),
        ("gpt2", "powernorm", 0.5),
        ("marian", "rbn", 0.0),
        ("marian", "powernorm", 1.0),
    ],
)
def test_two_ranks_of_four_are_one_of_eight(family, norm, warmup, tmp_path):
    alone = train(family, norm, rows(family, 16), tmp_path, batch=8, accumulation=1, norm_warmup_ratio=warmup)
    for rank in train_on_ranks(family, norm, tmp_path, batch=4, norm_warmup_ratio=warmup):
        assert_same(alone, rank)


@pytest.mark.distributed
@pytest.mark.release
def test_two_nodes_of_two_ranks_are_two_ranks_on_their_own(tmp_path):
    (tmp_path / "nodes").mkdir()
    nodes = {"RANKS_OF_A_NODE": "2"}
    four = train_on_ranks("bert", "rbn", tmp_path / "nodes", 4, nodes, batch=2, norm_sync="node")
    two = train_on_ranks("bert", "rbn", tmp_path, batch=4, norm_sync="none")
    assert_same(two[0], four[0])
