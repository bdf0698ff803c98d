"""A swapped model on the loopback Hub: pushed, loaded with the package and without it, and what faults leave."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from hf_normswap import swap_norm
from tests.helpers.checkpoint import save_stock
from tests.helpers.hub.client import run_client
from tests.helpers.hub.server import LoopbackHub
from tests.helpers.models import tiny_batch, tiny_model
from tests.helpers.persistence import _BLOCK, ROOT, train
from tests.helpers.results import RESULTS


PUSH = """
import sys
import hf_normswap.reporting.hub
from transformers import AutoModelForSequenceClassification, AutoTokenizer
hf_normswap.reporting.hub.WAIT, hf_normswap.reporting.hub.STALL = 0.01, float(sys.argv[1]) if sys.argv[1:] else 60.0
model = AutoModelForSequenceClassification.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
print(model.push_to_hub("user/name", tokenizer=tokenizer, license="mit"))
"""
LOAD = """
import sys
import torch
from transformers import AutoModelForSequenceClassification, pipeline
options = {"trust_remote_code": True} if sys.argv[1] == "remote" else {}
model = AutoModelForSequenceClassification.from_pretrained("user/name", **options).eval()
batch, expected = torch.load("expected.pt")
assert torch.equal(model(**batch).logits, expected)
print(type(model).__module__)
print(pipeline("text-classification", "user/name", **options)("w6 w7 w8"))
"""


@pytest.fixture
def folder(tmp_path):
    """A tiny swapped model with its tokenizer in `model`, and what it returns in `expected.pt`."""
    stock = save_stock(tmp_path / "model")
    model = train(swap_norm(tiny_model("bert"), "batchnorm", where="all"))
    model.save_pretrained(stock)
    batch = tiny_batch(model, labels=False)
    torch.save((batch, model(**batch).logits.detach()), tmp_path / "expected.pt")
    return tmp_path


def test_pushed_and_loaded_by_name(hub, folder):
    done = run_client(hub, PUSH, folder)
    files = hub.files("user/name")
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_normswap.py",
        "batchnorm.py",
        "tokenizer.json",
    } <= set(files)
    assert len(hub.commits("user/name")) == 1
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("transformers", "mit")
    assert card.text.count('model_id = "user/name"\n') == 2
    assert "hf_test" not in done.stdout + done.stderr
    assert not any(b"hf_test" in content for content in files.values())
    (folder / "model").rename(folder / "gone")
    with_package = run_client(hub, "import hf_normswap\n" + LOAD, folder, "package")
    without = run_client(hub, _BLOCK + LOAD, folder, "remote")
    assert with_package.stdout.startswith("hf_normswap")
    assert without.stdout.startswith("transformers_modules")
    refused = run_client(hub, _BLOCK + LOAD, folder, "package", check=False)
    assert refused.returncode != 0
    assert "trust_remote_code" in refused.stderr


@pytest.mark.parametrize(
    ("what", "effect"),
    [
        ("POST /api/models/user/name/commit", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("PUT .*lfs", {"after_bytes": 1000}),
        ("POST /api/models/user/name/commit", {}),
    ],
    ids=["429", "cut upload", "lost answer"],
)
def test_a_fault_that_passes_is_overcome(what, effect, hub, folder):
    hub.fail(what, **effect) if "status" in effect else hub.cut(what, **effect)
    run_client(hub, PUSH, folder)
    assert len(hub.commits("user/name")) == 1
    assert "model.safetensors" in hub.files("user/name")


@pytest.mark.parametrize(("status", "existing"), [(500, False), (403, True)])
def test_a_fault_that_stays_leaves_the_hub_as_it_was(status, existing, hub, folder):
    if existing:
        hub.add("user/name", {"notes.txt": b"of somebody"})
    before = dict(hub.repos)
    hub.fail("POST /api/models/user/name/commit", status=status, times=None)
    done = run_client(hub, PUSH, folder, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: user/name could not be pushed (")
    assert str(status) in last
    assert (
        "is as it was before: check the name, your token (hf auth login) and the connection, and push again." in last
    )
    assert "hf_test" not in done.stdout + done.stderr
    assert hub.repos.keys() == before.keys()
    if existing:
        assert hub.files("user/name") == {"notes.txt": b"of somebody"}


def test_large_files_may_fail_by_a_library_of_their_own(hub, folder):
    """Xet storage, which this Hub does not have."""
    done = run_client(hub, f"import os\nos.environ['HF_HUB_DISABLE_XET'] = '0'\n{PUSH}", folder, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("OSError: user/name could not be pushed (")
    assert not hub.repos


def test_a_request_that_stalls_is_sent_again(hub, folder):
    for request in ("GET /api/models/user/name", "POST /api/repos/create", "PUT .*lfs", "POST .*/commit/"):
        hub.slow(request, seconds=60, times=1)
    run_client(hub, PUSH, folder, 1.0)
    assert len(hub.commits("user/name")) == 1
    assert "model.safetensors" in hub.files("user/name")


def test_a_hub_that_stays_silent_ends_a_push(hub, folder):
    hub.slow("POST .*/commit/", seconds=60)
    done = run_client(hub, PUSH, folder, 0.5, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: user/name could not be pushed (ReadTimeout")
    assert not hub.repos


def test_a_new_repo_is_as_private_as_the_account_has_it(folder):
    with LoopbackHub(private_by_default=True) as hub:
        run_client(hub, PUSH, folder)
        assert hub.repos["model", "user/name"].private


def test_the_command_line(hub, folder):
    results = folder / "results.json"
    for index, result in enumerate(RESULTS):
        (folder / f"{index}.json").write_text(
            json.dumps({**result, "norm": "batchnorm", "format_version": 1, "seed": index})
        )
    script = "import sys; from hf_normswap.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = [str(folder / f"{index}.json") for index in range(len(RESULTS))]
    done = run_client(hub, script, folder, "push", "model", "user/name", "--private", "--json", "--results", *paths)
    assert json.loads(done.stdout)["commit"] == hub.commits("user/name")[0].sha
    assert hub.repos["model", "user/name"].private
    files = hub.files("user/name")
    card, pushed = ModelCard(files["README.md"].decode()), json.loads(files["results.json"])
    assert len(pushed) == len(RESULTS)
    mean = sum(result["metrics"]["accuracy"] for result in pushed) / len(pushed)
    assert card.data.eval_results[0].metric_value == round(mean, 4)
    refused = run_client(hub, script, folder, "push", "model", "user/name", token="hf_wrong", check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("error: user/name could not be pushed (401")
    assert not results.exists()


def test_a_name_without_a_namespace_gets_that_of_the_account(hub, folder):
    """A bare name in a card would be another repo, and a new repo must be known for one."""
    script = PUSH.replace("user/name", "name")
    hub.fail("POST /api/models/user/name/commit", status=403)
    refused = run_client(hub, script, folder, check=False)
    assert refused.stderr.strip().splitlines()[-1].startswith("OSError: user/name could not be pushed (403")
    assert not hub.repos
    run_client(hub, script, folder)
    card = ModelCard(hub.files("user/name")["README.md"].decode())
    assert card.text.count('model_id = "user/name"\n') == 2
    assert card.data.model_name == "name"


BASE = """
import os
import sys
from transformers import AutoModelForSequenceClassification
from hf_normswap import swap_norm
from hf_normswap.reporting.card import card_of_model
def base(**options):
    model = AutoModelForSequenceClassification.from_pretrained("user/stock", **options)
    return card_of_model(swap_norm(model, "rbn")).data.base_model
