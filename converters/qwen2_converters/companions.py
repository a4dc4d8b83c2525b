"""The small files beside a checkpoint's weights: which of them a conversion reads or copies. Nothing else is, and never code."""

from __future__ import annotations

from pathlib import Path

from qwen2_converters.keys import optional_json, read_vocabulary
from qwen2_local.files import write_file
from qwen2_local.formats.checkpoint import Checkpoint, member
from qwen2_local.formats.magic import open_regular
from qwen2_local.generation import GenerationDefaults, from_config

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja",
    "LICENSE",
)  # fmt: skip
"""Those that an MLX folder gets a copy of."""


def companions(folder: Path) -> list[Path]:
    """Those that are there."""
    return [path for name in COMPANIONS if (path := folder / name).is_file()]


def check_companions(checkpoint: Checkpoint) -> None:
    """Raises BadFile, or UnsupportedModel, for what would make a conversion useless: better before than after."""
    for path in companions(checkpoint.folder):
        member(checkpoint.folder, path.name)
    read_vocabulary(checkpoint)
    optional_json(checkpoint, "tokenizer_config.json")
    generation = optional_json(checkpoint, "generation_config.json")
    from_config(generation, fallback=GenerationDefaults(), where=str(checkpoint.folder / "generation_config.json"))


def copy_companions(source: Path, folder: Path) -> None:
    """Copies them into `folder`, over those there. Raises BadFile for links out of `source`."""
    for path in companions(source):
        with open_regular(member(source, path.name)) as file:
            write_file(folder / path.name, file)
