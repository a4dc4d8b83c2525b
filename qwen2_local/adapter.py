"""A LoRA adapter for a model: found, converted to the backend's format where it is PEFT's, and kept in the cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qwen2_local import files, paths
from qwen2_local.backends import Stamp
from qwen2_local.errors import UsageError
from qwen2_local.formats.checkpoint import member
from qwen2_local.formats.strict_json import read_object

_CONFIG = "adapter_config.json"
_MLX_WEIGHTS = "adapters.safetensors"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_MAX_CONFIG = 1_000_000
_LAYOUT = 1
"""Raise it when a change to the converters makes earlier conversions stale."""


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter of the backend's own format. identity: a hash of where it is from, how large and how old; files: what it consists of."""

    path: Path
    identity: str
    files: tuple[Stamp, ...]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(stamp.size for stamp in self.files)


def find(path: Path, format: str) -> Found:
    """The adapter at `path` for "gguf" or "mlx"; not checked yet against the model.

    Raises UsageError for what is not there or for another backend, BadFile and UnsupportedModel for a PEFT adapter that cannot be converted.
    """
    if path.is_file():
        if format != "gguf":
            raise UsageError(f"{path} is a file, but adapters for MLX are folders.", hint="Give the folder of a PEFT adapter, or of one for MLX.")
        return _found(path, [path])
    if not (path / _CONFIG).is_file():
        raise UsageError(f"{path} is no adapter.", hint=f"Give a GGUF file, or a folder with {_CONFIG}.")
    # Only a converter's and mlx_lm's own have this; a PEFT folder is read for what it says when it is converted.
    if "peft_type" in read_object(member(path, _CONFIG), _MAX_CONFIG):
        return _converted(path, format)
    if format != "mlx":
        raise UsageError(f"{path} is an adapter for MLX.", hint="Give the adapter that PEFT wrote, or a GGUF file.")
    return _found(path, [member(path, _CONFIG), member(path, _MLX_WEIGHTS)])


def _found(path: Path, members: list[Path]) -> Found:
    try:
        stamps = tuple(Stamp.of(file) for file in members)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}.", hint="Check that the adapter is complete.") from error
    return Found(path, _hash(stamps), stamps)


def _converted(folder: Path, format: str) -> Found:
    """PEFT's, in the cache: under a key of what it was made from."""
    source = _found(folder, [member(folder, _CONFIG), member(folder, _PEFT_WEIGHTS)])
    place = paths.cache() / "adapters"
    output = place / f"{source.identity[:32]}-{_LAYOUT}{'.gguf' if format == 'gguf' else ''}"
    if not output.exists():
        from qwen2_converters.adapters import convert_adapter
        from qwen2_converters.target import Target

        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            hint = "Set QWEN2_LOCAL_HOME to a folder that can be written, or convert it with `qwen2-local convert`."
            raise UsageError(f"The adapter has to be converted, but {place} cannot be written: {error.strerror}.", hint=hint) from error
        with files.lock(place / f".{output.name}.lock", what=f"The conversion of {folder}", wait_s=600.0):
            if not output.exists():  # another process may have made it meanwhile
                convert_adapter(folder, None, Target.parse(f"{format}:f16"), output, name=folder.resolve().name)
    made = _found(output, [output] if format == "gguf" else [output / _CONFIG, output / _MLX_WEIGHTS])
    return Found(made.path, source.identity, made.files)


def _hash(stamps: tuple[Stamp, ...]) -> str:
    what = "\n".join(f"{stamp.path.resolve()} {stamp.size} {stamp.changed}" for stamp in stamps)
    return hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()
