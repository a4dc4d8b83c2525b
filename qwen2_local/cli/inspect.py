"""`qwen2-local inspect`: what a file or folder holds, without loading it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from qwen2_local import store
from qwen2_local.cli import output
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.formats.summarize import summarize
from qwen2_local.formats.summary import Fact, Summary
from qwen2_local.sanitize import clean, clean_line


@click.command()
@click.argument("file")
@click.option("--tensors", "with_tensors", is_flag=True, help="List every tensor: type, shape, bytes, where it lies.")
@click.option("--template", "with_template", is_flag=True, help="Print the chat template, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(file: str, with_tensors: bool, with_template: bool, as_json: bool) -> None:
    """Show what FILE holds: a GGUF or safetensors file, or the folder of a model or adapter.

    Of any architecture; nothing is loaded, and no file can harm. Also takes the name of an installed model. Exits with 3 if it is damaged.
    """
    path = _path(file)
    summary = summarize(path)
    if as_json:
        # ASCII: the text is a stranger's, and may go to a terminal.
        print(json.dumps(_as_json(path, summary, with_tensors, with_template), allow_nan=False))
    else:
        _show(path, summary)
        if with_tensors:
            print()
            rows: list[tuple[str, ...]] = [("TENSOR", "TYPE", "SHAPE", "BYTES", "OFFSET", "FILE")]
            for one in summary.tensors:
                rows.append((one.name, one.type, " x ".join(map(str, one.shape)), f"{one.nbytes:,}", f"{one.offset:,}", one.file))
            output.table(rows)
        if with_template and summary.template:
            print(f"\n{clean(summary.template)}")
    sys.stdout.flush()
    for fault in summary.faults:
        output.note(f"damaged: {clean_line(fault)}")
    if summary.faults:
        sys.exit(3)


def _path(name: str) -> Path:
    """Installed models first, as everywhere; but also files and folders that are no whole model."""
    try:
        return store.resolve(name).path
    except Qwen2LocalError:
        if not os.path.lexists(name):
            raise
        return Path(name)


def _show(path: Path, summary: Summary) -> None:
    lines: dict[str, Fact] = {"path": str(path), "format": summary.format}
    if len(summary.files) != 1:
        lines["files"] = len(summary.files)
    lines |= {"size": _size(summary.size), "tensors": len(summary.tensors)}
    if summary.parameters is not None:
        lines["parameters"] = summary.parameters
    if summary.bits_per_weight is not None:
        lines["bits per weight"] = f"{summary.bits_per_weight:.2f}"
    lines |= {name.replace("_", " "): value for name, value in summary.facts.items() if value is not None}
    if summary.template:
        lines["template"] = f"{len(summary.template):,} characters (--template shows it)"
    lines["runs here"] = "not this damaged" if summary.faults else f"no: {summary.note}" if summary.note else _runs(summary)
    for name, value in lines.items():
        text = f"{value:,}" if type(value) is int else _text(value)
        print(f"{clean_line(name):<18}{clean_line(text)}")
    if summary.kinds:
        print()
        total = sum(kind.nbytes for kind in summary.kinds) or 1
        rows: list[tuple[str, ...]] = [("TYPE", "TENSORS", "SIZE", "SHARE")]
        rows += [(kind.type, f"{kind.tensors:,}", _size(kind.nbytes), f"{kind.nbytes / total:.1%}") for kind in summary.kinds]
        output.table(rows)
    if summary.keys:
        print()
        output.table([("KEY", "VALUE"), *((key, _text(value)) for key, value in summary.keys.items())])


def _runs(summary: Summary) -> str:
    return "yes" if summary.format in ("GGUF", "MLX folder", "Hugging Face folder") else "no: it is no whole model"


def _text(value: Fact) -> str:
    if isinstance(value, dict) and value.keys() == {"count", "of", "first"}:
        first = value["first"]
        shown = ", ".join(map(_text, first)) if isinstance(first, list) else ""
        return f"{value['count']:,} of {value['of']}: {shown} …"
    if isinstance(value, dict):
        return " · ".join(f"{key} {_text(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.7g}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _size(nbytes: int) -> str:
    return output.gigabytes(nbytes)


def _as_json(path: Path, summary: Summary, with_tensors: bool, with_template: bool) -> dict[str, object]:
    shown: dict[str, object] = {"path": str(path), "format": summary.format, "files": summary.files, "bytes": summary.size}
    shown |= {"parameters": summary.parameters, "bits_per_weight": summary.bits_per_weight, **summary.facts}
    shown |= {"quantization_types": [{"type": kind.type, "tensors": kind.tensors, "bytes": kind.nbytes} for kind in summary.kinds]}
    shown |= {"keys": summary.keys, "template_characters": len(summary.template), "faults": summary.faults, "note": summary.note}
    if with_tensors:
        shown["tensors"] = [asdict(tensor) for tensor in summary.tensors]
    if with_template:
        shown["template"] = summary.template
    return shown
