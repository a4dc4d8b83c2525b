"""The commands that repair an installation. They depend on how the program was installed: from a clone, or with pip."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

_CLONE = Path(__file__).parents[1]


def rebuild() -> str:
    """Builds llama.cpp anew, for this machine."""
    if _is_clone():
        root = shlex.quote(str(_CLONE))
        return f"cd {root} && .venv/bin/uv cache clean llama-cpp-python && rm -r .venv && python3 scripts/start.py doctor"
    return f"{_pip()} install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"


def reinstall(what: str) -> str:
    """Installs a missing package: "llama-cpp-python", "mlx"."""
    if _is_clone():
        extra = " --extra mlx" if what == "mlx" and sys.platform == "linux" else ""
        return f"cd {shlex.quote(str(_CLONE))} && .venv/bin/uv sync --inexact{extra}"
    return f"{_pip()} install '{'mlx[cpu]' if what == 'mlx' and sys.platform == 'linux' else what}'"


def _is_clone() -> bool:
    return (_CLONE / "scripts" / "start.py").is_file()


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip"
