"""Where a conversion may write: refused before any work is done, and never a folder of other people's files. `files` makes outputs whole."""

from __future__ import annotations

from pathlib import Path

from qwen2_converters.companions import COMPANIONS
from qwen2_converters.target import Target
from qwen2_local.errors import BadFile, UsageError
from qwen2_local.files import refuse_existing
from qwen2_local.formats.checkpoint import is_mlx

# What mlx_lm writes beside the weights, and the Finder into any folder.
_BESIDE = {"config.json", "model.safetensors.index.json", "README.md", "vocab.json", "merges.txt", ".DS_Store", *COMPANIONS}


def check_destination(source: Path, target: Target, output: Path, *, overwrite: bool) -> None:
    """Raises UsageError unless the conversion of the folder `source` to `target` may become `output`.

    What exists is only replaced with `overwrite`: a file by a GGUF file, an MLX model's folder by such a folder.
    """
    check_place(source, output)
    if target.format == "gguf" and output.exists() and not output.is_file():
        what = "a folder" if output.is_dir() else "no plain file"
        raise UsageError(f"{output} is {what}, but a GGUF model is a file.", hint=f"Give the file's name: -o {output / 'model.gguf'} say.")
    if target.format == "mlx" and output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, but an MLX model is a folder.", hint="Choose another name with -o.")
    if not overwrite:
        refuse_existing(output)
    elif output.is_dir():
        _refuse_foreign(output)


def check_place(source: Path, output: Path) -> None:
    """Raises UsageError for an `output` without a name of its own or a folder to lie in, and for one in or around the folder `source`."""
    place, origin = output.parent.resolve(), source.resolve()
    if not place.is_dir():
        raise UsageError(f"{output.parent} is no folder, so {output.name} cannot be made there.", hint="Make it first, or choose another.")
    if output.name in ("", ".."):
        raise UsageError(f"{output} is no name for a file or folder.", hint="Give it a name with -o.")
    for path in (place / output.name, output.resolve()):
        if path.is_relative_to(origin) or origin.is_relative_to(path):
            raise UsageError(f"{output} lies in the source, {source}, or around it.", hint="Choose a place outside of it with -o.")


def _refuse_foreign(folder: Path) -> None:
    """Raises UsageError unless `folder` is an MLX model and nothing else, or empty."""
    inside = list(folder.iterdir())
    foreign = [path.name for path in inside if path.is_dir() or not (path.name in _BESIDE or path.match("model*.safetensors"))]
    hint = "Delete it yourself, or choose another name with -o."
    if foreign:
        raise UsageError(f"{folder} is not replaced: it holds {min(foreign)!r}, which is no part of an MLX model.", hint=hint)
    try:
        if inside and not is_mlx(folder):
            raise UsageError(f"{folder} is not replaced: it is an original checkpoint, not an MLX model.", hint=hint)
    except BadFile as error:
        raise UsageError(f"{folder} is not replaced: it is no whole MLX model. {error.what}", hint=hint) from error
