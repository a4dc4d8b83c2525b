"""`qwen2-local ls`, `show` and `rm`: the models on this computer."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qwen2_local import fit, kvcache, paths, store
from qwen2_local.cli import output
from qwen2_local.errors import UsageError
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint, parameters
from qwen2_local.sanitize import clean_line

_BUILT_IN = "built in"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def ls(as_json: bool) -> None:
    """List the models on this computer."""
    models = listed()
    if as_json:
        print(json.dumps(models))
        return
    rows: list[tuple[str, ...]] = [("NAME", "FORMAT", "SIZE", "CONTEXT")]
    for model in models:
        size, context = model["bytes"], model["context"]
        shown = (output.gigabytes(size) if isinstance(size, int) else "", f"{context:,}" if isinstance(context, int) else "")
        rows.append((str(model["name"]), str(model["format"]), *shown))
    output.table(rows)


def listed() -> list[dict[str, object]]:
    """What `ls` lists: name, format, bytes, context of each model; the guide last. Of one that cannot be used, why in the place of its format."""
    models: list[dict[str, object]] = []
    for one in store.Store().list():
        manifest = one.manifest
        if manifest is None:
            models.append({"name": one.name, "format": one.note, "bytes": None, "context": None})
        else:
            form = f"{manifest.format.upper()} {manifest.quantization}"
            models.append({"name": one.name, "format": form, "bytes": manifest.size, "context": manifest.context})
    guide = open_checkpoint(store.guide_folder())
    models.append({"name": store.GUIDE, "format": _BUILT_IN, "bytes": guide.weight_bytes, "context": guide.config.context})
    return models


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(model: str, as_json: bool) -> None:
    """Show what is known of MODEL: a name, or a path. Reads headers only; loads nothing."""
    facts = known(store.resolve(model))
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:<16}{shown(value)}")


@click.command()
@click.argument("model")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(model: str, yes: bool) -> None:
    """Delete an installed MODEL, and what it keeps of texts it has read. Files that are only named by their path are never touched."""
    installed = {one.name: one.manifest for one in store.Store().list()}
    name = model.lower()
    if name not in installed and _forget(name, yes=yes):
        return
    if name not in installed:  # those of exactly this name go even if they are damaged
        ref = store.resolve(model)
        if ref.origin != "installed":
            kind = "built in" if ref.origin == "built-in" else "no installed model but a path"
            raise UsageError(f"{ref.label} is {kind}: `rm` deletes installed models only.", hint="`qwen2-local ls` lists them.")
        name = ref.label
    manifest = installed[name]
    size = output.gigabytes(manifest.size) if manifest is not None else "unknown size"
    if output.confirmed(f"{name} ({size})", yes=yes):
        store.Store().remove(name)
        kvcache.Disk(paths.kv()).clear(name)
        output.note(f"Deleted {name} ({size}).")


def _forget(name: str, *, yes: bool) -> bool:
    """Delete what a stopped `pull` or `convert` has left of the model `name`. False if there is nothing of it."""
    try:
        kept = store.Store().kept(name)
    except UsageError:  # no name, but a path
        return False
    if kept and output.confirmed(f"what was begun of {name} ({output.gigabytes(kept)})", yes=yes):
        store.Store().forget(name)
        output.note(f"Deleted what was begun of {name} ({output.gigabytes(kept)}).")
    return kept > 0


def shown(value: object) -> str:
    """A value of `known` for a person: one line, cleaned."""
    return clean_line(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def known(ref: store.ModelRef) -> dict[str, object]:
    """What `show` shows of a model, from its headers. Raises BadFile, UnsupportedModel."""
    facts: dict[str, object] = {"name": ref.label, "path": str(Path(ref.path).absolute()), "origin": ref.origin}
    if ref.format == "gguf":
        gguf = open_gguf(ref.path)
        facts |= {"format": "GGUF", "quantization": gguf.quantization, "architecture": gguf.architecture, "parameters": gguf.parameters}
        facts |= {"layers": gguf.layers, "hidden": gguf.hidden, "heads": f"{gguf.heads}/{gguf.kv_heads}", "vocabulary": gguf.vocabulary}
        size, context = gguf.weight_bytes, gguf.context
        licence = gguf.header.text("general.license")
    else:
        checkpoint = open_checkpoint(ref.path)
        config = checkpoint.config
        bits = config.quantization
        quantization = str(config.packed or config.dtype) if bits is None else f"{bits.bits}-bit, groups of {bits.group}"
        form = "MLX" if ref.format == "mlx" else "Hugging Face checkpoint"
        facts |= {"format": form, "quantization": quantization, "architecture": config.model_type, "parameters": parameters(config)}
        facts |= {"layers": config.layers, "hidden": config.hidden, "heads": f"{config.heads}/{config.kv_heads}", "vocabulary": config.vocabulary}
        size, context = checkpoint.weight_bytes, config.context
        licence = None
    if ref.manifest is not None:
        licence = ref.manifest.licence or licence
        facts |= {"source": ref.manifest.source, "revision": ref.manifest.revision}
    needed = memory_at(ref, min(context, 8192))
    facts |= {"size": output.gigabytes(size), "context": context, "memory": f"{fit.show_gb(needed)} at a context of {min(context, 8192):,}"}
    if licence:
        facts["licence"] = licence
    return facts


def memory_at(ref: store.ModelRef, context: int, kv_bits: int = 16) -> int:
    """Bytes of memory that running it takes at a context of so many tokens. Raises BadFile, UnsupportedModel."""
    if ref.format == "gguf":
        gguf = open_gguf(ref.path)
        return fit.memory_needed(gguf.weight_bytes, gguf.kv_values_per_token, context, kv_bits)
    checkpoint = open_checkpoint(ref.path)
    widened = ref.format == "mlx" and fit.MLX_WIDENS
    weights = checkpoint.float32_bytes if widened else checkpoint.weight_bytes
    return fit.memory_needed(weights, checkpoint.config.kv_values_per_token, context, 32 if widened else kv_bits)
