"""The sources as one: look at a repository, wherever it is, and say how its files are fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qwen2_converters.hub import huggingface, local, modelscope
from qwen2_converters.hub.repository import HubFile, Repository, SourceName, check_listing
from qwen2_converters.remote import Address, RemoteFile
from qwen2_converters.web import open_client
from qwen2_local.errors import BadFile, FetchFailed, Offline, Qwen2LocalError, UnknownModel
from qwen2_local.formats.config import MAX_CONFIG, parse_config
from qwen2_local.formats.strict_json import parse_object

NAMES: dict[SourceName, str] = {"huggingface": "Hugging Face", "modelscope": "ModelScope", "address": "that address", "local": "this computer"}
"""What people call them."""


def look(source: SourceName, id: str, revision: str = "") -> Repository:
    """The repository `id`, its config.json read. Without a network, what the Hugging Face cache holds of it.

    Raises UnknownModel, FetchFailed, Offline, BadFile, UnsupportedModel.
    """
    if source == "modelscope":
        return _with_config(modelscope.listing(id, revision))
    try:
        return _with_config(huggingface.listing(id, revision))
    except Offline:
        cached = huggingface.cached_listing(id, revision)
        if cached is None:
            raise
        return _with_config(cached)


def look_at_all(source: SourceName, ids: Sequence[str], revision: str = "") -> list[Repository]:
    """Those of the repositories `ids` that are there.

    Raises as `look` does: what kept one of them from being read, or UnknownModel for the last if none is there.
    """
    with ThreadPoolExecutor(len(ids)) as pool:
        found = list(pool.map(partial(_try, source, revision), ids))
    there = [one for one in found if isinstance(one, Repository)]
    errors = [one for one in found if not isinstance(one, Repository)]
    # What is missing is no fault where something else serves; what cannot be asked is, as a far larger one could be taken instead.
    serious = [error for error in errors if not isinstance(error, UnknownModel)]
    if serious and not all(isinstance(error, Offline) and one.cached for error in serious for one in there):
        raise serious[0]
    if not there:
        raise errors[-1]
    return there


def look_at_address(url: str) -> Repository:
    """A single GGUF on a server, as a repository of one file. Its size is asked for, and its hash where the server tells one (Hugging Face's do)."""
    import httpx2

    name = unquote(urlsplit(url).path.rpartition("/")[2])
    try:
        with open_client(timeout=20.0, follow_redirects=True, max_redirects=5) as client, client.stream("HEAD", url) as response:
            status, headers = response.status_code, response.headers
            linked = next((one.headers for one in (*response.history, response) if "X-Linked-Etag" in one.headers), headers)
    except httpx2.HTTPError as error:
        raise Offline(f"{url[:200]} cannot be reached ({type(error).__name__}).", hint="Check the address and the connection.") from error
    if status != 200:
        raise FetchFailed(f"{url[:200]} answers {status}.", hint="Check the address: open it in a browser.")
    size = linked.get("X-Linked-Size") or headers.get("Content-Length") or ""
    if not size.isascii() or not size.isdigit() or len(size) > 15:
        raise FetchFailed(f"{url[:200]} does not say how large the file is.", hint="Fetch it yourself, and pull the file.")
    digest = linked.get("X-Linked-Etag", "").strip('"')
    sha256 = digest if len(digest) == 64 else ""
    return Repository("address", url, headers.get("ETag", "")[:200], check_listing([HubFile(name, int(size), sha256)], url[:200]))


def remote(repository: Repository, file: HubFile) -> RemoteFile:
    """How `file` is fetched. Raises Offline where no hub was asked: then all that there is is in the cache."""
    if repository.cached:
        hint = "Go online (unset HF_HUB_OFFLINE), then run the same command."
        raise Offline(f"{file.path} of {repository.id} is not in the Hugging Face cache, or damaged there, and there is no network.", hint=hint)
    etag = repository.revision if repository.source == "address" and not file.sha256 else ""
    resolve = _resolve(repository, file.path)
    return RemoteFile(file.name, file.size, resolve, sha256=file.sha256 or None, blob_id=file.blob or None, etag=etag or None)


def file_here(repository: Repository, file: HubFile) -> Path | None:
    """Where the file lies on this computer: in the local folder itself, or in the Hugging Face cache. Its bytes are still to be hashed."""
    if repository.is_local:
        return local.place(repository, file)
    return huggingface.cached_blob(repository.id, file) if repository.source == "huggingface" else None


def _try(source: SourceName, revision: str, id: str) -> Repository | Qwen2LocalError:
    try:
        return look(source, id, revision)
    except Qwen2LocalError as error:
        return error


def _resolve(repository: Repository, path: str) -> Callable[[], Address]:
    if repository.source == "address":
        return lambda: Address(repository.id)
    hub = modelscope if repository.source == "modelscope" else huggingface
    return partial(hub.address, repository.id, repository.revision, path)


def _with_config(repository: Repository) -> Repository:
    """With what its config.json says of it."""
    file = next((file for file in repository.files if file.path == "config.json"), None)
    weights = any(file.path.endswith(".safetensors") for file in repository.files)
    if file is None or not weights:
        return repository
    where = Path(f"{repository.id}/config.json")
    if file.size > MAX_CONFIG:
        raise BadFile(f"{where} has {file.size} bytes, too many for what it should hold.", hint="Look for another repository of the model.")
    raw = parse_object(_content(repository, file), str(where))
    config = parse_config(raw, where)
    if config.packed is not None:
        return replace(repository, kind=config.packed.method, config=config)
    # Unquantized ones of MLX say so in their weights alone; their names do, too.
    named = "mlx" in repository.id.lower().replace("-", "/").split("/")
    return replace(repository, kind="mlx" if config.quantization or named else "original", config=config)


def _content(repository: Repository, file: HubFile) -> bytes:
    cached = file_here(repository, file)
    if cached is not None:
        return cached.read_bytes()
    from qwen2_converters.download import read_range

    return read_range(remote(repository, file), 0, file.size) if file.size else b""
