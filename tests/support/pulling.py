"""Hubs with small models, for tests of `pull`: the guide in the place of Qwen2-0.5B, and GGUF files cut in two as llama.cpp's gguf-split does."""

from __future__ import annotations

from pathlib import Path

from qwen2_local.formats.gguf import GgufHeader, read_gguf
from qwen2_local.store import guide_folder
from tests.support.gguf_bytes import BOOL, F32, I32, STRING, U32, array, info, key, whole

MODEL = "Qwen/Qwen2-0.5B-Instruct"
APACHE = {"license": "apache-2.0"}


def guide_files() -> dict[str, bytes]:
    """The guide as a repository: an original checkpoint."""
    return {path.name: path.read_bytes() for path in guide_folder().iterdir() if path.is_file() and path.suffix in (".json", ".safetensors")}


def split(path: Path, stem: str) -> dict[str, bytes]:
    """The GGUF at `path` in two parts: all keys in the first, the tensors in both."""
    header = read_gguf(path)
    data, names = path.read_bytes(), list(header.tensors)
    half = len(names) // 2
    parts = {}
    for number, mine in enumerate((names[:half], names[half:])):
        keys = [_key(name, value) for name, value in header.keys.items()] if number == 0 else []
        keys += [_u16("split.no", number), _u16("split.count", 2), key("split.tensors.count", I32, len(names))]
        parts[f"{stem}-{number + 1:05d}-of-00002.gguf"] = _part(header, data, keys, mine)
    return parts


def _part(header: GgufHeader, data: bytes, keys: list[bytes], names: list[str]) -> bytes:
    infos, body = [], b""
    for name in names:
        tensor = header.tensors[name]
        infos.append(info(name, tensor.shape, tensor.type.number, len(body)))
        body += data[tensor.offset : tensor.offset + tensor.nbytes]
        body += bytes(-len(body) % 32)
    return whole(keys, infos, body)


def _u16(name: str, value: int) -> bytes:
    from tests.support.gguf_bytes import string

    return string(name) + (2).to_bytes(4, "little") + value.to_bytes(2, "little")


def _key(name: str, value: object) -> bytes:
    if isinstance(value, str):
        return key(name, STRING, value)
    if isinstance(value, bool):
        return key(name, BOOL, value)
    if isinstance(value, int):
        return key(name, U32, value) if value >= 0 else key(name, I32, value)
    if isinstance(value, float):
        return key(name, F32, value)
    values = list(value)  # type: ignore[call-overload]
    return array(name, STRING if isinstance(values[0], str) else F32 if isinstance(values[0], float) else I32, values)
