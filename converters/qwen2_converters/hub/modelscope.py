"""ModelScope: listings and addresses by its HTTP interface. Every file has a SHA-256 there."""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import quote

from qwen2_converters.hub.repository import HubFile, Repository, check_listing
from qwen2_converters.remote import Address
from qwen2_converters.web import open_client
from qwen2_local.errors import BadFile, FetchFailed, Offline, UnknownModel
from qwen2_local.formats.strict_json import parse_object

_ENDPOINT = "https://www.modelscope.cn"
_MOST_ANSWER = 16_000_000
_TRIES = 3
_TIMEOUT_S = 20.0


def endpoint() -> str:
    """The hub's address, or another that speaks like it ($MODELSCOPE_ENDPOINT)."""
    return (os.environ.get("MODELSCOPE_ENDPOINT") or _ENDPOINT).rstrip("/")


def listing(id: str, revision: str = "") -> Repository:
    """What the hub lists. revision: a commit, branch or tag; "" is the newest, "master".

    Raises UnknownModel, FetchFailed, Offline and BadFile as `huggingface.listing` does.
    """
    revision = revision or "master"
    owner, _, name = id.partition("/")
    base = f"{endpoint()}/api/v1/models/{quote(owner)}/{quote(name)}"
    data = _get(id, f"{base}/repo/files?Revision={quote(revision, safe='')}&Recursive=true")
    entries = data.get("Files")
    if not isinstance(entries, list):
        raise FetchFailed(f"{endpoint()} gave no listing of {id} that can be read.", hint="Try again, or `--source huggingface`.")
    files = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise BadFile(f"The listing of {id} holds an entry that is no table.", hint="Try again, or `--source huggingface`.")
        if entry.get("Type") != "tree":
            path, size, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
            files.append(HubFile(str(path or ""), size if type(size) is int else -1, str(sha256 or "").lower()))
    licence = _get(id, base).get("License")
    return Repository(
        "modelscope", id, revision, check_listing(files, f"The listing of {id}"), licence.lower()[:100] if isinstance(licence, str) else ""
    )


def address(id: str, revision: str, path: str) -> Address:
    """Where a file is, and the token for it, if there is one."""
    url = f"{endpoint()}/models/{quote(id)}/resolve/{quote(revision, safe='')}/{quote(path)}"
    return Address(url, _login())


def _login() -> dict[str, str]:
    token = os.environ.get("MODELSCOPE_API_TOKEN", "")
    return {"Cookie": f"m_session_id={token}"} if token else {}


def _get(id: str, url: str) -> dict[str, Any]:
    """The Data of an answer."""
    import httpx2

    with open_client(timeout=_TIMEOUT_S, headers=_login()) as client:
        for left in reversed(range(_TRIES)):
            try:
                with client.stream("GET", url) as response:
                    status, raw = response.status_code, b""
                    for piece in response.iter_bytes():
                        raw += piece
                        if len(raw) > _MOST_ANSWER:
                            raise BadFile(f"{endpoint()} sends more than a listing of {id} can be.", hint="Try `--source huggingface`.")
            except httpx2.HTTPError as error:
                if left:
                    time.sleep(0.5 * (_TRIES - left))
                    continue
                hint = "Check the connection, or try `--source huggingface`."
                raise Offline(f"{endpoint()} cannot be reached ({type(error).__name__}).", hint=hint) from error
            if left and (status == 429 or status >= 500):
                time.sleep(0.5 * (_TRIES - left))
                continue
            break
    if status == 404:
        raise UnknownModel(f"ModelScope has no repository {id} of that revision that may be read.", hint="Check the name and --revision.")
    if status != 200:
        hint = "Set MODELSCOPE_API_TOKEN for what needs a login." if status in (401, 403) else "Try again later, or `--source huggingface`."
        raise FetchFailed(f"{endpoint()} answers {status} to a question about {id}.", hint=hint)
    data = parse_object(raw, f"The answer of {endpoint()}").get("Data")
    if not isinstance(data, dict):
        raise FetchFailed(f"{endpoint()} gave no answer about {id} that can be read.", hint="Try again, or `--source huggingface`.")
    return data
