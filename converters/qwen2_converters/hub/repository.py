"""What a hub says a repository holds: checked names, sizes and hashes, and the models that these files make."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from qwen2_local.errors import BadFile
from qwen2_local.files import refuse_clashes, safe_name
from qwen2_local.formats.config import Qwen2Config

SourceName = Literal["huggingface", "modelscope", "address", "local"]
"""Who gives the files: a hub, the server of a plain address, or this computer."""

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "README.md", "LICENSE",
)  # fmt: skip
"""What is fetched beside the weights of a checkpoint, where it is there."""

_TEXTS = ("README.md", "LICENSE")

MOST_FILES = 10_000
"""Files of a repository; more are not believed."""

_MOST_BYTES = 1 << 42
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LEVEL = re.compile(
    r"(?:^|[-._])(?P<level>i?q[1-8]_(?:k_(?:xl|[sml])|k|[01]|xxs|xs|nl|s|m)|tq[12]_0|mxfp4|bf16|fp?16|fp?32)(?:[-._](?:split|imat|i1))*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. path: with "/" where it lies in a folder. size: bytes.

    sha256, blob: the hash that the hub tells, "" if another or none; blob is git's, a SHA-1.
    """

    path: str
    size: int
    sha256: str = ""
    blob: str = ""

    @property
    def name(self) -> str:
        """Its name here, where models have no folders."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True, slots=True)
class Repository:
    """What a hub lists. revision: the commit. config: its config.json, read; None without one. kind: of the checkpoint in it, "" without one.

    licence: the hub's id of it, "" where it says none. cached: known from the Hugging Face cache alone; no hub was asked.
    """

    source: SourceName
    id: str
    revision: str
    files: tuple[HubFile, ...]
    licence: str = ""
    kind: Literal["", "original", "mlx", "gptq", "awq"] = ""
    config: Qwen2Config | None = None
    cached: bool = False

    @property
    def is_local(self) -> bool:
        """Is it a folder or file of this computer?"""
        return self.source == "local"

    @property
    def url(self) -> str:
        """Its page; "" where it has none."""
        base = {"huggingface": "https://huggingface.co", "modelscope": "https://modelscope.cn/models"}.get(self.source)
        return f"{base}/{self.id}" if base else ""


@dataclass(frozen=True, slots=True)
class GgufChoice:
    """A GGUF model in a repository: one file, or all parts of a split one in order. level: "q4_k_m", or "" where the name tells none."""

    level: str
    stem: str
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(file.size for file in self.files)


def check_listing(files: Iterable[HubFile], where: str) -> tuple[HubFile, ...]:
    """The files, sorted by path. Raises BadFile if one name, size or hash is not to be trusted: then nothing of that listing is."""
    found = tuple(sorted(files, key=lambda file: file.path))
    if len(found) > MOST_FILES:
        raise BadFile(f"{where} lists {len(found):,} files, which no model has.", hint="Check the name of the repository.")
    for file in found:
        for part in file.path.split("/"):
            safe_name(part, where)
        if not 0 <= file.size <= _MOST_BYTES:
            raise BadFile(f"{where} says that {file.path[:100]!r} has {file.size} bytes.", hint="Try again, or another source.")
        if not re.fullmatch(r"([0-9a-f]{64})?", file.sha256) or not re.fullmatch(r"([0-9a-f]{40})?", file.blob):
            raise BadFile(f"{where} gives {file.path[:100]!r} a hash that is none.", hint="Try again, or another source.")
    refuse_clashes((file.path for file in found), where)
    return found


def source_hash(files: Iterable[HubFile]) -> str:
    """One hash of `files`, by which a model knows whether it is still what it was made from; "" if the hub tells no hash of one.

    Texts for people do not count.
    """
    lines = []
    for file in sorted((file for file in files if file.name not in _TEXTS), key=lambda file: file.path):
        if not (file.sha256 or file.blob):
            return ""
        lines.append(f"{file.name} {file.size} {file.sha256 or file.blob}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def ggufs(repository: Repository) -> tuple[GgufChoice, ...]:
    """The GGUF models, by name. Split ones only with all their parts; no adapters, projectors or importance matrices."""
    parts: dict[str, dict[int, HubFile]] = {}
    counts: dict[str, int] = {}
    for file in repository.files:
        name = file.name.lower()
        if not name.endswith(".gguf") or name.startswith("mmproj") or "imatrix" in name or "lora" in name:
            continue
        match = _PART.fullmatch(file.path)
        stem = match["stem"] if match else file.path.removesuffix(file.path[-5:])
        parts.setdefault(stem, {})[int(match["number"]) if match else 1] = file
        counts[stem] = int(match["count"]) if match else 1
    whole = [(stem, found) for stem, found in parts.items() if sorted(found) == list(range(1, counts[stem] + 1))]
    return tuple(GgufChoice(level_of(stem), PurePosixPath(stem).name, tuple(found[number] for number in sorted(found))) for stem, found in whole)


def level_of(stem: str) -> str:
    """The quantization that a GGUF's name tells, as we spell it ("q4_k_m", "f16"); "" if none."""
    match = _LEVEL.search(PurePosixPath(stem).name)
    level = match["level"].lower() if match else ""
    return {"fp16": "f16", "fp32": "f32"}.get(level, level)


def checkpoint_files(repository: Repository) -> tuple[HubFile, ...]:
    """The files of the checkpoint at the top of `repository`: weights, their index, config and tokenizer. Raises BadFile if one is missing."""
    here = {file.path: file for file in repository.files}
    if "config.json" not in here:
        raise BadFile(f"{repository.id} holds no config.json, so it is no checkpoint.", hint="Check the name of the repository.")
    shards = {int(match["number"]): (name, int(match["count"])) for name in here if (match := _SHARD.fullmatch(name))}
    if _INDEX in here and shards:
        if sorted(shards) != list(range(1, max(count for _, count in shards.values()) + 1)):
            raise BadFile(f"{repository.id} does not list all shards of its checkpoint.", hint="Try another revision or repository.")
        weights = [_INDEX, *(name for name, _ in shards.values())]
    elif "model.safetensors" in here:  # MLX writes an index also for one file
        weights = ["model.safetensors", *([_INDEX] if _INDEX in here else [])]
    else:
        hint = "Pickles (*.bin, *.pt) can run code and are never fetched. Look for a repository with .safetensors or .gguf files."
        raise BadFile(f"{repository.id} holds no .safetensors file.", hint=hint)
    if "tokenizer.json" not in here:
        raise BadFile(f"{repository.id} holds no tokenizer.json.", hint="Look for a repository that has one, or for its GGUF files.")
    return tuple(here[name] for name in sorted({*weights, *(name for name in COMPANIONS if name in here)}))
