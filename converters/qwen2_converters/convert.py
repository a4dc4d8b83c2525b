"""From a Hugging Face checkpoint to a GGUF file or an MLX folder: checked, planned, written aside, published whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2_converters.companions import check_companions
from qwen2_converters.destination import check_destination
from qwen2_converters.gguf import write_gguf
from qwen2_converters.mlx import write_mlx
from qwen2_converters.plan import make_plan
from qwen2_converters.planned import Plan
from qwen2_converters.target import Target
from qwen2_local import files
from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is. done, total: bytes of the output's tensors. tensor: the one under way, in the output's names."""

    phase: Literal["checking", "converting", "publishing"]
    done: int
    total: int
    tensor: str = ""


OnProgress = Callable[[Progress], None]


def convert(
    source: Path,
    target: Target,
    output: Path,
    *,
    progress: OnProgress | None = None,
    overwrite: bool = False,
    name: str | None = None,
    cache: bool = False,
) -> Path:
    """Converts the checkpoint in the folder `source` and gives `output`: a GGUF file or an MLX folder, whose parent exists.

    name: what to call the model in a GGUF file; by default the folder's. An `output` that exists is only replaced with `overwrite`, and only
    at the very end. cache: the place is this program's own, and needs no `check_destination`. Whatever ends the conversion early, nothing of
    it is left under that name; what a crash leaves beside it is swept by the next one there. Offline.

    Raises BadFile and UnsupportedModel for the source, DoesNotFit where the disk is too small, UsageError for an `output` that must not be
    written, BackendUnavailable where the library of the target's backend is missing.
    """
    if not cache:
        check_destination(source, target, output, overwrite=overwrite)
    report = progress or (lambda _: None)
    checkpoint, plan = prepare(source, target, output.parent, report)
    staging = files.staging_file if target.format == "gguf" else files.staging
    with staging(output, overwrite=overwrite) as made:
        write(checkpoint, plan, made, progress=report, name=name)
        report(Progress("publishing", plan.nbytes, plan.nbytes))
        if overwrite:  # hours may have gone by
            check_destination(source, target, output, overwrite=True)
    return output


def prepare(source: Path, target: Target, folder: Path, progress: OnProgress) -> tuple[Checkpoint, Plan]:
    """What `check` gives, once there is room for it in `folder`. Raises as `convert` does."""
    files.sweep(folder)
    checkpoint, plan = check(source, target)
    progress(Progress("checking", 0, plan.nbytes))
    files.require_free(folder, plan.disk)
    return checkpoint, plan


def check(source: Path, target: Target) -> tuple[Checkpoint, Plan]:
    """The validated checkpoint in the folder `source`, and what converting it will write. Reads no weights; raises as `convert` does."""
    if source.is_file():
        kind = "a GGUF file" if source.suffix == ".gguf" else "a file"
        raise UnsupportedModel(f"{source} is {kind}; conversions start from a Hugging Face folder.", hint="Fetch the original checkpoint.")
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, target)
    check_companions(checkpoint)
    return checkpoint, plan


def write(checkpoint: Checkpoint, plan: Plan, output: Path, *, progress: OnProgress, name: str | None = None) -> None:
    """Writes the GGUF file `output`, or fills the empty folder `output`, and reads its headers back.

    What is to become of a half-made output is its caller's part. Raises as `convert` does.
    """
    done = 0

    def advance(tensor: str, count: int) -> None:
        nonlocal done
        done += count
        progress(Progress("converting", done, plan.nbytes, tensor))

    with files.disk_errors(output, plan.disk):
        if plan.target.format == "gguf":
            write_gguf(checkpoint, plan, output, advance, name=name or name_of(checkpoint.folder))
            open_gguf(output)
        else:
            write_mlx(checkpoint, plan, output, advance)
            open_checkpoint(output)


def name_of(source: Path) -> str:
    """What to call the checkpoint in the folder `source`: as the folder, or as the hub does if it lies in its cache."""
    folder = source.resolve()
    if folder.parent.name == "snapshots":  # huggingface_hub's cache: models--Qwen--Qwen2-0.5B/snapshots/REVISION
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
