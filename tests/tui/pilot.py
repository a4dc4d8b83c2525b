"""What tests of the app share: to make one of scripted parts, to wait until something is so, and to read its screen."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.app import App
from textual.pilot import Pilot
from textual.widgets import TextArea

from qwen2_local import paths
from qwen2_local.chats import ChatStore
from tests.tui.scripted import Say, ScriptedLoader, ScriptedModel


def make_app(
    *says: str | Say | Callable[[str], str | Say],
    model: ScriptedModel | None = None,
    loader: Callable[..., Any] | None = None,
    store: ChatStore | None = None,
    settings_file: Path | None = None,
    jobs: Any = None,
    opening: Mapping[str, Any] | None = None,
    **model_has: Any,
) -> Any:
    """A `QwenApp` whose model says `says` (or `model`, or what `loader` loads), with a store and settings in this test's home.

    opening: fields of `Opening`. model_has: further options of `ScriptedModel`. The model is then `app.scripted`.
    """
    from qwen2_tui.app import Opening, QwenApp
    from qwen2_tui.settings import SettingsFile

    model = model or ScriptedModel(*says, **model_has)
    app = QwenApp(
        loader=loader or ScriptedLoader(model),
        store=store or ChatStore.open(paths.home() / "chats.db"),
        settings_file=SettingsFile(settings_file or paths.home() / "settings.toml"),
        opening=Opening(**(opening or {})),
        jobs=jobs or ScriptedJobs(),
    )
    app.scripted = model
    return app


class ScriptedJobs:
    """Stands for `qwen2_tui.jobs.Jobs`, and starts no process: it writes down what is asked, and a test says what becomes of it by `tell`."""

    def __init__(self) -> None:
        self.jobs: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.plans: dict[str, Any] = {}
        """What a hub answers about a name: a `Plan`, or what went wrong. None yet: it takes its time."""
        self.tell: Callable[[Any], None] = lambda job: None

    def plan(self, name: str, on_end: Callable[[Any, str], None]) -> Any:
        self.asked.append(("plan", name))
        answer = self.plans.get(name)
        if answer is not None:
            on_end(*((None, answer) if isinstance(answer, str) else (answer, "")))
        return self

    def stop(self) -> None:
        """Nobody waits for a plan any more."""
        self.asked.append(("stop", ""))

    def look(self) -> None:
        """There is nothing from earlier days."""

    def start(self, name: str, *_: Any, **__: Any) -> None:
        self.asked.append(("start", name))

    def verify(self, name: str) -> None:
        self.asked.append(("verify", name))

    def pause(self, name: str) -> None:
        self.asked.append(("pause", name))

    def resume(self, name: str) -> None:
        self.asked.append(("resume", name))

    def cancel(self, name: str) -> None:
        self.asked.append(("cancel", name))

    def close(self) -> None:
        self.asked.append(("close", ""))

    def say(self, job: Any) -> None:
        """What a process would have told."""
        self.jobs[job.name] = job
        self.tell(job)


async def wait_until(pilot: Pilot[Any], condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Lets the app go on until `condition()`. Fails with what the screen shows."""
    until = time.monotonic() + timeout
    while not condition():
        if pilot.app._exception is not None:
            raise pilot.app._exception
        if time.monotonic() > until:
            raise AssertionError(f"still not so after {timeout:g} s; on the screen:\n{screen_text(pilot.app)}")
        await pilot.pause(0.01)
    await pilot.pause()


async def wait_for_text(pilot: Pilot[Any], text: str, timeout: float = 10.0) -> None:
    """Until `text` is to be read on the screen, in one line."""
    await wait_until(pilot, lambda: text in screen_text(pilot.app), timeout)


def screen_text(app: App[Any]) -> str:
    """What the screen shows now, as text, without the spaces at the ends of lines."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())


@asynccontextmanager
async def running(app: Any, *, size: tuple[int, int] = (100, 30)) -> AsyncIterator[Pilot[Any]]:
    """The app, its model loaded, until the end of the block; then it has quit as a person quits."""
    async with app.run_test(size=size) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase in ("ready", "failed"))
        yield pilot
        if app.is_running:
            await pilot.press("ctrl+q")
            await wait_until(pilot, lambda: not app.is_running)


async def ask(pilot: Pilot[Any], text: str) -> None:
    """Writes a question and sends it; key by key would take long."""
    composer = pilot.app.focused
    assert isinstance(composer, TextArea), f"the keyboard is with {composer}"
    composer.insert(text)
    await pilot.press("enter")
