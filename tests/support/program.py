"""The program as a process of its own: run to its end, or on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest import mock

from qwen2_local.cli import main

MAIN = "from qwen2_local.cli import main; main()"


def command(*arguments: str | bytes | Path, before: str = "") -> list[str | bytes | Path]:
    """`qwen2-local ARGUMENTS`; `before` is Python that runs first."""
    return [sys.executable, "-P", "-c", f"{before}\n{MAIN}", *arguments]


def run(
    *arguments: str | bytes | Path,
    stdin: str | bytes | None = None,
    before: str = "",
    env: Mapping[str, str | Path] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with `stdin` (nothing, if None) as its input. Fails on a traceback."""
    done = subprocess.run(
        command(*arguments, before=before),
        input=stdin.encode() if isinstance(stdin, str) else stdin or b"",
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    text = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in text.stderr, text.stderr
    return text


def here(
    *arguments: str | bytes | Path,
    stdin: str | bytes | None = None,
    env: Mapping[str, str | Path] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """The same in this process: much quicker, for all that does not depend on being one."""
    data = stdin.encode() if isinstance(stdin, str) else stdin or b""
    streams = [io.TextIOWrapper(io.BytesIO(content), "utf-8", write_through=True) for content in (data, b"", b"")]
    variables = {name: str(value) for name, value in (env or {}).items()}
    with (
        mock.patch.multiple(sys, stdin=streams[0], stdout=streams[1], stderr=streams[2], argv=["qwen2-local", *map(os.fsdecode, arguments)]),
        mock.patch.dict(os.environ, variables),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    said = [stream.buffer.getvalue().decode() for stream in streams[1:]]  # type: ignore[attr-defined]
    assert "Traceback" not in said[1], said[1]
    assert isinstance(code, int)
    return subprocess.CompletedProcess(list(arguments), code, *said)


class Terminal:
    """The program on a pseudo-terminal of its own, as a person has it."""

    def __init__(self, *arguments: str | Path, before: str = "", env: Mapping[str, str | Path] | None = None) -> None:
        ours, theirs = pty.openpty()
        # The terminal becomes the one that its Ctrl-C belongs to.
        controlling = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
        self.process = subprocess.Popen(
            command(*arguments, before=f"{controlling}\n{before}"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb", **(env or {})},
            start_new_session=True,
        )
        os.close(theirs)
        self._handle = ours
        self.text = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._handle, text.encode())

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """What came since the last wait, up to and with `text`."""
        deadline = time.monotonic() + timeout
        while (found := self.text.find(text, self._seen)) < 0:
            assert self.read(deadline - time.monotonic()), f"{text!r} did not come; this did: {self.text[self._seen :]!r}"
        start, self._seen = self._seen, found + len(text)
        return self.text[start : self._seen]

    def end(self, timeout: float = 60) -> int:
        """Read what comes until the program ends; its exit code."""
        deadline = time.monotonic() + timeout
        while self.read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def read(self, timeout: float = 60) -> bool:
        """Wait for more text; False if none came."""
        ready, _, _ = select.select([self._handle], [], [], max(0.0, timeout))
        if not ready:
            return False
        try:
            data = os.read(self._handle, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        # Without what switches bracketed paste on and off.
        self.text = re.sub("\x1b\\[\\?2004[hl]\r?", "", self.text + data.decode(errors="replace").replace("\r\n", "\n"))
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._handle)
