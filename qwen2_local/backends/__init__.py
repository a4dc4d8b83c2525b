"""The backends: one thin module per library that computes. The engine, the loader and `doctor` come here; each library loads when used.

A backend knows token ids, sequences and their KV (`base`). Adding one: a module with a function `load`, and a line below.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

from qwen2_local import repair
from qwen2_local.backends.base import Backend, Layout, LoadOptions
from qwen2_local.errors import BackendUnavailable, BadFile

_BACKENDS = {
    # name: (the library it needs, our module)
    "mlx": ("mlx", "qwen2_local.backends.mlx"),
    "llama.cpp": ("llama_cpp", "qwen2_local.backends.checked"),
}

NAMES = tuple(_BACKENDS)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells that a file is still the one that was looked at. size: bytes; changed: nanoseconds."""

    path: Path
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Of the file as it is now. Raises OSError."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that `load` needs of a checked model, as plain data: another process can be told. files: those that were checked."""

    backend: str
    path: Path
    layout: Layout
    options: LoadOptions
    files: tuple[Stamp, ...] = ()

    def load(self, *, cancelled: Callable[[], bool] | None = None) -> Backend:
        """Load it; cancelled as in `load`. Raises BadFile if a file is no longer what was checked, and whatever `load` does."""
        for stamp in self.files:
            try:
                same = Stamp.of(stamp.path) == stamp
            except OSError:
                same = False
            if not same:
                raise BadFile(f"{stamp.path} has changed since it was checked.", hint="Load the model again.")
        return load(self.backend, self.path, layout=self.layout, options=self.options, cancelled=cancelled)


def available() -> tuple[str, ...]:
    """Names of the backends whose library is installed. Imports none of them."""
    return tuple(name for name, (library, _) in _BACKENDS.items() if importlib.util.find_spec(library) is not None)


def default_backend() -> str:
    """MLX on Apple silicon, else llama.cpp, else what there is. Raises BackendUnavailable if there is none."""
    installed = available()
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    for name in ("mlx", "llama.cpp") if apple else ("llama.cpp", "mlx"):
        if name in installed:
            return name
    if installed:
        return installed[0]
    raise BackendUnavailable("No backend is installed: neither MLX nor llama.cpp.", hint=f"Run `{repair.reinstall('llama-cpp-python')}`.")


def load(name: str, path: Path, *, layout: Layout, options: LoadOptions, cancelled: Callable[[], bool] | None = None) -> Backend:
    """Load a model: a GGUF file for llama.cpp, an MLX folder for MLX. layout: how its KV memory is laid out at first.

    cancelled: asked again and again while it loads, on the same thread. Raises BackendUnavailable, BadFile, DoesNotFit, BackendError, Cancelled.
    """
    if name not in _BACKENDS:
        raise BackendUnavailable(f"There is no backend named {name!r}.", hint=f"The backends are: {', '.join(NAMES)}.")
    if name not in available():
        command = repair.reinstall("mlx" if name == "mlx" else "llama-cpp-python")
        raise BackendUnavailable(f"The backend {name} is not installed.", hint=f"Run `{command}`.")
    return cast(Backend, importlib.import_module(_BACKENDS[name][1]).load(path, layout=layout, options=options, cancelled=cancelled))
