"""A comparison under way: loads what is missing beside the chat's model, asks one after the other, and closes what it has loaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from qwen2_local import fit
from qwen2_local.chats.attached import joined
from qwen2_local.errors import Cancelled, Qwen2LocalError, UsageError
from qwen2_local.sanitize import clean_line
from qwen2_local.types import Message
from qwen2_tui import attach, contest
from qwen2_tui.contest import Contender
from qwen2_tui.host import Host, resident
from qwen2_tui.live import LiveReply
from qwen2_tui.model import LoadWish, Model

_log = logging.getLogger(__name__)
_LOOK_S = 0.2

Two = tuple[Contender, Contender]


class Audience(Protocol):
    """Who is told, on the UI thread. place: 0 or 1."""

    def said(self, words: str) -> None:
        """What goes on; "" for nothing special."""

    def began(self, place: int, live: LiveReply) -> None:
        """The reply there is on its way."""

    def ended(self, place: int) -> None:
        """The reply there is over."""

    def over(self, problem: str) -> None:
        """All is over; problem: why it could not be made, "" if it could."""


class Comparisons:
    """One at a time, in a thread of its own. The chat's model is used as it is; others stay loaded until other ones are wanted, or the end."""

    def __init__(self, host: Host, audience: Audience, on_ui: Callable[[Callable[[], None]], object]) -> None:
        """on_ui: hands a call over to the UI thread, without waiting."""
        self._host, self._audience, self._on_ui = host, audience, on_ui
        self._loaded: dict[LoadWish, Model] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._busy = self._closed = False
        self.memory = [0, 0]
        """Bytes that the process of each holds, as last seen; 0 if unknown."""

    @property
    def busy(self) -> bool:
        """Is one under way?"""
        return self._busy

    def begin(self, two: Two, prompt: str, seed: int) -> None:
        """Ask both. prompt: with its mentions of files."""
        if self._busy or self._closed:
            return
        self._busy = True
        self._stop.clear()
        # No thread that an interpreter waits for at its end: loading cannot be broken off.
        threading.Thread(target=self._run, args=(two, prompt, seed), name="qwen2-local compares", daemon=True).start()

    def stop(self) -> None:
        """End the one that is under way; what came stays."""
        self._stop.set()

    def close(self) -> None:
        """Let go of what was loaded. Does not wait. Idempotent."""
        self._closed = True
        self._stop.set()
        if not self._busy:
            threading.Thread(target=self._unload, name="qwen2-local closes", daemon=True).start()

    def _run(self, two: Two, prompt: str, seed: int) -> None:
        problem = ""
        try:
            models = self._load(two)
            text = self._with_files(prompt, models[0])
            for place, (contender, model) in enumerate(zip(two, models, strict=True)):
                if not self._stop.is_set():
                    self._ask(place, contender, model, text, seed)
        except Cancelled:
            pass
        except Qwen2LocalError as error:
            problem = str(error)
        except Exception as error:
            _log.exception("comparing")
            problem = f"{type(error).__name__}: {error}"
        finally:
            self._busy = False
            if self._closed:
                self._unload()
            self._on_ui(lambda: self._audience.over(problem))

    def _load(self, two: Two) -> list[Model]:
        """Both models. Raises DoesNotFit, and what loading raises."""
        wanted = [contender.wish for contender in two if self._lent(contender) is None]
        self._unload(keep=wanted)
        missing = list(dict.fromkeys(wish for wish in wanted if wish not in self._loaded))
        if missing:
            contest.require_room(missing, fit.machine_memory(), contest.memory_of)
        for wish in missing:
            self._say(f"loading {wish.name} …")
            model = self._loaded[wish] = self._host.beside(wish, self._report)
            if self._stop.is_set():
                raise Cancelled("Stopped.")
            # What is read for the first time comes from the disk: that is not the model's speed. No chat begins like this text.
            for _ in model.write(model.tokenizer.encode("Hi"), max_tokens=1, persist=False):
                pass
        self._say("")
        return [self._lent(contender) or self._loaded[contender.wish] for contender in two]

    def _lent(self, contender: Contender) -> Model | None:
        """The chat's model, if it is that one."""
        host = self._host
        if host.state.phase != "ready" or contender.loads or contender.name not in (host.state.wish.name, host.label):
            return None
        return host.model

    def _unload(self, keep: list[LoadWish] | None = None) -> None:
        with self._lock:
            gone = [self._loaded.pop(wish) for wish in list(self._loaded) if wish not in (keep or [])]
        for model in gone:
            model.close()

    def _with_files(self, prompt: str, model: Model) -> str:
        """Raises UsageError for a file that cannot be attached."""
        reading = attach.read(prompt, lambda text: len(model.tokenizer.encode(text)))
        if reading.problems:
            raise UsageError(" ".join(reading.problems), hint="Write the path as it is, or leave the @ out.")
        return joined(prompt, reading.files)

    def _ask(self, place: int, contender: Contender, model: Model, text: str, seed: int) -> None:
        """Returns when it is over."""
        live = LiveReply(lambda tell: model.respond([Message("user", text)], seed=seed, persist=False, progress=tell, **contender.says))
        self._on_ui(lambda: self._audience.began(place, live))
        over = False
        while not over:
            over = live.wait(_LOOK_S)
            if self._stop.is_set():
                live.stop()
            self.memory[place] = resident(model.pid) if model.pid is not None else 0
        self._on_ui(lambda: self._audience.ended(place))

    def _report(self, what: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Cancelled("Stopped.")
        if total:
            self._say(clean_line(f"{what} {done / total:.0%}"))

    def _say(self, words: str) -> None:
        self._on_ui(lambda: self._audience.said(words))
