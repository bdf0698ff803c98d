"""Recorded steps of the published code, where they are at hand: the folder is named by `NORMSWAP_VECTORS`."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch


def load_vectors(name: str) -> dict[str, torch.Tensor]:
    """The arrays of `name`.npz; the test is skipped where there is no such file."""
    folder = os.environ.get("NORMSWAP_VECTORS")
    if not folder or not (Path(folder) / f"{name}.npz").exists():
        pytest.skip("set NORMSWAP_VECTORS to the folder of the reference vectors")
    with np.load(Path(folder) / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(array) for key, array in arrays.items() if array.dtype.kind in "fib"}
