"""Models on the Hub: weights, code, tokenizer and card in one commit, or nothing."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .card import add_tags, card_of_model


logger = logging.get_logger(__name__)

ATTEMPTS = 5
WAIT = 1.0  # seconds before the second attempt; each further one waits twice as long
STALL = 60.0  # seconds without a byte that end an attempt
# What the client raises; large files travel by a library of its own, with errors of its own.
FAILURES = (HTTPError, ConnectionError, RuntimeError)
PASSING = (408, 429, 500, 502, 503, 504)


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Iterable[dict[str, Any]] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: Iterable[str] | None = None,
    **card_options,
) -> CommitInfo:
    """Push a swapped model to the Hub, with what it takes to load it, in one commit.

    That is the weights, the configurations, the code of the norms for `trust_remote_code=True`, the tokenizer, and a
    model card. A push that fails for reasons that pass, such as a cut connection, is tried again, and goes on with the
    files that are there already.

    Args:
        model ([`~transformers.PreTrainedModel`]): swapped.
        repo_id (`str`): as in `"<your-namespace>/bert-base-rbn"`; made if it does not exist. A name without a
            namespace gets that of the account.
        tokenizer (*optional*): pushed with the model.
        results (`Iterable[dict]`, *optional*):
            results of runs on one task, for the card (see
            [`render_card`](hf_normswap.reporting.card.render_card)); pushed too, as `results.json`.
        private (`bool`, *optional*): whether a new repo is private; by default as the account has it.
        token (*optional*): of the Hub; by default that of `hf auth login`.
        revision (`str`, *optional*): branch to push to.
        commit_message, commit_description, create_pr, max_shard_size, tags (*optional*): as in
            [`~transformers.PreTrainedModel.push_to_hub`].
        card_options: of [`render_card`](hf_normswap.reporting.card.render_card), such as `license`, `description` and
            `limits`.

    Returns:
        `huggingface_hub.CommitInfo`: the commit; print its `repo_url`.

    Raises:
        ValueError: when the model is not swapped, no result is of its norm, or `repo_id` is no id on the Hub.
        OSError: when the Hub refuses or cannot be reached. The repo is as before then.
    """
    results = list(results)
    repo_id = _full_id(repo_id, token)
    card = card_of_model(model, repo_id, results, **card_options)
    add_tags(card, tags)
    with tempfile.TemporaryDirectory(prefix="normswap-") as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if results:
            Path(folder, "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
        card.save(Path(folder, "README.md"))
        commit = {"commit_message": commit_message or "Upload model", "commit_description": commit_description}
        commit |= {"revision": revision, "create_pr": create_pr}
        return push_folder(folder, repo_id, private=private, token=token, **commit)


def push_folder(
    folder: str, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **commit
) -> CommitInfo:
    """Push all files of `folder` in one commit, with the retries and the errors of [`push_model`].

    `commit` is what [`~huggingface_hub.HfApi.create_commit`] takes beside.
    """

    def operations():
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [CommitOperationAdd(str(path.relative_to(folder).as_posix()), path) for path in files]

    api = HfApi(token=token)
    is_new = is_made = False
    try:
        is_new = not _insist(lambda: _exists(api, repo_id))
        url = _insist(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        is_made = is_new
        # Not upload_folder, which makes several commits of a large one.
        return _insist(lambda: api.create_commit(url.repo_id, operations(), **commit))
    except (*FAILURES, OSError) as error:
        if is_made:
            _withdraw(api, repo_id)
        raise _refusal(repo_id, error) from None  # a traceback of the client could show the request


def _full_id(repo_id: str, token: str | bool | None) -> str:
    """`repo_id` with its namespace, as the Hub completes it: the bare name in a card would be another repo."""
    if "/" in repo_id:
        return repo_id
    try:
        return f"{_insist(HfApi(token=token).whoami)['name']}/{repo_id}"
    except (*FAILURES, OSError) as error:
        raise _refusal(repo_id, error) from None


def _refusal(repo_id: str, error: Exception) -> OSError:
    return OSError(
        f"{repo_id} could not be pushed ({_reason(error)}), and is as it was before: check the name, your token "
        "(hf auth login) and the connection, and push again."
    )


def _exists(api: HfApi, repo_id: str) -> bool:
    """`api.repo_exists`, which would wait without end."""
    try:
        api.repo_info(repo_id, timeout=STALL)
    except GatedRepoError:
        return True
    except RepositoryNotFoundError:
        return False
    return True


def _insist(call: Callable):
    """What `call()` returns, tried again after errors that pass."""
    for attempt in range(ATTEMPTS):
        try:
            with _limited_waiting():
                return call()
        except FAILURES as error:
            response = getattr(error, "response", None)
            if attempt == ATTEMPTS - 1 or (response is not None and response.status_code not in PASSING):
                raise
            asked = "" if response is None else response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdecimal() else WAIT * 2**attempt
            logger.warning(f"The Hub cannot be reached ({_reason(error)}): trying again in {wait:g} s.")
            time.sleep(wait)


@contextmanager
def _limited_waiting() -> Iterator[None]:
    """Ends requests that no byte has come for: without a limit, the client of the Hub waits for ever."""
    client = get_session()
    before = client.timeout
    if before.read is None:
        client.timeout = STALL
    try:
        yield
    finally:
        client.timeout = before


def _withdraw(api: HfApi, repo_id: str) -> None:
    """Remove the repo that was made for a push, unless somebody has put something into it."""
    try:
        with _limited_waiting():
            if not [name for name in api.list_repo_files(repo_id) if name != ".gitattributes"]:
                api.delete_repo(repo_id, missing_ok=True)
    except FAILURES as error:
        logger.warning(f"{repo_id} is left without files ({_reason(error)}): delete it, or push again.")


def _reason(error: Exception) -> str:
    """One line, without what was sent."""
    if isinstance(error, HfHubHTTPError):
        said = (error.server_message or "").strip().splitlines()
        return " ".join([str(error.response.status_code), *said[:1]])
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
