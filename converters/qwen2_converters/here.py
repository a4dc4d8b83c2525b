"""What a pull need not fetch: files that are on this computer, in unfinished work, a local folder, the Hugging Face cache, or an installed model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qwen2_converters.fetching import is_stub, shards_folder
from qwen2_converters.hub import sources
from qwen2_converters.hub.repository import HubFile, Repository
from qwen2_local import files
from qwen2_local.store import Store

_CHUNK = 1 << 22


def places(repository: Repository, file: HubFile, store: Store, draft: str) -> Iterator[Path]:
    """Where the bytes of `file` may be already, by size; they are still to be hashed."""
    folders = [one.folder for one in store.list() if one.manifest and one.manifest.source.lower() == repository.id.lower()]
    for place in (store.unfinished(draft) / file.name, sources.file_here(repository, file), *(folder / file.name for folder in folders)):
        if place is not None and place.is_file() and place.stat().st_size == file.size and not is_stub(place):
            yield place


def begun(folder: Path, file: HubFile) -> int:
    """Bytes of `file`, half-fetched into `folder`, that are on the disk."""
    beside = shards_folder(folder) / file.name
    parts = (folder / f"{file.name}.part", beside / f"{file.name}.part", beside / file.name)
    return sum(part.stat().st_blocks * 512 for part in parts if part.is_file())


def take(file: HubFile, candidates: Iterable[Path], path: Path, advance: Callable[[int], None]) -> bool:
    """Has `file` at `path`, from the first of `candidates` (`path` may be one) whose bytes are right; False if none is, or no hash tells.

    advance: gets the bytes of the file that are hashed, or copied. Raises DoesNotFit, OSError.
    """
    if not (file.sha256 or file.blob):
        return False
    for place in candidates:
        if _is(place, file, advance):
            if place != path:
                link_or_copy(place, path, advance)
            return True
    return False


def link_or_copy(source: Path, path: Path, advance: Callable[[int], None]) -> None:
    """Makes `path` the same as the file `source`: a hard link where the file system allows it, else a copy. What was there goes.

    advance: gets the bytes that are copied. Raises DoesNotFit, OSError.
    """
    source = source.resolve()
    path.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(source, path)
        return
    temporary = path.with_name(f"{path.name}.copy")
    with files.disk_errors(path, source.stat().st_size), source.open("rb") as origin, temporary.open("wb") as copy:
        count = 0
        while chunk := origin.read(_CHUNK):
            copy.write(chunk)
            count += len(chunk)
            advance(count)
    temporary.replace(path)


def _is(place: Path, file: HubFile, advance: Callable[[int], None]) -> bool:
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    count = 0
    with place.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
            count += len(chunk)
            advance(count)
    return count == file.size and digest.hexdigest() == (file.sha256 or file.blob)
