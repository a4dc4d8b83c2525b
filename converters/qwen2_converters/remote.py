"""What is to be fetched: files on a server, each with where it is and how to know that it is the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to send a request. headers: an Authorization, say; they go to the host of `url` alone, never along a redirect to another."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


Resolve = Callable[[], Address]
"""Gives an address that is valid now. May raise FetchFailed (final) or Offline (tried again); runs in a downloading thread."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a listing.

    name: a plain file name. size: bytes.
    resolve: asked before the first request, and anew when the server says that an address is no longer good (400, 401, 403, 410).
    sha256, blob_id: what the whole file must hash to: SHA-256, or git's blob id (the SHA-1 of "blob SIZE\\0" and the data), lower case
        hexadecimal. With neither, only the size can be checked; `checked_by` says which it is.
    etag: the version that the listing named, if any. When it differs from that of a half-fetched file, that starts over.
    mirrors: other places of the same bytes, tried in turn once the first has failed. Only with a hash.
    """

    name: str
    size: int
    resolve: Resolve
    sha256: str | None = None
    blob_id: str | None = None
    etag: str | None = None
    mirrors: tuple[Resolve, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0 or (self.sha256 and not _SHA256.fullmatch(self.sha256)) or (self.blob_id and not _SHA1.fullmatch(self.blob_id)):
            raise ValueError(f"{self.name!r} has an impossible size or hash")
        if self.mirrors and self.checked_by == "size":
            raise ValueError(f"{self.name!r} has mirrors, but no hash that says whether they are the same")

    @property
    def checked_by(self) -> Literal["sha256", "git blob id", "size"]:
        """How it is known that what was fetched is right."""
        return "sha256" if self.sha256 else "git blob id" if self.blob_id else "size"


Phase = Literal["fetching", "verifying"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a download is, in bytes. file: the name of the one that moved; done, total: of all files together.

    phase: "verifying" while bytes that are there already are hashed. `file_done` falls back when a file starts over.
    """

    phase: Phase
    file: str
    file_done: int
    file_total: int
    done: int
    total: int
