"""The loopback Hub against the real clients, each in a process of its own."""

import hashlib
import json
import os
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.helpers.hub.client import run_client
from tests.helpers.hub.server import LoopbackHub


LARGE = bytes(range(256)) * 400
UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("user/name", private=True, exist_ok=True)
print(api.upload_folder(repo_id="user/name", folder_path=sys.argv[1], commit_message="folder").oid)
"""


@pytest.fixture
def folder(tmp_path):
    """A text file and a large one, which travels by itself."""
    folder = tmp_path / "upload"
    folder.mkdir()
    (folder / "notes.txt").write_text("small\n")
    (folder / "model.safetensors").write_bytes(LARGE)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count(hub, method, end=""):
    return sum(path.endswith(end) for verb, path in hub.requests if verb == method)


def test_upload_and_download(hub, folder, tmp_path):
    script = (
        UPLOAD
        + """
import json
from pathlib import Path
import huggingface_hub
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError

def raised(error, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except error as problem:
        return type(problem).__name__

first = api.model_info("user/name").sha
again = api.upload_folder(repo_id="user/name", folder_path=sys.argv[1])
card = ModelCard("---\\nlicense: mit\\ntags: [powernorm]\\nlibrary_name: transformers\\n---\\n# Title\\n")
if huggingface_hub.__version__.startswith("1."):  # that asks huggingface.co, whatever HF_ENDPOINT says
    ModelCard.validate = lambda *_, **__: None
card.validate()
card.push_to_hub("user/name")
api.upload_file(path_or_fileobj=b"1", path_in_repo="a/b/c.txt", repo_id="user/name")
api.delete_file("notes.txt", repo_id="user/name")
info = api.model_info("user/name")
print(json.dumps({
    "me": api.whoami()["name"],
    "unchanged": again.oid == first,
    "url": str(api.create_repo("user/name", exist_ok=True)),
    "exists": raised(HfHubHTTPError, api.create_repo, "user/name"),
    "private": info.private,
    "card": ModelCard.load("user/name").data.license,
    "info": [info.card_data.license, info.tags, info.library_name, sorted(s.rfilename for s in info.siblings)],
    "large": Path(hf_hub_download("user/name", "model.safetensors")).read_bytes().hex(),
    "old": Path(hf_hub_download("user/name", "notes.txt", revision=first)).read_text(),
    "snapshot": sorted(p.name for p in Path(snapshot_download("user/name")).rglob("*") if p.is_file()),
    "tree": [entry.path for entry in api.list_repo_tree("user/name")],
    "recursive": [entry.path for entry in api.list_repo_tree("user/name", "a", recursive=True)],
    "paths": [i.path for i in api.get_paths_info("user/name", ["a", "a/b/c.txt", "none"])],
    "no file": raised(EntryNotFoundError, hf_hub_download, "user/name", "none"),
    "no revision": raised(RevisionNotFoundError, api.model_info, "user/name", revision="none"),
    "bad card": raised(ValueError, api.upload_file, path_or_fileobj=b"---\\na: [\\n---\\n",
                       path_in_repo="README.md", repo_id="user/name"),
    "moved on": raised(HfHubHTTPError, api.upload_file, path_or_fileobj=b"2", path_in_repo="x", repo_id="user/name",
                       parent_commit=first),
}))
"""
    )
    said = json.loads(run_client(hub, script, tmp_path, folder).stdout.splitlines()[-1])
    assert said == {
        "me": "user",
        "unchanged": True,
        "url": f"{hub.url}/user/name",
        "exists": "HfHubHTTPError",
        "private": True,
        "card": "mit",
        "info": ["mit", ["powernorm"], "transformers", ["README.md", "a/b/c.txt", "model.safetensors"]],
        "large": LARGE.hex(),
        "old": "small\n",
        "snapshot": ["README.md", "c.txt", "model.safetensors"],
        "tree": ["README.md", "a", "model.safetensors"],
        "recursive": ["a/b", "a/b/c.txt"],
        "paths": ["a", "a/b/c.txt"],
        "no file": "RemoteEntryNotFoundError",
        "no revision": "RevisionNotFoundError",
        "bad card": "ValueError",
        "moved on": "HfHubHTTPError",
    }
    first, *later = hub.commits("user/name")
    assert (first.message, first.files, len(later)) == ("folder", contents(folder), 3)
    # Only the large file is sent by itself, and only once.
    assert count(hub, "PUT") == 1


def test_transformers(hub, tmp_path):
    script = """
import torch, transformers
from transformers import AutoModel, BertConfig, BertModel
sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = BertModel(BertConfig(**sizes)).eval()
model.push_to_hub("user/bert", tags=["tiny"])
loaded = AutoModel.from_pretrained("user/bert")
ids = torch.arange(6)[None]
assert torch.equal(model(ids).last_hidden_state, loaded(ids).last_hidden_state)
"""
    run_client(hub, script, tmp_path)
    (commit,) = hub.commits("user/bert")
    assert set(commit.files) == {"README.md", "config.json", "model.safetensors"}
    assert b"tiny" in commit.files["README.md"]


def test_datasets(hub, tmp_path):
    script = """
import io
import pyarrow, pyarrow.parquet
from datasets import load_dataset
from huggingface_hub import CommitOperationAdd, HfApi

def parquet(**columns):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()

readme = '''---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/train-*.parquet}
  - {split: test, path: one/test.parquet}
- config_name: two
  data_files: two/*.parquet
---
'''
files = {
    "README.md": readme.encode(),
    "one/train-0.parquet": parquet(x=[1, 2]),
    "one/train-1.parquet": parquet(x=[3]),
    "one/test.parquet": parquet(x=[4]),
    "two/a.parquet": parquet(y=["a"]),
}
api = HfApi()
for repo_id, names in {"user/configured": files, "user/plain": ["two/a.parquet"]}.items():
    api.create_repo(repo_id, repo_type="dataset", private=True)
    operations = [CommitOperationAdd(name, files[name]) for name in names]
    api.create_commit(repo_id, operations, commit_message="data", repo_type="dataset")
one = load_dataset("user/configured", "one")
assert {split: one[split]["x"][:] for split in one} == {"train": [1, 2, 3], "test": [4]}
assert load_dataset("user/configured", "two", split="train")["y"][:] == ["a"]
assert load_dataset("user/plain", split="train")["y"][:] == ["a"]
assert [row["x"] for row in load_dataset("user/configured", "one", split="train", streaming=True)] == [1, 2, 3]
"""
    run_client(hub, script, tmp_path)
    assert len(hub.commits("user/configured", repo_type="dataset")) == 1


def test_tokens_and_private_repos(tmp_path):
    script = """
import json
from huggingface_hub import HfApi, hf_hub_download
def raised(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as problem:
        return type(problem).__name__, problem.response.status_code
print(json.dumps([
    [
        raised(api.create_repo, "user/new"),
        raised(api.upload_file, path_or_fileobj=b"1", path_in_repo="a", repo_id="user/open"),
        raised(api.model_info, "user/open"),
        raised(api.model_info, "user/hidden"),
        raised(hf_hub_download, "user/hidden", "a", token=api.token),
        raised(api.model_info, "user/none"),
    ]
    # The right token comes last: what it downloads is in the cache, which needs none.
    for api in (HfApi(token="hf_wrong"), HfApi(token=False), HfApi())
]))
HfApi().create_repo("user/public", private=False)
try:
    HfApi(token="hf_wrong").whoami()
except Exception as problem:
    assert "Invalid user token" in str(problem)
"""
    with LoopbackHub(private_by_default=True) as hub:
        hub.add("user/open", {"a": b"0"})
        hub.add("user/hidden", {"a": b"0"}, private=True)
        wrong, none, right = json.loads(run_client(hub, script, tmp_path).stdout)
    unseen = "RepositoryNotFoundError"
    assert right == [None] * 5 + [[unseen, 404]]
    assert wrong == [["HfHubHTTPError", 401]] * 6
    assert none == [[unseen, 401], [unseen, 401], None, [unseen, 401], [unseen, 401], [unseen, 401]]
    assert hub.files("user/open") == {"a": b"1"}
    private = {repo_id: repo.private for (_, repo_id), repo in hub.repos.items()}
    assert private == {"user/open": False, "user/hidden": True, "user/new": True, "user/public": False}


@pytest.mark.parametrize("status", [500, 503, 429])
def test_the_client_tries_again(hub, folder, tmp_path, status):
    hub.fail("/preupload/", status=status, headers={"Retry-After": "0"})
    run_client(hub, UPLOAD, tmp_path, folder)
    assert count(hub, "POST", "/preupload/main") == 2
    assert len(hub.commits("user/name")) == 1
    assert hub.files("user/name") == contents(folder)


def test_faults_while_large_files_are_sent(hub, folder, tmp_path):
    hub.fail("/lfs/objects/batch", status=503)
    hub.cut("PUT", after_bytes=1000)
    hub.fail("POST .*/lfs/[0-9a-f]{64}$")
    run_client(hub, UPLOAD, tmp_path, folder)
    sent = hashlib.sha256(LARGE).hexdigest()
    assert [count(hub, "POST", "/batch"), count(hub, "PUT", sent), count(hub, "POST", sent)] == [2, 2, 2]
    assert hub.files("user/name") == contents(folder)


# The client sends a commit once only, and reports what went wrong.
@pytest.mark.parametrize(
    ("fault", "arguments", "error", "done"),
    [
        ("fail", {}, "HfHubHTTPError", False),
        ("cut", {"after_bytes": 10}, "httpx", False),
        ("cut", {}, "RemoteProtocolError", True),
    ],
)
def test_a_commit_is_whole_or_not_there(hub, folder, tmp_path, fault, arguments, error, done):
    getattr(hub, fault)("/commit/", **arguments)
    ended = run_client(hub, UPLOAD, tmp_path, folder, check=False)
    assert ended.returncode != 0
    assert error in ended.stderr
    assert hub.files("user/name") == (contents(folder) if done else {})
    assert len(hub.commits("user/name")) == done

    # What was sent before is used by the next attempt.
    run_client(hub, UPLOAD, tmp_path, folder)
    assert hub.files("user/name") == contents(folder)
    assert len(hub.commits("user/name")) == 1
    assert count(hub, "PUT") == 1


def test_a_commit_with_one_bad_operation_changes_nothing(hub):
    hub.add("user/name", {"a": b"0"})
    operations = [
        {"key": "header", "value": {"summary": "half"}},
        {"key": "file", "value": {"path": "a", "content": "MQ==", "encoding": "base64"}},
        {"key": "deletedFile", "value": {"path": "a"}},
        {"key": "lfsFile", "value": {"path": "b.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}},
    ]
    body = "\n".join(map(json.dumps, operations)).encode()
    address = f"{hub.url}/api/models/user/name/commit/main"
    with pytest.raises(HTTPError, match="400"):
        urlopen(Request(address, data=body, headers={"Authorization": "Bearer hf_test"}))
    assert hub.files("user/name") == {"a": b"0"}
    assert len(hub.commits("user/name")) == 1


def test_faults_of_a_kind_follow_each_other(hub):
    hub.add("user/name", {"a": b"0"})
    hub.fail("user/name", status=500)
    hub.fail("user/name", status=503, times=2, headers={"Retry-After": "7"})
    statuses = []
    for _ in range(4):
        try:
            statuses.append(urlopen(f"{hub.url}/user/name/resolve/main/a").status)
        except HTTPError as error:
            statuses.append((error.code, error.headers["Retry-After"]))
    assert statuses == [(500, None), (503, "7"), (503, "7"), 200]


def test_a_download_resumes(hub, tmp_path):
    # More than the client keeps in memory before it writes.
    content = os.urandom(1 << 20) * 24
    hub.add("user/name", {"model.bin": content})
    hub.slow("HEAD", 0.2)
    # A request that began anew would be cut, too.
    hub.cut("GET .*/resolve/", after_bytes=len(content) - 1000, times=None)
    script = """
import sys, time
from pathlib import Path
from huggingface_hub import hf_hub_download
started = time.monotonic()
path = hf_hub_download("user/name", "model.bin")
assert time.monotonic() - started > 0.2
assert Path(path).read_bytes() == Path(sys.argv[1]).read_bytes()
"""
    (tmp_path / "expected").write_bytes(content)
    run_client(hub, script, tmp_path, tmp_path / "expected")
    assert count(hub, "GET", "/model.bin") == 2


@pytest.mark.parametrize(
    ("asked", "expected", "range_"),
    [("bytes=2-4", b"234", "2-4"), ("bytes=7-", b"789", "7-9"), ("bytes=8-99", b"89", "8-9")],
)
def test_ranges(hub, asked, expected, range_):
    hub.add("user/name", {"digits.txt": b"0123456789"}, repo_type="dataset")
    address = f"{hub.url}/datasets/user/name/resolve/main/digits.txt"
    with urlopen(Request(address, headers={"Range": asked})) as answer:
        assert answer.status == 206
        assert answer.read() == expected
        assert answer.headers["Content-Range"] == f"bytes {range_}/10"
    assert hub.requests == [("GET", "/datasets/user/name/resolve/main/digits.txt")]
