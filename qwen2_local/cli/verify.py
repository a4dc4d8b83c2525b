"""`qwen2-local verify`: a model's structure, its files' checksums, its error against the source."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2_local import store
from qwen2_local.cli import output
from qwen2_local.cli.meter import Events
from qwen2_local.errors import BadFile
from qwen2_local.manifest import Manifest
from qwen2_local.sanitize import clean_line

if TYPE_CHECKING:
    from qwen2_converters.compare import TensorError
    from qwen2_converters.verify import Report

_WORST = 10


@click.command()
@click.argument("model")
@click.option("--source", type=click.Path(path_type=Path), help="The checkpoint it was made of. Default: where it was, if it is still there.")
@click.option("--all", "every", is_flag=True, help=f"Show the error of every tensor, not of the {_WORST} worst.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--events", is_flag=True, help="Tell how far it is on stderr, one JSON object a line, for a program that shows it.")
def verify(model: str, source: Path | None, every: bool, as_json: bool, events: bool) -> None:
    """Check MODEL, a name or a path: its structure; its files, if it is installed; and its error, where the source is at hand.

    Reads all of it, and changes nothing. Exits with 3 if anything is wrong.
    """
    from qwen2_converters import verify as verifying

    path, manifest = _find(model)
    origin = source or _known_source(manifest)
    with output.Status() as status:
        told = Events()
        progress = (lambda phase, done, total: told.at(phase, model, done, total)) if events else status.bytes
        report = verifying.verify(path, manifest=manifest, source=origin, progress=progress)
    if as_json:
        print(json.dumps(_as_json(model, report), allow_nan=False))
    else:
        _show(model, report, every)
    sys.stdout.flush()
    if not report.ok:
        sys.exit(3)


def _find(name: str) -> tuple[Path, Manifest | None]:
    """Where the model is. An installed one is found even where files of it are missing or cut short: to say which is the point."""
    for one in store.Store().list():
        if one.name == name.lower():
            if one.manifest is None:
                raise BadFile(f"{one.name} cannot be verified: {one.note}.", hint=f"`qwen2-local rm {one.name}`, then get it again.")
            return one.path, one.manifest
    ref = store.resolve(name)
    return ref.path, ref.manifest


def _known_source(manifest: Manifest | None) -> Path | None:
    path = Path(manifest.source) if manifest else None
    return path if path and path.is_absolute() and (path / "config.json").is_file() else None


def _show(name: str, report: Report, every: bool) -> None:
    lines = {"model": f"{name} · {report.kind} · {report.tensors:,} tensors · {output.gigabytes(report.nbytes)}" if report.kind else name}
    lines["structure"] = "ok" if report.kind else "damaged"
    lines["files"] = f"{report.hashed} compared with their SHA-256" if report.hashed else "no checksums are known: it is not installed"
    lines["source"] = str(report.source) if report.source else "not at hand (--source FOLDER compares the weights)"
    for label, text in lines.items():
        print(f"{label:<12}{clean_line(text)}")
    if report.errors:
        print()
        rows: list[tuple[str, ...]] = [("TENSOR", "TYPE", "RELATIVE RMSE", "MAX ERROR", "WORST BLOCK", "")]
        shown = report.errors if every else [error for error in report.errors[:_WORST] if error.relative != 0] or report.errors[:1]
        for error in shown:
            worst = f"{error.block:,}: {error.block_rmse:.3g}"
            rows.append((error.name, error.type, f"{error.relative:.5f}", f"{error.maximum:.3g}", worst, "suspicious" if error.suspicious else ""))
        output.table(rows)
        if len(shown) < len(report.errors):
            print(f"… and {len(report.errors) - len(shown):,} with less (--all shows them)")
    print()
    suspicious = sum(error.suspicious for error in report.errors)
    for fault in report.faults:
        print(f"fault: {clean_line(fault)}")
    if suspicious:
        print(f"fault: {suspicious:,} tensors are further from the source than their type explains: convert it again.")
    if report.ok:
        print("All is well.")


def _as_json(name: str, report: Report) -> dict[str, object]:
    return {
        "model": name,
        "path": str(report.path),
        "ok": report.ok,
        "kind": report.kind,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "files_hashed": report.hashed,
        "faults": report.faults,
        "source": str(report.source) if report.source else None,
        "errors": [_error_as_json(error) for error in report.errors],
    }


def _error_as_json(error: TensorError) -> dict[str, object]:
    """Errors that are no numbers are null."""
    numbers = {"relative_rmse": error.relative, "rmse": error.rmse, "rms": error.rms, "max_error": error.maximum}
    shown: dict[str, object] = {"name": error.name, "type": error.type, "weights": error.weights}
    shown |= {name: _number(value) for name, value in numbers.items()}
    return shown | {"worst_block": {"index": error.block, "rmse": _number(error.block_rmse)}, "suspicious": error.suspicious}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
