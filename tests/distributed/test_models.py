"""Whole models that two ranks train are those that one process trains with the tokens of both."""

import functools

import pytest
import torch

from hf_normswap import swap_norm
from hf_normswap.core.statistics import statistic_norms
from tests.distributed.model_worker import CASES, HEADS, hash_buffers, train
from tests.helpers.launch import TORCHRUN, run
from tests.helpers.models import tiny_model


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("family", HEADS)
def test_two_ranks_are_one(family, tmp_path):
    print(run(*TORCHRUN, "-m", "tests.distributed.model_worker", family, tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for case in CASES[family]:
        alone = train_alone(*case[:2], "accumulation" if case[3] == "accumulation" else "plain")
        assert hash_buffers(ranks[0][case]) == hash_buffers(ranks[1][case])
        for rank in ranks:
            assert_close(rank[case]["weights"], alone["weights"], case)
            for step, expected in zip(rank[case]["steps"], alone["steps"], strict=True):
                for kind in ("gradients", "penalty", "buffers"):
                    assert_close(step[kind], expected[kind], (*case, kind))
            if case[2:] == ("even", "plain"):
                check_collectives(*case[:2], rank[case]["steps"])
        assert alone["steps"][-1]["penalty"].sum() > 0 or case[1] != "rbn"


@functools.cache
def train_alone(family, norm, mode):
    """One process has all rows, however ranks divide them, and needs neither shards, checkpoints nor a compiler."""
    return train(family, norm, "even", mode)


def assert_close(ours, theirs, case):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text: f"{' '.join(case)}: {text}")


def check_collectives(family, norm, steps):
    model = swap_norm(tiny_model(family, HEADS[family]), norm.removesuffix("_warm"), where="all")
    layers = len(statistic_norms(model))
    expected = {
        "layernorm": (0, 0),
        "rmsnorm": (0, 0),
        "powernorm": (1, 0),
        "powernorm_warm": (layers + 1, layers),
    }.get(norm, (layers, layers))
    for step in steps:
        assert tuple(step["calls"].count(name) for name in ("all_gather", "all_reduce")) == expected, norm
