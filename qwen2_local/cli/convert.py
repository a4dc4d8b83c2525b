"""`qwen2-local convert`: a Hugging Face folder to GGUF or MLX."""

from __future__ import annotations

import time
from pathlib import Path

import click

from qwen2_local import store
from qwen2_local.cli import output
from qwen2_local.errors import UsageError


@click.command()
@click.argument("source")
@click.option("--to", "target", required=True, metavar="TARGET", help="gguf:f32, f16, q8_0 or q4_0; mlx:f32, bf16, 8bit or 4bit.")
@click.option("-o", "--output", "destination", type=click.Path(path_type=Path), help="A GGUF file, or an MLX folder. Default: in this folder.")
@click.option("--name", metavar="NAME", help="Install it instead, under a name for `run`, `ls` and `rm`: 0.5b:q4_0, say.")
@click.option("--force", is_flag=True, help="Replace the GGUF file or MLX folder that is there.")
def convert(source: str, target: str, destination: Path | None, name: str | None, force: bool) -> None:
    """Convert SOURCE, a Qwen2 checkpoint as a Hugging Face folder, to TARGET. Nothing half-made is ever left."""
    if name is not None and (destination is not None or force):
        raise click.UsageError("--name installs the model: it goes with neither -o nor --force.")
    from qwen2_converters.convert import Progress, name_of
    from qwen2_converters.convert import convert as run_conversion
    from qwen2_converters.install import install
    from qwen2_converters.target import Target

    wanted = Target.parse(target)
    ref = store.resolve(source)
    if ref.origin == "installed":
        raise UsageError(f"{ref.label} is installed, so it has been converted already.", hint="Conversions start from the original folder.")
    started = time.monotonic()
    with output.Status() as status:

        def report(progress: Progress) -> None:
            status.bytes(progress.phase, progress.done, progress.total)

        if name is not None:
            made = install(ref.path, wanted, store.Store(), name.lower(), progress=report)
            size, what = made.size, f"{made.name} is installed"
        else:
            output_name = f"{name_of(ref.path)}-{wanted.label}"
            destination = destination or Path(f"{output_name}.gguf" if wanted.format == "gguf" else output_name)
            run_conversion(ref.path, wanted, destination, overwrite=force, progress=report)
            size = sum(file.stat().st_size for file in destination.iterdir()) if destination.is_dir() else destination.stat().st_size
            what = str(destination)
    output.note(f"{what}: {output.gigabytes(size)} in {time.monotonic() - started:.1f} s")
