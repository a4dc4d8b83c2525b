"""The small files beside a checkpoint's weights: which of them a conversion reads or copies. Nothing else is, and never code."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen2_local.files import inside
from qwen2_local.formats.magic import open_regular

_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja",
    "LICENSE",
)  # fmt: skip


def companion(path: Path) -> Path:
    """`path`, with links resolved. Raises BadFile if it is a link out of the checkpoint."""
    folder = path.parent
    # huggingface_hub's cache keeps snapshots/REVISION/NAME as links to blobs/HASH beside snapshots.
    return inside(folder.parent.parent if folder.parent.name == "snapshots" else folder, path)


def companions(folder: Path) -> list[Path]:
    """Those that an MLX folder gets a copy of."""
    return [path for name in _COPIED if (path := folder / name).is_file()]


def copy_companions(source: Path, folder: Path) -> None:
    """Copies them into `folder`. Raises BadFile for links out of `source`."""
    for path in companions(source):
        with open_regular(companion(path)) as file, (folder / path.name).open("xb") as copy:
            shutil.copyfileobj(file, copy)
