"""What the tests of saving and loading share: a short training, the outputs of a model, fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from hf_normswap import norm_penalty
from tests.helpers.models import tiny_batch


ROOT = Path(__file__).parents[2]

# Makes the package impossible to import, installed or not.
_BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_normswap":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import hf_normswap
except ModuleNotFoundError:
    pass
else:
    sys.exit("hf_normswap was imported where it must not be")
"""


def train(model, batches=3, learning_rate=0.02):
    """A few steps, so that statistics and parameters move; the model is in evaluation mode afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model.train()
    for seed in range(batches):
        output = model(**tiny_batch(model, lengths=(6, 4, 3), seed=seed))
        loss = output.loss if "loss" in output else output[0].square().mean()
        optimizer.zero_grad()
        (loss + norm_penalty(model)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def outputs(model, batch=None):
    """Every tensor that the model returns for a batch of other lengths than those it trained on."""
    model.eval()
    given = batch or tiny_batch(model, lengths=(7, 5), labels=False, seed=9)
    returned = {name: value for name, value in model(**given).items() if isinstance(value, torch.Tensor)}
    assert returned
    assert all(value.isfinite().all() for value in returned.values())
    return returned


def same(left, right):
    """Whether two dicts of tensors are bit for bit the same."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def clone(tensors):
    """Copies of named tensors, unaffected by what becomes of the model."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def is_one_sentence(message):
    """One line that ends once, and not in the middle of an abbreviation or a number."""
    text = str(message)
    rest = text.rstrip(".?!")
    return "\n" not in text and text != rest and not any(end in rest for end in (". ", "? ", "! "))


def edit_config(folder, change):
    """Apply `change` to the JSON object in the folder's config.json."""
    path = Path(folder) / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run_fresh(script, tmp_path, *arguments, package=True):
    """Run `script` in a new process with empty caches of Hugging Face; without `package` nothing can import it.

    Returns the finished process. Its working directory is `tmp_path`, and Python settings of the environment do not
    reach it.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {
        "HF_HOME": str(tmp_path / "empty_home"),
        "HF_MODULES_CACHE": str(tmp_path / "empty_modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if package:
        environment["PYTHONPATH"] = str(ROOT)
    flags = ["-c", script] if package else ["-I", "-c", _BLOCK + script]
    done = subprocess.run(
        [sys.executable, *flags, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


class Poison:
    """What writes a file when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return open, (self.sentinel, "w")
