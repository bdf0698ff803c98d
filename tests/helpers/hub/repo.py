"""Repos of the loopback Hub: files in commits, and what the Hub says of them."""

import hashlib
import os
import re
from typing import NamedTuple

import yaml


# What the Hub's default .gitattributes sends to large file storage, as far as tests need it.
_LFS_SUFFIXES = (".arrow", ".bin", ".npz", ".onnx", ".parquet", ".pt", ".safetensors", ".tflite", ".zip")


class Refusal(Exception):
    """A status other than 200, with the headers by which the client chooses its exception."""

    def __init__(self, status, message, code="", **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, "X-Error-Code": code, **headers}


def is_large(path, size, sample):
    # The client sends empty files with the commit, whatever it is told.
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or size > 10_000_000 or b"\0" in sample[:512])


def etag(path, content):
    """sha256 of what is in large file storage, else git's name of the content."""
    if is_large(path, len(content), content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_data(readme):
    """The metadata of a README, {} without any."""
    found = re.match(r"---\r?\n(.*?)^---\s*?$", readme.decode(), re.DOTALL | re.MULTILINE)
    try:
        return dict((found and yaml.safe_load(found[1])) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise Refusal(400, " ".join(f"Invalid metadata in README.md: {error}".split())) from error


class Commit(NamedTuple):
    sha: str
    message: str
    files: dict  # path -> content

    def entries(self):
        """What the API says of each folder and file, by path."""
        found = {}
        for path, content in sorted(self.files.items()):
            for end in (slash.start() for slash in re.finditer("/", path)):
                found[path[:end]] = {"type": "directory", "path": path[:end], "oid": self.sha, "size": 0}
            oid, size = etag(path, content), len(content)
            found[path] = {"type": "file", "path": path, "oid": oid[:40], "size": size}
            if is_large(path, size, content):
                found[path]["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
        return found


class Repo:
    def __init__(self, private):
        self.private, self.commits = private, []
        self.lfs = {}  # sha256 -> content, committed or not
        self.commit("initial commit", {})

    def at(self, revision):
        for commit in self.commits[::-1]:
            if revision in ("main", commit.sha):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, message, files):
        card_data(files.get("README.md", b""))
        self.commits.append(Commit(os.urandom(20).hex(), message, files))
        return self.commits[-1].sha
