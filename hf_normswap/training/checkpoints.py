"""Checkpoints of a run that may be killed at any moment: which of them are whole."""

import json
import re
from pathlib import Path

from safetensors import safe_open


# The trainers write it last, when every process has written its part.
LAST_FILE = "trainer_state.json"


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a folder that no trainer has finished to write.

    Raises:
        ValueError: when the checkpoint lacks weights, or was cut off while it was written.
    """
    weights = sorted(Path(folder).glob("*.safetensors"))
    shards = [*Path(folder).glob("pytorch_model_fsdp*"), *Path(folder).glob("global_step*")]  # of FSDP and DeepSpeed
    if not weights and not shards:
        raise ValueError(f"There is no checkpoint to resume from in {folder}.")
    for file in weights:
        try:
            safe_open(file, "pt")
        except Exception as error:
            raise ValueError(f"{file} is damaged ({error}): resume from another checkpoint.") from error
    try:
        json.loads(Path(folder, LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} was not written to its end: resume from another checkpoint.") from error


def find_last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole `checkpoint-<step>` in the output `folder` of a run, if there is one."""
    steps = {}
    for path in Path(folder).glob("checkpoint-*"):
        if number := re.fullmatch(r"checkpoint-(\d+)", path.name):
            steps[int(number[1])] = path
    for _, path in sorted(steps.items(), reverse=True):
        try:
            check_checkpoint(path)
        except ValueError:
            continue
        return str(path)
    return None
