"""Makes docs/screenshots/*.svg from the running app: `.venv/bin/python scripts/screenshots.py`, in the project's environment.

The screens are those of tests/tui/scenes.py, with a scripted model: no download is needed, and what is shown is the same each time.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tui"), str(ROOT / "converters")]

from tests.tui import scenes  # noqa: E402
from tests.tui.pilot import make_app, running  # noqa: E402

FOLDER = ROOT / "docs" / "screenshots"
SHOTS = ("chat", "models", "compare", "tokens", "settings", "palette")


async def shot(name: str, app: Any, scene: Any, size: tuple[int, int] = (100, 30)) -> None:
    """Bring the app there, and keep what it shows."""
    async with running(app, size=size) as pilot:
        await scene(pilot)
        await pilot.pause(0.3)
        path = FOLDER / f"{name}.svg"
        path.write_text(local(app.export_screenshot(title="qwen2-local")), encoding="utf-8")
        print(path.relative_to(ROOT))


def local(svg: str) -> str:
    """Without fonts from the network, with the reader's own in their place; and with names that do not change from run to run."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-family: Fira Code, monospace", "font-family: 'Fira Code', Menlo, Consolas, 'DejaVu Sans Mono', monospace")
    return re.sub(r"terminal-\d+", "terminal", svg)


async def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with scenes.still():
        await shot("welcome", make_app(), scenes.welcome)
        _fresh()
        with scenes.figures("writing"):
            await shot("writing", scenes.app(), scenes.writing)
        for name in SHOTS:
            _fresh()
            await shot(name, scenes.app(), scenes.SCENES[name])
        _fresh("light")
        await shot("chat-light", scenes.app(), scenes.SCENES["chinese"])
        _fresh()
        await shot("chat-small", scenes.app(), scenes.SCENES["chat"], (60, 20))


def _fresh(theme: str = "dark") -> None:
    """A home of its own for each."""
    home = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"]))
    os.environ["QWEN2_LOCAL_HOME"] = str(home)
    os.chdir(home)
    (home / "settings.toml").write_text(f'theme = "{theme}"\n')


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        os.environ["QWEN2_LOCAL_HOME"] = folder
        asyncio.run(main())
        os.chdir(ROOT)