os.chdir("folder")
print(base())
os.chdir("..")
print(base(revision=sys.argv[1]))  # the cache has no main then
print(base())
os.chdir("folder")
print(base())
"""


def test_a_card_names_a_base_model_from_the_hub_and_no_folder(hub, tmp_path):
    stock = tmp_path / "folder" / "user" / "stock"
    save_stock(stock)
    hub.add("user/stock", {path.name: path.read_bytes() for path in stock.iterdir()})
    done = run_client(hub, BASE, tmp_path, hub.commits("user/stock")[0].sha)
    assert done.stdout.split() == ["None", "user/stock", "user/stock", "None"]


TRAIN = """
from tests.helpers.trainer import make_trainer
trainer = make_trainer("run", hub_model_id="user/name", hub_token="hf_test", save_strategy="no")
trainer.train()
trainer.push_to_hub(tags="mine")
"""


def test_the_trainer_pushes_the_card_of_this_package_and_no_token(hub, tmp_path):
    run_client(hub, f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + TRAIN, tmp_path)
    files = hub.files("user/name")
    card = ModelCard(files["README.md"].decode())
    assert {"hf_normswap", "rbn", "mine"} <= set(card.data.tags)
    assert not any(b"hf_test" in content for content in files.values())
    assert "tid.json" not in files or json.loads(files["tid.json"])["steps"]
