"""Fetching from the test server: remote files of it, and little patience."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_converters.download import download
from qwen2_converters.remote import Address, RemoteFile
from qwen2_converters.retry import Patience
from qwen2_converters.web import Timeouts
from tests.support.hub_server import HubServer, git_blob_id

QUICK = Patience(tries=4, first_s=0.01, longest_s=0.04, asked_s=2.0)
SHORT = Timeouts(connect=2.0, read=0.4)


def remote(hub: HubServer, name: str, data: bytes, check: str = "sha256", **more: Any) -> RemoteFile:
    """The plain file `name` of `hub`, which is given `data`. check: "sha256", "blob" or "size"."""
    hub.plain[name] = data
    return described(name, data, lambda: Address(hub.url(name)), check, **more)


def described(name: str, data: bytes, resolve: Callable[[], Address], check: str = "sha256", **more: Any) -> RemoteFile:
    sha256 = hashlib.sha256(data).hexdigest() if check == "sha256" else None
    return RemoteFile(name, len(data), resolve, sha256, git_blob_id(data) if check == "blob" else None, **more)


def fetch(folder: Path, *files: RemoteFile, **more: Any) -> dict[str, str]:
    return download(files, folder, **({"patience": QUICK, "timeouts": SHORT} | more))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
