"""What every test of a recipe has: caches of its own, and the fixtures of tiny tasks."""

import os
from pathlib import Path

import pytest

from tests.helpers.recipes import model_folder, write_task  # noqa: F401


@pytest.fixture(autouse=True)
def caches_of_its_own(tmp_path, monkeypatch):
    # Offline, `datasets` takes what an earlier run left in its cache for the data set of that name.
    for module in ("datasets.config", "recipes.loading"):
        monkeypatch.setattr(f"{module}.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def sst2(tmp_path):
    return write_task(tmp_path / "glue", "sst2", {"train": 24, "validation": 10})


@pytest.fixture
def assert_resumes(tmp_path):
    """Runs a recipe, then goes on from its checkpoint of step 2: the weights are the same, bit for bit."""

    def assert_resumes(run, *options):
        weights = tmp_path / "output" / "model.safetensors"
        run(*options, "--max_steps=4", "--save_strategy=steps", "--save_steps=2")
        uninterrupted = weights.read_bytes()
        weights.unlink()
        run(*options, "--max_steps=4", f"--resume_from_checkpoint={tmp_path}/output/checkpoint-2")
        assert weights.read_bytes() == uninterrupted

    return assert_resumes


@pytest.fixture
def refused(tmp_path, capsys):
    """Asserts that a run is refused in one sentence, before anything is written."""

    def refused(call, message):
        before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        with pytest.raises(SystemExit) as exit:
            call()
        assert exit.value.code == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert message in error[0]
        assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before

    return refused


@pytest.fixture(scope="session")
def real_glue():
    """The real data set, laid out as on the Hub."""
    root = os.environ.get("NORMSWAP_DATA")
    if not root or not Path(root, "nyu-mll", "glue").is_dir():
        pytest.skip("NORMSWAP_DATA names no folder with nyu-mll/glue")
    return str(Path(root, "nyu-mll", "glue"))
