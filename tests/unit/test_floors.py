"""The house stands on floors: no module imports one above it, heavy libraries load late, and only declared ones are used.

A new module needs a place in FLOORS: choose the lowest that holds what it imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"qwen2_local": ROOT / "qwen2_local", "qwen2_converters": ROOT / "converters/qwen2_converters", "qwen2_tui": ROOT / "tui/qwen2_tui"}

# From the ground up: a module may import its own floor and those below. A name stands for all modules under it that have no line of their own.
FLOORS = (
    ("qwen2_local", "errors", "types", "files", "paths", "sanitize", "formats", "catalog", "fit", "advice", "cpu", "repair", "backends.base"),
    ("sampling", "grammar", "vocabulary", "tokens", "detokenize", "chatml", "generation"),
    ("manifest", "store", "kvcache", "chats", "backends.llamalib"),
    ("qwen2_converters",),
    ("backends",),
    ("engine",),
    ("adapter", "loading"),
    ("worker", "doctor"),
    ("options", "stream", "many", "aio"),
    ("turns", "chat", "model"),
    ("cli", "qwen2_tui"),
)
LIBRARIES = {"click", "httpx2", "huggingface_hub", "llama_cpp", "llguidance", "markdown_it", "mlx", "numpy", "platformdirs"}
LIBRARIES |= {"pygments", "rich", "textual", "tokenizers", "tomlkit"}
COMPUTING = {"llama_cpp", "mlx"}
HEAVY = {"llama_cpp", "llguidance", "mlx", "textual", "rich", "tokenizers", "huggingface_hub", "httpx2", "torch", "transformers"}


@dataclass(frozen=True)
class Import:
    """One import: by whom, of what, and whether it runs when the module is imported."""

    module: str
    target: str
    line: int
    late: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[Import]:
    path = MODULES[module]
    tree = ast.parse(path.read_text("utf-8"), str(path))
    yield from _walk(module, tree, late=False)


def _walk(module: str, node: ast.AST, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, child.lineno, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: relative imports hide where one goes"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield Import(module, name if name in MODULES else str(child.module), child.lineno, late)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _walk(module, child, late or inside or typing)


ALL = [one for module in MODULES for one in imports(module)]
OURS = [one for one in ALL if one.target.split(".")[0] in PACKAGES]


def floor(module: str) -> int:
    """The number of a module's floor: that of the longest name in FLOORS that holds it."""
    name = module
    while name:
        for number, names in enumerate(FLOORS):
            if name.removeprefix("qwen2_local.") in names and (name != "qwen2_local" or name == module):
                return number
        name = name.rpartition(".")[0]
    pytest.fail(f"{module} has no floor: give it one in {Path(__file__).name}")


def test_every_module_has_a_floor() -> None:
    assert [floor(module) for module in MODULES]


def test_no_import_goes_up() -> None:
    # `qwen2_local` itself names the public API, which it loads late.
    up = [str(one) for one in OURS if floor(one.target) > floor(one.module) and not (one.module == "qwen2_local" and one.late)]
    assert up == []


def test_converters_are_called_late_and_from_above_only() -> None:
    wrong = [
        str(one)
        for one in OURS
        if one.target.startswith("qwen2_converters")
        and not one.module.startswith("qwen2_converters")
        and not (one.late and floor(one.module) >= floor("qwen2_local.loading"))
    ]
    assert wrong == []


def test_backends_and_converters_alone_know_what_computes() -> None:
    rooms = ("qwen2_local.backends", "qwen2_converters")
    assert [str(one) for one in ALL if one.target.split(".")[0] in COMPUTING and not one.module.startswith(rooms)] == []


def test_only_declared_libraries_are_used() -> None:
    allowed = LIBRARIES | PACKAGES.keys() | set(sys.stdlib_module_names)
    assert [str(one) for one in ALL if one.target.split(".")[0] not in allowed] == []


def loaded_by(names: list[str]) -> set[str]:
    """The top-level packages that a fresh Python has loaded after importing these modules."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_no_heavy_library() -> None:
    # A backend's own modules are imported when it is chosen, and may import what they stand for at once.
    chosen = ("qwen2_local.backends.mlx", "qwen2_tui")
    assert loaded_by([name for name in MODULES if not name.startswith(chosen)]) & HEAVY == set()


def test_the_command_line_starts_without_numpy() -> None:
    commands = [name for name in MODULES if name.startswith("qwen2_local.cli")]
    assert loaded_by(["qwen2_local", *commands]) & (HEAVY | {"numpy"}) == set()
