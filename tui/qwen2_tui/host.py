"""The loaded model: loading, switching, starting it again. The UI thread asks; the waiting is done in threads."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen2_local.errors import Cancelled, Qwen2LocalError
from qwen2_local.sanitize import clean, clean_line
from qwen2_tui.model import Loader, LoadWish, Model, label_of

if TYPE_CHECKING:
    from qwen2_local.loading import Report

_log = logging.getLogger(__name__)
_TELL_EVERY_S = 0.2
_MEMORY_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class HostState:
    """How things are with the model. words: what is going on ("preparing guide: converting 41 %"), or what went wrong; hint: what to do then.

    empty: nothing was asked for yet. failed: there is no model, or its process died (crashed): then a restart brings it back.
    notes: sentences that a person should see once.
    """

    phase: Literal["empty", "loading", "ready", "failed"]
    wish: LoadWish
    words: str = ""
    hint: str = ""
    crashed: bool = False
    notes: tuple[str, ...] = ()


class Host:
    """Holds at most one model. For the UI thread; what takes time happens in threads of its own, one load after the other."""

    def __init__(self, loader: Loader, tell: Callable[[HostState], None], on_ui: Callable[[Callable[[], None]], object]) -> None:
        """tell: is called with every new state, on the UI thread. on_ui: hands a call over to that thread, from any, without waiting."""
        self._loader = loader
        self._tell = tell
        self._on_ui = on_ui
        self._turn = 0
        self._loading = threading.Lock()
        self._closed = False
        self._memory = (0.0, 0)
        self.model: Model | None = None
        self.state = HostState("empty", LoadWish())
        self.label = self.state.wish.name
        """The model's full name: "7b:q4_0" where "7b" was asked for, as far as it is known."""

    def load(self, wish: LoadWish) -> None:
        """Close the model that is there, its replies with it, and load another. A load under way is superseded."""
        if self._closed:
            return
        self._turn += 1
        before, self.model, self.label = self.model, None, wish.name
        self._set(HostState("loading", wish, f"loading {clean_line(wish.name)}"))
        threading.Thread(target=self._work, args=(self._turn, wish, before), name="qwen2-local loads", daemon=True).start()

    def restart(self, *, safe: bool) -> None:
        """The same model again. safe: without the special matrix code, as that may be what crashed."""
        self.load(replace(self.state.wish, safe=safe))

    def crash(self, error: Qwen2LocalError) -> None:
        """Its process died, as whoever was reading found out."""
        if self.state.phase == "ready":
            self._set(HostState("failed", self.state.wish, _sentence(error.what), clean(error.hint), crashed=True))

    def memory(self) -> int:
        """Bytes of memory that the model's process holds; 0 where that is not known. At most a second old."""
        pid = self.model.pid if self.model is not None else None
        if pid is None:
            return 0
        if time.monotonic() - self._memory[0] > _MEMORY_EVERY_S:
            self._memory = (time.monotonic(), self._memory[1])
            if sys.platform == "linux":
                self._memory = (self._memory[0], _resident(pid))
            else:
                threading.Thread(target=self._ask_ps, args=(pid,), name="qwen2-local memory", daemon=True).start()
        return self._memory[1]

    def beside(self, wish: LoadWish, report: Report) -> Model:
        """Load one more, in the calling thread; who asks for it closes it. Raises what the loader raises."""
        return self._loader(wish, report)

    def close(self) -> None:
        """Let the model go. Waits neither for a load nor for the process to end: that ends with this one. Idempotent."""
        self._closed = True
        self._turn += 1
        model, self.model = self.model, None
        if model is not None:
            closing = threading.Thread(target=_close, args=(model,), name="qwen2-local closes", daemon=True)
            closing.start()
            closing.join(1.0)

    def _set(self, state: HostState) -> None:
        self.state = state
        self._tell(state)

    def _work(self, turn: int, wish: LoadWish, before: Model | None) -> None:
        """In a thread. One load at a time: two models at once may not fit."""
        with self._loading:
            if before is not None:
                _close(before)
            if turn != self._turn:
                return
            try:
                model = self._loader(wish, self._reporter(turn, wish))
            except Cancelled:
                return
            except Qwen2LocalError as error:
                failed = HostState("failed", wish, _sentence(error.what), clean(error.hint))
                self._on_ui(lambda: self._done(turn, failed))
                return
            except Exception as error:
                _log.exception("loading %s", wish.name)
                failed = HostState("failed", wish, clean_line(f"{wish.name} could not be loaded: {error}"), "`qwen2-local doctor` may say why.")
                self._on_ui(lambda: self._done(turn, failed))
                return
            if turn != self._turn:
                _close(model)
                return
            label = label_of(wish.name)
            self._on_ui(lambda: self._done(turn, HostState("ready", wish, notes=model.notes), model, label))

    def _done(self, turn: int, state: HostState, model: Model | None = None, label: str = "") -> None:
        if turn != self._turn:
            if model is not None:
                threading.Thread(target=_close, args=(model,), name="qwen2-local closes", daemon=True).start()
            return
        self.model, self.label, self._memory = model, label or state.wish.name, (0.0, 0)
        self._set(state)

    def _reporter(self, turn: int, wish: LoadWish) -> Callable[[str, int, int], None]:
        last = 0.0

        def report(what: str, done: int, total: int) -> None:
            nonlocal last
            if turn != self._turn:
                raise Cancelled("Another model is wanted.")
            now = time.monotonic()
            if now - last >= _TELL_EVERY_S or done == total:
                last = now
                words = clean_line(f"preparing {wish.name}: {what}" + (f" {100 * done // total} %" if total else ""))
                self._on_ui(lambda: self._progress(turn, wish, words))

        return report

    def _progress(self, turn: int, wish: LoadWish, words: str) -> None:
        if turn == self._turn and self.state.phase == "loading":
            self._set(HostState("loading", wish, words))

    def _ask_ps(self, pid: int) -> None:
        self._memory = (self._memory[0], resident(pid))


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 where that is not known. May start another process: not for the UI thread, but on Linux."""
    if sys.platform == "linux":
        return _resident(pid)
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, timeout=5, check=True).stdout) * 1024
    return 0


def _sentence(text: str) -> str:
    """An error's words, which begin small behind "error:", by themselves."""
    text = clean_line(text)
    return text[:1].upper() + text[1:]


def _resident(pid: int) -> int:
    """Bytes resident of a process, on Linux; 0 where it is gone."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def _close(model: Model) -> None:
    try:
        model.close()
    except Exception:
        _log.exception("closing a model")
