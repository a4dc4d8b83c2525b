"""Converts a checkpoint into the store, where it is a model with a name."""

from __future__ import annotations

from pathlib import Path

from qwen2_converters.convert import OnProgress, Progress, check, write
from qwen2_converters.keys import licence
from qwen2_converters.target import Target
from qwen2_local import files
from qwen2_local.manifest import Manifest, list_files, now
from qwen2_local.store import Store


def install(
    source: Path, target: Target, store: Store, name: str, *, origin: str = "", revision: str = "", progress: OnProgress | None = None
) -> Manifest:
    """Converts the checkpoint in `source` to the model `name` of `store`. It is listed when it is whole, and not before.

    origin, revision: where the checkpoint is from, a hub id and its commit; by default its path.
    Raises as `convert` does, and UsageError for a name that is impossible, taken, or being made by another process.
    """
    checkpoint, plan = check(source, target)
    report = progress or (lambda _: None)
    report(Progress("checking", 0, plan.nbytes))
    files.require_free(store.folder, plan.disk)
    with store.add(name) as draft:
        output = draft.folder / f"{name.replace(':', '-')}.gguf" if target.format == "gguf" else draft.folder
        write(checkpoint, plan, output, progress=report, name=origin.rpartition("/")[2] or None)
        report(Progress("publishing", plan.nbytes, plan.nbytes))
        draft.manifest = Manifest(
            name=name,
            source=origin or str(source.resolve()),
            revision=revision,
            files=list_files(draft.folder),
            format=target.format,
            architecture=checkpoint.config.model_type,
            quantization=f"{target.bits}-bit" if target.bits else target.weights.upper(),
            licence=licence(checkpoint).get("general.license", ""),
            context=checkpoint.config.context,
            created=now(),
        )
    return draft.manifest
