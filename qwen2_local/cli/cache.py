"""`qwen2-local cache`: what is kept of what models have read, and deleting it."""

from __future__ import annotations

import json
import time

import click

from qwen2_local import kvcache, paths
from qwen2_local.cli import output
from qwen2_local.kvcache import settings


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def cache(context: click.Context, as_json: bool) -> None:
    """List or delete what models have computed of texts they have read (the KV cache).

    It makes chats reopen at once. Deleting it loses nothing but time. QWEN2_LOCAL_KV=off keeps it off the disk, QWEN2_LOCAL_KV_BUDGET=5GB
    limits it.
    """
    if context.invoked_subcommand is None:
        _list(as_json)


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(as_json: bool) -> None:
    """List what is stored, by model. One model may be there several times: other settings or versions compute other numbers."""
    _list(as_json)


@cache.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def clear(model: str | None, as_json: bool) -> None:
    """Delete what is stored of all models, or of MODEL as `cache list` calls it."""
    freed = kvcache.Disk(paths.kv()).clear(model)
    if as_json:
        print(json.dumps({"freed": freed}))
    else:
        output.note(f"Deleted {output.gigabytes(freed)}." if freed else "There was nothing to delete.")


def _list(as_json: bool) -> None:
    disk = kvcache.Disk(paths.kv(), settings.budget())
    models = disk.stored()
    used = sum(one.bytes for one in models)
    limit = disk.limit(used) if settings.is_on() else 0
    if as_json:
        rows = [{"model": one.model, "fingerprint": one.fingerprint, "chunks": one.chunks, "bytes": one.bytes, "used": one.used} for one in models]
        print(json.dumps({"folder": str(disk.folder), "on": limit > 0, "bytes": used, "budget": limit, "models": rows}))
        return
    if models:
        cells = [(one.model or one.fingerprint, f"{one.chunks:,}", output.gigabytes(one.bytes), output.ago(time.time() - one.used)) for one in models]
        output.table([("MODEL", "CHUNKS", "SIZE", "LAST USED"), *cells])
    state = f"of {output.gigabytes(limit)}" if limit else "stored; nothing is added, as it is switched off"
    output.note(f"{output.gigabytes(used)} {state}, in {disk.folder}")
