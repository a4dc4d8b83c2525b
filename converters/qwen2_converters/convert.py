"""From a Hugging Face checkpoint to a GGUF file or an MLX folder: checked, planned, written aside, published whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen2_converters.destination import check_destination
from qwen2_converters.making import OnProgress, Options, Progress, Wanted, check, make, name_of
from qwen2_converters.target import Target
from qwen2_local.errors import UsageError
from qwen2_local.files import refuse_existing

__all__ = ["OnProgress", "Options", "Progress", "check", "convert", "convert_all", "name_of"]

_FILE = "model.gguf"  # while it is made


def convert(
    source: Path,
    target: Target,
    output: Path,
    *,
    progress: OnProgress | None = None,
    overwrite: bool = False,
    name: str = "",
    cache: bool = False,
    options: Options | None = None,
) -> Path:
    """Converts the checkpoint in the folder `source` and gives `output`: a GGUF file or an MLX folder, whose parent exists.

    name: what to call the model in a GGUF file; by default the folder's. An `output` that exists is only replaced with `overwrite`, and only
    at the very end. cache: the place is this program's own, and needs no `check_destination`. Offline.

    Stopped or killed, nothing of it is under that name; the work is kept beside it, and the same call goes on with it. It is deleted when
    it is of no use (bad weights, a full disk), or a week old.

    Raises BadFile and UnsupportedModel for the source, DoesNotFit where the disk is too small, UsageError for an `output` that must not be
    written or that another process makes, BackendUnavailable where the library of the target's backend is missing.
    """
    options = replace(options or Options(), name=name) if name else options
    wanted = [_wanted(source, target, output, overwrite=overwrite, cache=cache)]
    make(source, wanted, options or Options(), progress or (lambda _: None))
    return output


def convert_all(
    source: Path,
    outputs: Sequence[tuple[Target, Path]],
    *,
    progress: OnProgress | None = None,
    overwrite: bool = False,
    options: Options | None = None,
) -> None:
    """As `convert`, to several targets, each with its output, out of one read of the weights."""
    if len({output.absolute() for _, output in outputs}) < len(outputs):
        raise UsageError("Two targets would be written to one place.", hint="Name each target once.")
    wanted = [_wanted(source, target, output, overwrite=overwrite) for target, output in outputs]
    make(source, wanted, options or Options(), progress or (lambda _: None))


def _wanted(source: Path, target: Target, output: Path, *, overwrite: bool, cache: bool = False) -> Wanted:
    def refuse() -> None:
        if not cache:
            check_destination(source, target, output, overwrite=overwrite)
        elif not overwrite:
            refuse_existing(output)

    gguf = target.format == "gguf"
    return Wanted(target, output, _FILE if gguf else "", gguf, refuse, overwrite)
