"""Hugging Face: listings by its own library, with its tokens, mirrors (HF_ENDPOINT) and offline switch; and what its cache holds already."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

from qwen2_converters.hub.repository import HubFile, Repository, check_listing
from qwen2_converters.remote import Address
from qwen2_local.errors import FetchFailed, Offline, Qwen2LocalError, UnknownModel, UsageError

_ENDPOINT = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRIES = 3
_TIMEOUT_S = 20.0


def endpoint() -> str:
    """The hub's address, or that of a mirror ($HF_ENDPOINT). Raises UsageError if that is no address."""
    address = (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"HF_ENDPOINT is {address[:100]!r}, which is no address.", hint="A mirror's looks like https://hub.example.org.")
    return address


def switched_off() -> bool:
    """Is the network switched off for Hugging Face ($HF_HUB_OFFLINE)?"""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def listing(id: str, revision: str = "") -> Repository:
    """What the hub lists. revision: a commit, branch or tag; "" is the newest.

    Raises UnknownModel where there is no such repository or revision, FetchFailed where it may not be read, Offline where nobody answers,
    BadFile for a listing that is not to be trusted.
    """
    if switched_off():
        raise Offline(f"HF_HUB_OFFLINE is set, so {id} cannot be looked up.", hint="Unset it, or pull what is in the Hugging Face cache already.")
    address = endpoint()  # huggingface_hub reads the variable when it is imported, and fails over a bad one
    # Its own start takes half a second.
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(endpoint=address)
    for left in reversed(range(_TRIES)):
        try:
            info = api.model_info(id, revision=revision or None, files_metadata=True, timeout=_TIMEOUT_S)
            break
        except HFValidationError as error:
            raise UnknownModel(f"{id[:100]} is no id of Hugging Face.", hint="An id looks like Qwen/Qwen2-7B-Instruct.") from error
        except OfflineModeIsEnabled as error:
            raise Offline(f"HF_HUB_OFFLINE is set, so {id} cannot be looked up.", hint="Unset it.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if left and (status == 429 or status >= 500):
                time.sleep(0.5 * (_TRIES - left))
                continue
            raise _refused(id, revision, error, status) from error
        except (HTTPError, OSError) as error:
            if left:
                time.sleep(0.5 * (_TRIES - left))
                continue
            hint = "Check the connection, or try `--source modelscope`. What is in the Hugging Face cache is used without a network."
            raise Offline(f"{endpoint()} cannot be reached ({type(error).__name__}).", hint=hint) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FetchFailed(f"{endpoint()} gave no listing of {id} that can be read.", hint="Is HF_ENDPOINT a mirror of the hub?") from error
    where = f"The listing of {id}"
    files = []
    for sibling in info.siblings or []:
        # The blob id of a large file is that of the pointer which stands for it in git.
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
        size = sibling.lfs.size if sibling.lfs is not None else sibling.size
        files.append(HubFile(str(sibling.rfilename), _whole(size), str(sha256), "" if sha256 else str(sibling.blob_id or "")))
    commit = str(info.sha or "")
    if not _COMMIT.fullmatch(commit):
        raise FetchFailed(f"{endpoint()} does not say which commit {id} is at.", hint="Try again, or another source.")
    return Repository("huggingface", id, commit, check_listing(files, where), _licence(info.card_data))


def address(id: str, revision: str, path: str) -> Address:
    """Where a file is, and the token for it, if there is one."""
    from huggingface_hub import get_token

    token = get_token()
    url = f"{endpoint()}/{id}/resolve/{quote(revision, safe='')}/{quote(path)}"
    return Address(url, {"Authorization": f"Bearer {token}"} if token else {})


def cache_folder(id: str) -> Path:
    """Where huggingface_hub keeps the repository `id`, there or not."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = f"{os.environ.get('HF_HOME') or f'{base}/huggingface'}/hub"
    return Path(os.path.expandvars(os.path.expanduser(cache))) / f"models--{id.replace('/', '--')}"  # noqa: PTH111


def cached_blob(id: str, file: HubFile) -> Path | None:
    """The file in the cache, if its name and size say that it is the one. Its bytes are still to be hashed."""
    digest = file.sha256 or file.blob
    path = cache_folder(id) / "blobs" / digest
    try:
        return path if digest and path.is_file() and path.stat().st_size == file.size else None
    except OSError:
        return None


def cached_listing(id: str, revision: str = "") -> Repository | None:
    """What the cache holds of a repository, as a listing; None if nothing. revision: as for `listing`. Asks no network. Raises BadFile."""
    folder = cache_folder(id)
    try:
        name = revision or "main"
        commit = name if _COMMIT.fullmatch(name) else (folder / "refs" / name).read_text("utf-8").strip()
        snapshot = folder / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
            return None
        files = []
        for path in sorted(snapshot.rglob("*")):
            blob = path.resolve()
            if not path.is_file() or blob.parent != (folder / "blobs").resolve():
                continue
            sha256 = blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else ""
            git = blob.name if _COMMIT.fullmatch(blob.name) else ""
            files.append(HubFile(path.relative_to(snapshot).as_posix(), blob.stat().st_size, sha256, git))
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return Repository("huggingface", id, commit, check_listing(files, str(snapshot)), cached=True) if files else None


def _whole(size: object) -> int:
    return size if type(size) is int else -1


def _licence(card: object) -> str:
    """The licence's id; of those that the hub knows no id for ("other"), the name that the card gives."""
    known, name = getattr(card, "license", None), getattr(card, "license_name", None)
    chosen = name if known in (None, "other") and isinstance(name, str) else known
    return chosen[:100] if isinstance(chosen, str) else ""


def _refused(id: str, revision: str, error: Exception, status: int) -> Qwen2LocalError:
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        hint = f"Ask for access at {endpoint()}/{id}, then set HF_TOKEN to a token of that account (or run `hf auth login`)."
        return FetchFailed(f"{id} is given only to those who asked for access.", hint=hint)
    if isinstance(error, DisabledRepoError):
        return FetchFailed(f"{id} has been disabled by the hub.", hint="Look for another repository of the model.")
    if isinstance(error, RevisionNotFoundError):
        return UnknownModel(f"{id} has no revision {revision[:100]!r}.", hint=f"{endpoint()}/{id}/commits/main lists them.")
    if isinstance(error, RepositoryNotFoundError):
        hint = "Check the name. For a private one set HF_TOKEN (or run `hf auth login`)."
        return UnknownModel(f"Hugging Face has no repository {id} that may be read.", hint=hint)
    if status == 401:
        return FetchFailed(f"{endpoint()} does not accept the token.", hint="Check HF_TOKEN, or run `hf auth login` again.")
    if status == 429:
        return FetchFailed(f"{endpoint()} asks to wait: too many requests.", hint="Try again in some minutes; a token in HF_TOKEN allows more.")
    return FetchFailed(f"{endpoint()} answers {status or 'nothing'} to a question about {id}.", hint="Try again later, or `--source modelscope`.")
