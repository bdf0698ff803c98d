"""A Hub on the loopback interface: the part of the Hugging Face Hub's HTTP API that its Python clients call."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub.repo import Refusal, Repo, card_data, etag, is_large


class LoopbackHub(ThreadingHTTPServer):
    """A Hub with one user, in memory; a context manager. Only `token` is valid.

    A fault is met by requests whose "METHOD /path" its regular expression finds, `times` times, or always with None.
    """

    def __init__(self, token="hf_test", user="user", private_by_default=False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.user, self.private_by_default = token, user, private_by_default
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}  # (type, id) -> Repo
        self.requests = []  # (method, path), in the order of arrival
        self.lock = threading.Lock()
        self._faults = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def add(self, repo_id, files, repo_type="model", private=False):
        """Create a repo with one commit of `files` ({path: bytes}), without a client."""
        self.repos[repo_type, repo_id] = Repo(private)
        self.repos[repo_type, repo_id].commit("add", files)

    def commits(self, repo_id, repo_type="model"):
        """The commits of main, oldest first, without the initial one that every repo of the Hub starts with."""
        return self.repos[repo_type, repo_id].commits[1:]

    def files(self, repo_id, repo_type="model"):
        return dict(self.repos[repo_type, repo_id].at("main").files)

    def fail(self, pattern, status=500, times=1, headers=None):
        """Answer with `status` and do nothing else."""
        self._fault(pattern, times, fail=(status, {"error": "fault"}, headers or {}))

    def cut(self, pattern, after_bytes=None, times=1):
        """Close the connection after so many bytes: of the answer to a GET, else of the request, which is not done.

        By default the request is done and its answer lost.
        """
        self._fault(pattern, times, cut=after_bytes)

    def slow(self, pattern, seconds, times=None):
        """Wait before the request is done."""
        self._fault(pattern, times, slow=seconds)

    def _fault(self, pattern, times, **effect):
        self._faults.append({"pattern": pattern, "times": times, "effect": effect})

    def meet(self, method, path):
        """Log a request and return the effects of the faults that it meets."""
        effects = {}
        with self.lock:
            self.requests.append((method, path))
            for fault in self._faults:
                # Of two faults of a kind the second waits until the first is spent.
                met = fault["times"] != 0 and not fault["effect"].keys() & effects.keys()
                if met and re.search(fault["pattern"], f"{method} {path}"):
                    fault["times"] = None if fault["times"] is None else fault["times"] - 1
                    effects |= fault["effect"]
        return effects


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are written one after the other: without this the second waits for the client to acknowledge.
    disable_nagle_algorithm = True

    def log_message(self, *_): ...

    def handle_request(self):
        url, size = urlsplit(self.path), int(self.headers.get("Content-Length") or 0)
        effects = self.server.meet(self.command, unquote(url.path))
        time.sleep(effects.get("slow", 0))
        stop = effects.get("cut")
        self.close_connection = self.close_connection or "cut" in effects
        if stop is not None and self.command != "GET":
            self.rfile.read(min(size, stop))
            return
        self.body, self.query = self.rfile.read(size), parse_qs(url.query)
        status, body, headers = effects.get("fail") or self._answer(url.path)
        if "cut" not in effects or stop is not None:
            body = body if isinstance(body, bytes) else json.dumps(body, default=str).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body[:stop])

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _answer(self, path):
        given = self.headers.get("Authorization")
        self.known = given == f"Bearer {self.server.token}"
        try:
            if given is not None and not self.known:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for route, respond in _ROUTES.items():
                if found := re.fullmatch(route, f"{self.command} {path}"):
                    parts = {name: unquote(part) for name, part in found.groupdict().items() if part}
                    with self.server.lock:
                        answer = respond(self, **parts)
                    return answer if isinstance(answer, tuple) else (200, answer, {})
            raise Refusal(404, f"No such endpoint: {self.command} {path}")
        except Refusal as refusal:
            return refusal.status, {"error": str(refusal), "errors": [{"message": str(refusal)}]}, refusal.headers

    def _check_token(self):
        if not self.known:
            # Without the code the client recognises a hidden repo only by an address with https.
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")

    def _repo(self, repo_id, kind="model", write=False):
        repo = self.server.repos.get((kind, repo_id))
        if write or repo is None or repo.private:
            self._check_token()
        if repo is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _url(self, repo_id, kind):
        return f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"

    def whoami(self):
        self._check_token()
        return {"type": "user", "name": self.server.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self):
        card_data(json.loads(self.body)["content"].encode())
        return {"errors": [], "warnings": []}

    def create(self):
        self._check_token()
        asked = json.loads(self.body)
        kind, repo_id = (
            asked.get("type") or "model",
            f"{asked.get('organization') or self.server.user}/{asked['name']}",
        )
        answer = {"url": self._url(repo_id, kind), "name": repo_id}
        if (kind, repo_id) in self.server.repos:
            return 409, answer | {"error": f"You already created this {kind} repo"}, {}
        # Older clients send `private`.
        private = asked["visibility"] == "private" if "visibility" in asked else asked.get("private")
        self.server.repos[kind, repo_id] = Repo(self.server.private_by_default if private is None else private)
        return answer

    def delete(self):
        self._check_token()
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.server.user
        if self.server.repos.pop((asked.get("type") or "model", f"{owner}/{asked['name']}"), None) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return {}

    def preupload(self, kind, repo_id, revision):
        old, modes = self._repo(repo_id, kind, write=True).at(revision).files, []
        for file in json.loads(self.body)["files"]:
            large = is_large(path := file["path"], file["size"], base64.b64decode(file["sample"]))
            mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            modes.append(mode | ({"oid": etag(path, old[path])} if path in old else {}))
        return {"files": modes}

    def lfs_batch(self, repo_id, kind="model"):
        repo, objects = self._repo(repo_id, kind, write=True), json.loads(self.body)["objects"]
        for wanted in (item for item in objects if item["oid"] not in repo.lfs):
            action = {"href": f"{self._url(repo_id, kind)}.git/lfs/{wanted['oid']}"}
            wanted["actions"] = {"upload": action, "verify": action}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, repo_id, oid, kind="model"):
        # The client sends no token here, as to a storage that knows no users.
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its oid")
        self.server.repos[kind, repo_id].lfs[oid] = self.body
        return b""

    def lfs_verify(self, repo_id, oid, kind="model"):
        if oid not in self._repo(repo_id, kind, write=True).lfs:
            raise Refusal(404, "No such object")
        return b""

    def commit(self, kind, repo_id, revision):
        repo = self._repo(repo_id, kind, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        head, files = repo.at("main").sha, dict(repo.at("main").files)
        if revision != "main" or header["value"].get("parentCommit", head) != head:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"].rstrip("/")
            if key == "file":
                files[path] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile" and value["oid"] in repo.lfs:
                files[path] = repo.lfs[value["oid"]]
            elif key in ("deletedFile", "deletedFolder") and any(f"{name}/".startswith(f"{path}/") for name in files):
                files = {name: data for name, data in files.items() if not f"{name}/".startswith(f"{path}/")}
            else:
                raise Refusal(400, f"Cannot apply {key} to {path}")
        sha = repo.commit(header["value"]["summary"], files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self._url(repo_id, kind)}/commit/{sha}"}

    def info(self, kind, repo_id, revision="main"):
        repo = self._repo(repo_id, kind)
        sha, _, files = repo.at(revision)
        card, siblings = card_data(files.get("README.md", b"")), [{"rfilename": path} for path in sorted(files)]
        answer = {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "cardData": card}
        named = {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        return answer | named | {"tags": card.get("tags") or [], "gated": False, "downloads": 0, "likes": 0}

    def tree(self, kind, repo_id, revision, folder=""):
        found = self._repo(repo_id, kind).at(revision).entries()
        if folder and folder not in found:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        inside = re.escape(f"{folder}/" if folder else "")
        inside += ".+" if self.query.get("recursive") == ["true"] else "[^/]+"
        return [entry for path, entry in found.items() if re.fullmatch(inside, path)]

    def paths_info(self, kind, repo_id, revision):
        found = self._repo(repo_id, kind).at(revision).entries()
        return [found[path] for path in parse_qs(self.body.decode())["paths"] if path in found]

    def resolve(self, repo_id, revision, path, kind="model"):
        sha, _, files = self._repo(repo_id, kind).at(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        content, size = files[path], len(files[path])
        headers["ETag"] = f'"{etag(path, content)}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        start, end = int(asked[1]), min(size, int(asked[2] or size) + 1)
        return 206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{size}"}


_API = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
_GIT = r"/((?P<kind>dataset)s/)?(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = {
    "GET /api/whoami-v2": _Handler.whoami,
    "POST /api/validate-yaml": _Handler.validate_yaml,
    "POST /api/repos/create": _Handler.create,
    "DELETE /api/repos/delete": _Handler.delete,
    f"POST {_API}/preupload/(?P<revision>[^/]+)": _Handler.preupload,
    f"POST {_API}/commit/(?P<revision>[^/]+)": _Handler.commit,
    f"POST {_API}/paths-info/(?P<revision>[^/]+)": _Handler.paths_info,
    f"GET {_API}(/revision/(?P<revision>[^/]+))?": _Handler.info,
    f"GET {_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": _Handler.tree,
    rf"POST {_GIT}\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    rf"POST {_GIT}\.git/lfs/(?P<oid>[0-9a-f]+)": _Handler.lfs_verify,
    rf"PUT {_GIT}\.git/lfs/(?P<oid>[0-9a-f]+)": _Handler.lfs_upload,
    f"(GET|HEAD) {_GIT}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Handler.resolve,
}
