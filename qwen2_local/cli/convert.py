"""`qwen2-local convert`: a Hugging Face folder to GGUF or MLX."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwen2_local.cli import output


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, metavar="TARGET", help="gguf:f32, f16, q8_0 or q4_0; mlx:f32, bf16, 8bit or 4bit.")
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path), help="A GGUF file, or an MLX folder. Default: in this folder.")
@click.option("--force", is_flag=True, help="Replace what is there.")
def convert(source: Path, target: str, destination: Path | None, force: bool) -> None:
    """Convert SOURCE, a Qwen2 checkpoint as a Hugging Face folder, to TARGET. Nothing half-made is ever left."""
    from qwen2_converters.convert import convert as run_conversion
    from qwen2_converters.target import Target

    wanted = Target.parse(target)
    if destination is None:
        name = f"{source.resolve().name}-{wanted.label}"
        destination = Path(f"{name}.gguf" if wanted.format == "gguf" else name)
    started = time.monotonic()
    with output.Status() as status:
        run_conversion(source, wanted, destination, overwrite=force, progress=lambda p: status.bytes(p.phase, p.done, p.total))
    size = sum(file.stat().st_size for file in destination.iterdir()) if destination.is_dir() else destination.stat().st_size
    output.note(f"{destination}: {output.gigabytes(size)} in {time.monotonic() - started:.1f} s")
