"""This computer as a source: a GGUF file, or a folder with a checkpoint, that a person has already."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from qwen2_converters.hub.repository import HubFile, Repository
from qwen2_local.errors import BadFile
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint


def look(path: Path) -> Repository:
    """A GGUF file with its other parts, or a folder, as a repository whose id is its path. Raises BadFile, UnsupportedModel."""
    path = path.resolve()
    if not (path.is_file() or path.is_dir()):
        raise BadFile(f"{path} is neither a plain file nor a folder.", hint="Give a GGUF file, or the folder of a model.")
    checkpoint = open_checkpoint(path) if (path / "config.json").exists() else None
    found = open_gguf(path).paths if path.is_file() else tuple(file for file in sorted(path.iterdir()) if file.is_file())
    listed = tuple(HubFile(file.name, file.stat().st_size) for file in found)
    # Its own way of telling whether it has changed.
    stamp = hashlib.sha256("".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in found).encode("utf-8", "replace"))
    repository = Repository("local", str(path), stamp.hexdigest()[:40], listed)
    if checkpoint is None:
        return repository
    config = checkpoint.config
    kind = config.packed.method if config.packed else "mlx" if checkpoint.layout == "mlx" else "original"
    return replace(repository, kind=kind, config=config)


def place(repository: Repository, file: HubFile) -> Path:
    """Where a file of such a repository lies."""
    path = Path(repository.id)
    return path.parent / file.path if path.is_file() else path / file.path
