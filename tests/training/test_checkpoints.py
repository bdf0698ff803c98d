"""Checkpoints that are whole, though a disk is full or a process was killed."""

import resource

import pytest

from hf_normswap.training.checkpoints import find_last_checkpoint
from tests.helpers.trainer import make_trainer


@pytest.fixture
def full_disk():
    """Ends writing to any one file at so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(room):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, full_disk, file):
    make_trainer(tmp_path, max_steps=2).train()
    first = tmp_path / "checkpoint-2"
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    full_disk(len(content[file]) - 1000)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*resume from .*checkpoint-2"):
        make_trainer(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == content
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_full_disk_before_the_first_checkpoint(tmp_path, full_disk):
    full_disk(1000)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*start again"):
        make_trainer(tmp_path).train()


def test_what_fails_after_a_checkpoint_leaves_it(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_total_limit=1)
    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    make_trainer(tmp_path).train()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    # Step 4 was repeated, in full.
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert trainer.state.global_step == 4
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        make_trainer(tmp_path / "other").train(resume_from_checkpoint=True)
