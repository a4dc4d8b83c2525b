"""A fetcher that brings the shards of a checkpoint from another folder, with faults on command."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path


class LocalArrivals:
    """Makes the folder `stubs` a copy of `source` without weights, unless it is there already; each shard comes when it is waited for."""

    def __init__(self, source: Path, stubs: Path, *, on_wait: Callable[[Path], None] = lambda _: None, discard: bool = True) -> None:
        self.identity = "tiny@1"
        self.waited: list[str] = []
        self.dropped: list[str] = []
        self._source = source
        self._on_wait = on_wait
        self._discard = discard
        stubs.mkdir(exist_ok=True)
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, stubs)
            elif not (stubs / path.name).exists():
                self._stub(stubs / path.name)

    def wait(self, file: Path) -> None:
        self.waited.append(file.name)
        self._on_wait(file)
        shutil.copy(self._source / file.name, file)

    def consumed(self, file: Path) -> None:
        self.dropped.append(file.name)
        if self._discard:
            self._stub(file)

    def _stub(self, file: Path) -> None:
        whole = (file if file.exists() else self._source / file.name).read_bytes()
        head = 8 + struct.unpack("<Q", whole[:8])[0]
        with file.open("wb") as made:
            made.write(whole[:head])
            made.truncate(len(whole))
