"""Is a model whole, are its files those that were installed, and how far are its weights from those that it was made of?

Reads everything once, in bounded memory, and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from qwen2_converters.compare import TensorError, compare
from qwen2_local import files
from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.check_gguf import GgufModel, open_gguf
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint
from qwen2_local.manifest import Manifest

OnProgress: TypeAlias = Callable[[Literal["hashing", "comparing"], int, int], None]
"""Called with what is under way, and the bytes done and to do of all of it."""

_IGNORED = ("manifest.json", ".DS_Store")


@dataclass(frozen=True, slots=True)
class Report:
    """What was found. kind: "GGUF Q4_K_M" … tensors, nbytes: of the model. hashed: files whose checksum was compared.

    faults: each a sentence. source: what was compared with. errors: of all tensors, the worst first.
    """

    path: Path
    kind: str
    tensors: int
    nbytes: int
    hashed: int
    faults: tuple[str, ...]
    source: Path | None
    errors: tuple[TensorError, ...]

    @property
    def ok(self) -> bool:
        """Neither faults nor suspicious errors?"""
        return not self.faults and not any(error.suspicious for error in self.errors)


def verify(path: Path, *, manifest: Manifest | None = None, source: Path | None = None, progress: OnProgress | None = None) -> Report:
    """Checks the model at `path`, a GGUF file or a folder. manifest: of an installed one. source: the checkpoint it was made of.

    Damage is in the report. Raises UnsupportedModel for what is no Qwen2, BadFile for a `source` that is no sound checkpoint.
    """
    report = progress or (lambda phase, done, total: None)
    folder = path if path.is_dir() else path.parent
    faults: list[str] = []
    model: GgufModel | Checkpoint | None = None
    try:
        model = open_checkpoint(path) if path.is_dir() else open_gguf(path)
    except UnsupportedModel:
        raise
    except BadFile as error:
        faults.append(error.what)
    origin = open_checkpoint(source) if source is not None else None
    to_hash = manifest.size if manifest else 0
    to_compare = model.weight_bytes if model and origin else 0
    total = to_hash + to_compare
    hashed = 0
    if manifest is not None:
        hashed = len(manifest.files)
        faults += check_files(folder, manifest, lambda done: report("hashing", done, total))
    errors: list[TensorError] = []
    if model is not None and origin is not None:
        compared, others = compare(model, origin, lambda done: report("comparing", to_hash + done, total))
        errors = sorted(compared, key=lambda error: -error.relative if error.relative == error.relative else -math.inf)
        faults += others
    kind, tensors, nbytes = _described(model)
    return Report(path, kind, tensors, nbytes, hashed, tuple(dict.fromkeys(faults)), source, tuple(errors))


def check_files(folder: Path, manifest: Manifest, advance: Callable[[int], None]) -> list[str]:
    """What differs between the files in `folder` and those of `manifest`: missing, of another size or other bytes, or too many."""
    faults: list[str] = []
    done = 0
    for file in manifest.files:
        path = folder / file.name
        try:
            size = path.stat().st_size
            if size != file.size:
                faults.append(f"{path} has {size:,} bytes, {file.size:,} were installed.")
            elif files.sha256(path, lambda count, before=done: advance(before + count)) != file.sha256:  # type: ignore[misc]
                faults.append(f"{path} has changed since it was installed: its SHA-256 is another.")
        except OSError as error:
            faults.append(f"{path} is missing." if isinstance(error, FileNotFoundError) else f"{path} cannot be read: {error.strerror}.")
        done += file.size
        advance(done)
    known = {file.name for file in manifest.files}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in known and path.name not in _IGNORED)
    return faults + [f"{folder / name} was not installed." for name in extra]


def _described(model: GgufModel | Checkpoint | None) -> tuple[str, int, int]:
    if model is None:
        return "", 0, 0
    if isinstance(model, GgufModel):
        return f"GGUF {model.quantization}", len(model.tensors), model.weight_bytes
    bits = model.config.quantization
    kind = "MLX" if model.layout == "mlx" else "Hugging Face"
    return f"{kind} {f'{bits.bits}-bit' if bits else model.config.dtype}", len(model.tensors), model.weight_bytes
