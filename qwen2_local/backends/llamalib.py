"""llama.cpp's library: imported once and late, its log led into `logging`, its stop flag free of Python."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen2_local import cpu, repair
from qwen2_local.errors import BackendUnavailable

_log = logging.getLogger("qwen2_local.llama.cpp")
_log.addHandler(logging.NullHandler())  # without a handler, logging itself would print warnings to stderr

_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.ERROR}
"""ggml's debug, info, warning, error. Its info is a page per load and its warnings are rarely for a user: each is one level lower here."""
_CONTINUED = 5

_errors: deque[str] = deque(maxlen=4)
_line: list[str] = []
_level = logging.DEBUG


@functools.cache
def library() -> Any:
    """The module of llama.cpp's C functions, initialised. Raises BackendUnavailable if it is missing or does not load."""
    try:
        with _short_spins():
            lib = _import()
    except ImportError as error:
        raise BackendUnavailable(f"llama.cpp is not installed ({error}).", hint=f"Run `{repair.reinstall('llama-cpp-python')}`.") from error
    except (OSError, RuntimeError) as error:
        raise BackendUnavailable(f"llama.cpp's library does not load: {error}", hint=f"Build it anew: `{repair.rebuild()}`.") from error
    take_log(lib)
    lib.llama_backend_init()
    return lib


def take_log(lib: Any) -> None:
    """Lead the library's log into `logging`: before each load, as the binding's own classes in the same process take it for themselves."""
    lib.llama_log_set(_callback(lib), None)


def folder() -> Path:
    """Where the binding is installed; raises BackendUnavailable if it is not."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        hint = f"Run `{repair.reinstall('llama-cpp-python')}`."
        raise BackendUnavailable("llama.cpp is not installed (no module named llama_cpp).", hint=hint)
    return Path(spec.origin).parent


@functools.cache
def version() -> str:
    """The binding's version, read from its source: importlib.metadata takes 30 ms to say the same."""
    found = re.search(r'__version__ = "([^"]+)"', (folder() / "__init__.py").read_text("utf-8"))
    return found[1] if found else "unknown"


def identity() -> str:
    """A name of this build on this processor: changes whenever either does."""
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")  # the binding's own variable
    place = Path(chosen) if chosen else folder() / "lib"
    parts = [version(), cpu.name(), *sorted(cpu.features())]
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            status = entry.stat()
            parts.append(f"{entry.path} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def last_errors() -> str:
    """What llama.cpp last logged as errors, for an error message; forgets them."""
    text = "; ".join(_errors)
    _errors.clear()
    return text


def stop_when_set(context: Any, flag: Any) -> None:
    """Make `context` abort its work once flag[0], a byte of a two-byte buffer that ends in 0, is 1.

    llama.cpp asks its callback at every node of the graph, from its own thread: a Python function there costs milliseconds per token and
    waits for the interpreter's lock. C's own strlen answers the same question: 1 for a set flag, 0 for a clear one.
    """
    libc = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    strlen = ctypes.cast(libc.strlen, ctypes.c_void_p).value
    lib = library()
    lib.llama_set_abort_callback(context, lib.ggml_abort_callback(strlen), ctypes.addressof(flag))


@contextlib.contextmanager
def _short_spins() -> Iterator[None]:
    """Load GNU's OpenMP with short spins at its barriers, unless the user has chosen: it reads the environment only once, when it loads.

    Left alone, a thread spins for milliseconds where it waits for one that is not running, and so takes the very time which the other
    needs. Ran, on 2 overloaded cores, a 7 M model on 2 threads: 200 to 930 ms a token, against 8 to 35 so; undisturbed tokens are alike.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "2000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


def _import() -> Any:
    """Only the C functions: the package's own __init__ also loads its chat templates and disk cache, 80 ms of things never used here."""
    if "llama_cpp" in sys.modules:
        return importlib.import_module("llama_cpp.llama_cpp")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None:
        raise ModuleNotFoundError("no module named llama_cpp")
    sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        del sys.modules["llama_cpp"]  # whoever imports the package itself gets all of it


@functools.cache
def _callback(lib: Any) -> Any:
    """The C function for the log; cached, since it has to live as long as the library."""
    return lib.llama_log_callback(_on_log)


def _on_log(level: int, text: bytes, _data: object) -> None:
    """Collect pieces into lines. Called from any of llama.cpp's threads."""
    global _level
    if level != _CONTINUED:
        _level = _LEVELS.get(level, logging.DEBUG)
    _line.append(text.decode("utf-8", "replace"))
    if not text.endswith(b"\n"):
        return
    message = "".join(_line).strip()
    _line.clear()
    if message:
        if _level == logging.ERROR:
            _errors.append(message)
        _log.log(_level, "%s", message)
