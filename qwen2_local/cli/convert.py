"""`qwen2-local convert`: a Hugging Face folder, or a LoRA adapter, to GGUF or MLX."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2_local import files, store
from qwen2_local.catalog import lookup
from qwen2_local.cli import output
from qwen2_local.errors import UnknownModel, UsageError
from qwen2_local.formats.checkpoint import member
from qwen2_local.formats.config import read_config

if TYPE_CHECKING:
    from qwen2_converters.target import Target

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source")
@click.option("--to", "targets", required=True, multiple=True, metavar="TARGET", help="gguf:q4_k_m, mlx:4bit …; several make each, of one read.")
@click.option("-o", "--output", "destination", type=_PATH, help="A GGUF file, or an MLX folder; of several, the folder for all. Default: here.")
@click.option("--name", metavar="NAME", help="Install it instead, under a name for `run`, `ls` and `rm`; of several, as NAME:q4_k_m and so on.")
@click.option("--force", is_flag=True, help="Replace the GGUF file or MLX folder that is there.")
@click.option("--imatrix", type=_PATH, metavar="FILE", help="An importance matrix to quantize with (GGUF).")
@click.option("--pad-ffn", is_flag=True, help="Pad the FFN with zeros to whole blocks of 256: the same model, k-quants for 72B (GGUF).")
@click.option("--yarn", is_flag=True, help="Stretch the context as the model's makers announced (GGUF).")
@click.option("--lora", type=_PATH, metavar="ADAPTER", help="Merge a PEFT LoRA adapter, a folder, into the weights.")
@click.option("--base", metavar="MODEL", help="Where SOURCE is an adapter: the model that it is for, to check it against.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each target.")
def convert(
    source: str, targets: Sequence[str], destination: Path | None, name: str | None, force: bool,
    imatrix: Path | None, pad_ffn: bool, yarn: bool, lora: Path | None, base: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Convert SOURCE to TARGET. Nothing half-made ever has its name; what is stopped goes on.

    SOURCE is a Qwen2 checkpoint as a Hugging Face folder, plain or of GPTQ or AWQ; or the folder of a PEFT LoRA adapter.
    """
    if name is not None and (destination is not None or force):
        raise click.UsageError("--name installs the model: it goes with neither -o nor --force.")
    from qwen2_converters.convert import Options, Progress, convert_all, name_of
    from qwen2_converters.install import install_all
    from qwen2_converters.lora import is_adapter
    from qwen2_converters.target import Target

    wanted = [Target.parse(target) for target in targets]
    if is_adapter(Path(source)):
        if name or imatrix or yarn or lora:
            raise click.UsageError(f"{source} is an adapter: --name, --imatrix, --yarn and --lora are for models.")
        _convert_adapter(Path(source), base, wanted, destination, force=force, pad_ffn=pad_ffn, as_json=as_json)
        return
    if base is not None:
        raise click.UsageError(f"--base is for adapters, and {source} is none.")
    ref = _source(source, wanted)
    options = Options(imatrix=imatrix, pad_ffn=pad_ffn, yarn=yarn, lora=lora)
    models = store.Store()
    if name is None:
        names = [""] * len(wanted)
        places = _places(wanted, destination, name_of(ref.path))
    else:
        names = _names([target.label for target in wanted], name.lower())
        places = [models.place(one) for one in names]
    started = time.monotonic()
    with _shared_folder(places, destination), _kept(places), output.Status() as status:

        def report(progress: Progress) -> None:
            status.bytes(progress.phase, progress.done, progress.total)

        if name is None:
            convert_all(ref.path, list(zip(wanted, places, strict=True)), overwrite=force, progress=report, options=options)
        else:
            install_all(ref.path, list(zip(wanted, names, strict=True)), models, progress=report, options=options)
    _say(wanted, places, names, time.monotonic() - started, as_json=as_json)


def _source(name: str, wanted: Sequence[Target]) -> store.ModelRef:
    """The checkpoint to convert. One that is on a hub can be converted while it is fetched."""
    original, _, _ = name.partition(":")
    fetch = f"`qwen2-local pull {original} --to {wanted[0]}` fetches the original and converts it on the way."
    try:
        ref = store.resolve(name)
    except UnknownModel as error:
        if lookup(original):
            raise UnknownModel(error.what, hint=fetch) from error
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", original):
            raise UnknownModel(error.what, hint=f"If it is on a hub, {fetch}") from error
        raise
    if ref.origin == "installed" and ref.format != "hf":
        hint = fetch if lookup(original) else "Conversions start from the original folder."
        raise UsageError(f"{ref.label} is installed, so it has been converted already.", hint=hint)
    return ref


def _convert_adapter(
    source: Path, base: str | None, wanted: Sequence[Target], destination: Path | None, *, force: bool, pad_ffn: bool, as_json: bool
) -> None:
    from qwen2_converters.adapters import convert_adapter

    config = None
    if base is not None:
        ref = store.resolve(base)
        if ref.format == "gguf":
            raise UsageError(f"{base} is a GGUF file, which an adapter cannot be checked against.", hint="Give the original model's folder.")
        config = read_config(member(ref.path, "config.json"))
    places = _places(wanted, destination, source.resolve().name)
    gguf = any(target.format == "gguf" for target in wanted)
    started = time.monotonic()
    with _shared_folder(places, destination):
        for target, place in zip(wanted, places, strict=True):
            # Refused where there is no such target, as for models.
            convert_adapter(source, config, target, place, pad_ffn=pad_ffn and (target.format == "gguf" or not gguf), overwrite=force)
    _say(wanted, places, [""] * len(wanted), time.monotonic() - started, as_json=as_json)


def _say(wanted: Sequence[Target], places: Sequence[Path], names: Sequence[str], seconds: float, *, as_json: bool) -> None:
    """What was made, and where."""
    for target, place, installed in zip(wanted, places, names, strict=True):
        size = sum(file.stat().st_size for file in place.iterdir() if file.name != "manifest.json") if place.is_dir() else place.stat().st_size
        if as_json:
            made: dict[str, object] = {"path": str(place.absolute()), "type": str(target), "bytes": size, "seconds": round(seconds, 2)}
            print(json.dumps(made | ({"name": installed} if installed else {})))
        else:
            output.note(f"{f'{installed} is installed' if installed else place}: {output.gigabytes(size)} in {seconds:.1f} s")


def _places(wanted: Sequence[Target], destination: Path | None, stem: str) -> list[Path]:
    if len(wanted) == 1 and destination is not None:
        return [destination]
    folder = destination or Path()
    return [folder / f"{stem}-{target.label}{'.gguf' if target.format == 'gguf' else ''}" for target in wanted]


def _names(labels: Sequence[str], name: str) -> list[str]:
    if len(labels) == 1:
        return [name]
    if ":" in name:
        raise UsageError(f"{name} names one model, and there are {len(labels)} targets.", hint=f"--name {name.partition(':')[0]} names each of them.")
    return [f"{name}:{label}" for label in labels]


@contextmanager
def _shared_folder(places: Sequence[Path], folder: Path | None) -> Iterator[None]:
    """Makes the folder that -o names for several outputs, if there is none; nothing is left of it where nothing came into it."""
    new = folder is not None and len(places) > 1 and folder.parent.is_dir() and not os.path.lexists(folder)
    if folder is None or not new:
        yield
        return
    folder.mkdir()
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


@contextmanager
def _kept(places: Sequence[Path]) -> Iterator[None]:
    """Says after Ctrl-C what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = sum(files.used_bytes(files.partial_of(place)) for place in places)
        if kept:
            output.note(f"kept {output.gigabytes(kept)}: run the same command to go on.")
        raise
