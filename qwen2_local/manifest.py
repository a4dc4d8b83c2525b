"""What an installed model is, where it came from, and the hash of each of its files: `manifest.json` in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, TypeVar, cast

from qwen2_local import files
from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.strict_json import read_object

SCHEMA = 1
"""The version of the manifest that this program writes."""

Format = Literal["gguf", "mlx", "hf"]
"""How an installed model's weights are kept; "hf" is the original checkpoint, which is converted on its first use."""

_T = TypeVar("_T")

_MAX_MANIFEST = 1_000_000


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model. size: bytes; sha256: hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an installed model is. source: hub id or path it came from; revision: the hub's commit, or "". context: tokens.

    quantization: "Q4_K_M", "4-bit", "bf16" … licence: id. created: ISO 8601, UTC. source_hash: one hash of the files it was made from, as
    the hub told them; "" where that is not known.
    """

    name: str
    source: str
    revision: str
    files: tuple[ManifestFile, ...]
    format: Format
    architecture: str
    quantization: str
    licence: str
    context: int
    created: str
    schema: int = SCHEMA
    source_hash: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and checks a manifest. Raises BadFile naming the field, UnsupportedModel if a newer version of this program wrote it."""
        raw = read_object(path, _MAX_MANIFEST)
        schema = _field(raw, "schema", int, path)
        if schema > SCHEMA:
            raise UnsupportedModel(f"{path} was made by a newer version of qwen2-local.", hint="Update qwen2-local.")
        listed = tuple(_file(entry, path) for entry in _field(raw, "files", list, path))
        if not listed:
            raise _bad(path, "files", "it is empty")
        files.refuse_clashes((file.name for file in listed), str(path))
        kind = _field(raw, "format", str, path)
        if kind not in ("gguf", "mlx", "hf"):
            raise _bad(path, "format", f"{kind[:40]!r} is none of gguf, mlx and hf")
        if kind == "gguf" and not any(file.name.endswith(".gguf") for file in listed):
            raise _bad(path, "files", "there is no GGUF file among them")
        context = _field(raw, "context", int, path)
        if not 1 <= context <= 1 << 24:
            raise _bad(path, "context", f"{context} is no number of tokens")
        source_hash = _field(raw, "source_hash", str, path) if "source_hash" in raw else ""
        texts = {name: _field(raw, name, str, path) for name in ("name", "source", "revision", "architecture", "quantization", "licence", "created")}
        return cls(files=listed, format=cast(Format, kind), context=context, schema=schema, source_hash=source_hash, **texts)


def list_files(
    folder: Path, advance: Callable[[int, int], None] = lambda _done, _total: None, *, known: Mapping[str, str] = MappingProxyType({})
) -> tuple[ManifestFile, ...]:
    """The files in `folder`, hashed, for a manifest. advance: gets the bytes that are hashed, and those of all. known: hashes by file name."""
    sizes = {path: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    total = sum(size for path, size in sizes.items() if path.name not in known)
    before = 0

    def hashed(done: int) -> None:
        advance(before + done, total)

    listed: list[ManifestFile] = []
    for path, size in sizes.items():
        sha256 = known.get(path.name)
        if sha256 is None:
            sha256 = files.sha256(path, hashed)
            before += size
        listed.append(ManifestFile(path.name, size, sha256))
    return tuple(listed)


def now() -> str:
    """The time, for a manifest."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _file(entry: object, path: Path) -> ManifestFile:
    if not isinstance(entry, dict):
        raise _bad(path, "files", "an entry is no table")
    size, digest = _field(entry, "size", int, path), _field(entry, "sha256", str, path)
    if size < 0 or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise _bad(path, "files", "an entry has an impossible size or sha256")
    return ManifestFile(files.safe_name(_field(entry, "name", str, path), str(path)), size, digest)


def _field(raw: dict[str, Any], name: str, kind: type[_T], path: Path) -> _T:
    value = raw.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _bad(path, name, "it is missing or of the wrong type")
    return value


def _bad(path: Path, name: str, fault: str) -> BadFile:
    return BadFile(f"{path}: {name}: {fault}.", hint="Delete the model with `qwen2-local rm` and get it again.")
