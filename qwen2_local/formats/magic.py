"""What a file is that is not what it should be: the wrong download, mostly."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qwen2_local.errors import BadFile

_FETCH_AGAIN = "Fetch it again from its original source."
_KINDS = (
    (b"GGUF", "a GGUF file", "Give it the ending .gguf."),
    (b"version https://git-lfs", "a Git LFS pointer, not a model file", "Fetch the file itself: `git lfs pull`, or `hf download`."),
    (b"<!doctype", "an HTML page, not a model file", _FETCH_AGAIN),
    (b"<html", "an HTML page, not a model file", _FETCH_AGAIN),
    (b"<?xml", "an XML page, not a model file", _FETCH_AGAIN),
    (b"{", "JSON text, not a model file", _FETCH_AGAIN),
    (b"pk\x03\x04", "a zip archive or PyTorch pickle, not a model file", "Pickles can run code and are never opened. Look for a .safetensors file."),
    (b"\x80\x02", "a Python pickle, not a model file", "Pickles can run code and are never opened. Look for a .safetensors file."),
    (b"\x80\x03", "a Python pickle, not a model file", "Pickles can run code and are never opened. Look for a .safetensors file."),
    (b"\x80\x04", "a Python pickle, not a model file", "Pickles can run code and are never opened. Look for a .safetensors file."),
)


def not_a(kind: str, path: Path, head: bytes) -> BadFile:
    """The error for a file that should be a `kind` ("safetensors file") and does not start like one. `head`: its first bytes."""
    start = head.lstrip().lower()
    for magic, what, hint in _KINDS:
        if start.startswith(magic.lower()):
            return BadFile(f"{path} is {what}, but should be a {kind}.", hint=hint)
    empty = "empty" if not head else "not a model file"
    return BadFile(f"{path} is {empty}, but should be a {kind}.", hint=_FETCH_AGAIN)


def open_regular(path: Path) -> BinaryIO:
    """Opens `path` for reading bytes. Raises BadFile for a pipe or device, on which a read could wait for ever; OSError as `open` does."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadFile(f"{path} is no plain file.", hint="Give it a file.")
    return os.fdopen(handle, "rb")
