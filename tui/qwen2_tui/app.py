"""The app: one window on a model, its chats and its settings. It makes the parts, tells the screens what changed, and ends in order."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.app import SystemCommand
from textual.driver import Driver
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen

from qwen2_local import paths
from qwen2_local.chats import ChatStore
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean_line
from qwen2_tui import keys, logfile
from qwen2_tui.commands import commands
from qwen2_tui.ending import on_signals
from qwen2_tui.events import HostChanged, JobChanged, SettingsChanged
from qwen2_tui.everywhere import Everywhere
from qwen2_tui.host import Host, HostState
from qwen2_tui.model import Loader, LoadWish, load
from qwen2_tui.opening import Opening, first_model, wish_of
from qwen2_tui.settings import Settings, SettingsFile
from qwen2_tui.theme import DARK, LIGHT, OURS, theme_named

if TYPE_CHECKING:
    from qwen2_tui.jobs import Job, Jobs
    from qwen2_tui.library import Library

_log = logging.getLogger(__name__)
_LEAVE_S = 1.5
_GONE_S = 10.0
_SWEEP_S = 3.0  # the first screen comes first


class QwenApp(Everywhere):
    """See the module. Widgets find the parts here: `host`, `store`, `settings`, `settings_file`, `library`, `jobs`."""

    TITLE = "qwen2-local"
    CSS_PATH = "app.tcss"
    ENABLE_COMMAND_PALETTE = True
    COMMAND_PALETTE_BINDING = "ctrl+p"

    host_state: reactive[HostState] = reactive(HostState("empty", LoadWish()))
    """How things are with the model: `HostChanged` tells the screens, widgets may watch this."""

    settings: reactive[Settings] = reactive(Settings())
    """What a person chose. `change_settings` changes it."""

    def __init__(
        self,
        *,
        loader: Loader = load,
        store: ChatStore | None = None,
        settings_file: SettingsFile | None = None,
        opening: Opening | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        """All may be left out: then they are the real ones, in this person's folders."""
        super().__init__()
        self.opening = opening or Opening()
        self.settings_file = settings_file or SettingsFile(paths.home() / "settings.toml")
        self.store = store or ChatStore.open_or_temporary()
        read, self._notes = self.settings_file.read()
        self.set_reactive(QwenApp.settings, read)
        self._kept = read
        self._keeping = threading.Lock()
        self.host = Host(loader, self._host_changed, self.call_later)
        self._jobs = jobs
        if jobs is not None:
            jobs.tell = self._job_changed
        self._library: Library | None = None
        self._said: set[str] = set()
        self._begun = self._leaving = self._panicked = False
        self._leaver: threading.Thread | None = None
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self._take_settings(read)

    def get_driver_class(self) -> type[Driver]:
        """Textual draws on standard error; where that goes elsewhere (`2>log`), on standard output."""
        found = super().get_driver_class()
        if sys.__stderr__ is not None and sys.__stderr__.isatty():
            return found

        class OnOutput(found):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **named: Any) -> None:
                super().__init__(*args, **named)
                self._file = sys.__stdout__

        return OnOutput

    # The parts that are made when they are first wanted

    @property
    def jobs(self) -> Jobs:
        """Fetches and verifications."""
        if self._jobs is None:
            from qwen2_tui.jobs import Jobs

            self._jobs = Jobs()
            self._jobs.tell = self._job_changed
        return self._jobs

    @property
    def library(self) -> Library:
        """What is done with saved chats."""
        if self._library is None:
            from qwen2_tui.library import Library

            self._library = Library(self.store, lambda: self.host.model)
        return self._library

    # Begin

    def on_mount(self) -> None:
        """Show the chat first; the model loads behind it."""
        for note in (*self.store.notes, *self._notes):
            self.tell(note, problem=True)
        if threading.current_thread() is threading.main_thread() and not self.is_headless:
            on_signals(self.quit_soon, self.leave)
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        self._begun = True
        self.run_worker(self._load_first, thread=True)
        self.set_timer(_SWEEP_S, lambda: self.run_worker(lambda: self.library.sweep(), thread=True, exit_on_error=False))

    def _load_first(self) -> None:
        """In a thread."""
        wish = self.wish(first_model(self.opening, self.settings.model, self.store))
        self.call_later(self.host.load, wish)
        # What the first reply wants is there before it comes.
        import_module("qwen2_tui.markdown.code")
        import_module("qwen2_tui.markdown.inline").parser()

    def wish(self, name: str) -> LoadWish:
        """How to load the model `name`, as command line and settings say."""
        return wish_of(self.opening, self.settings.model, name)

    def about_model(self) -> tuple[str, ...]:
        """Name, quantization and backend of the model, as far as they are known."""
        name, _, quantization = Path(self.host.label).name.partition(":")
        backend = self.host.model.info.name if self.host.model is not None else self.host.state.wish.backend or ""
        return tuple(clean_line(part) for part in (name, quantization.upper(), backend) if part)

    # What others call

    def problem(self, error: BaseException) -> None:
        """What went wrong, and what to do."""
        if isinstance(error, Qwen2LocalError):
            self.tell(str(error), problem=True)
        else:
            _log.error("%s", error, exc_info=error)
            self.tell(f"{type(error).__name__}: {error}", problem=True)

    def switch_model(self, wish: LoadWish) -> None:
        """Load another model; the chat goes on with it."""
        self.host.load(wish)

    def change_settings(self, settings: Settings) -> None:
        """Take them at once, and keep them, in a thread."""
        self.settings = settings
        self.run_worker(self._keep_settings, thread=True, group="settings")

    def _keep_settings(self) -> None:
        with self._keeping:
            wanted = self.settings
            if wanted == self._kept:
                return
            try:
                self.settings_file.write(wanted)
                self._kept = wanted
            except (Qwen2LocalError, OSError) as error:
                self.call_later(self.problem, error)

    # What changed

    def _host_changed(self, state: HostState) -> None:
        self.host_state = state
        for note in state.notes:
            if note not in self._said:
                self._said.add(note)
                self.tell(note)
        self._tell_screens(lambda: HostChanged(state))

    def _job_changed(self, job: Job) -> None:
        """From a thread of theirs."""
        self.call_later(self._tell_screens, lambda: JobChanged(job))
        if job.news:
            self.call_later(self.tell, job.news, problem=job.state == "failed")

    def _tell_screens(self, made: Callable[[], Message]) -> None:
        for screen in self.screen_stack:
            screen.post_message(made())

    def watch_settings(self, settings: Settings) -> None:
        """Theme and keys are changed at once; the rest is for whoever is told."""
        if self.is_running:
            self._take_settings(settings)
            self._tell_screens(lambda: SettingsChanged(settings))

    def _take_settings(self, settings: Settings) -> None:
        self.theme = theme_named(settings.theme, self.available_themes)
        keymap, notes = keys.keymap(settings.keys)
        self.set_keymap(keymap)
        for note in notes:
            if self.is_running:
                self.tell(note, problem=True)
            else:
                self._notes = (*self._notes, note)

    def watch_theme(self, theme: str) -> None:
        """A theme that was chosen in the palette is a setting as well."""
        if self.is_running and theme_named(self.settings.theme, self.available_themes) != theme:
            short = {full: name for name, full in OURS.items()}.get(theme, theme)
            self.change_settings(replace(self.settings, theme=short))

    # The palette

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Everything that can be done."""
        return commands(self, screen)

    def key_of(self, id: str) -> str:
        """The keys of a row of the table as they are now, for people."""
        return keys.shown(self.settings.keys.get(id) or keys.BY_ID[id].keys)

    # The end

    async def action_quit(self) -> None:
        """Keep everything, let go of the model, and end. Waits for nothing longer than a moment."""
        if self._leaving:
            return
        self._leaving = True
        self._leaver = threading.Thread(target=self.leave, name="qwen2-local leaves", daemon=True)
        self._leaver.start()
        until = time.monotonic() + _LEAVE_S
        while self._leaver.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.exit()

    def leave(self) -> None:
        """Keep everything, and let go of the model. For a thread. Each part for itself: what fails in one must not cost the others."""
        parts: list[Callable[[], object]] = [self.chat_screen.leave, self._keep_settings]
        if self._jobs is not None:
            parts.append(self._jobs.close)
        if self._library is not None:
            parts.append(self._library.close)
        with self._context():  # widgets find their app also in this thread, and after a crash
            for part in (*parts, self.host.close, self.store.close):
                try:
                    part()
                except Exception:
                    _log.exception("leaving")

    def _fatal_error(self) -> None:
        """A person gets the terminal back and one sentence (`hold`), never a screen full of Python."""
        self._close_messages_no_wait()

    def panic(self, *renderables: object) -> None:
        """The same for what is no exception of the app's own."""
        _log.critical("panic: %s", renderables)
        self._panicked = True
        self._close_messages_no_wait()

    def hold(self) -> int:
        """Run until the person leaves; the exit code. Raises what keeps the app from beginning at all."""
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)  # who exports them fixes the size that Textual sees, also when the window gets another
        with logfile.written():
            self.run()
            if self._leaver is not None:
                self._leaver.join(_GONE_S)  # the terminal is the person's again; what they deleted is still going, where there is much
            if self._exception is None and not self._panicked:
                return self.return_code or 0
            _log.critical("the app crashed", exc_info=self._exception)
            self.leave()
        if self._exception is not None and not self._begun:
            raise self._exception
        if self._exception is not None and logfile.debugging():
            traceback.print_exception(self._exception)
        what = "the terminal" if self._exception is None else type(self._exception).__name__
        print(f"error: the app crashed ({what}). Your chats are kept.\n  {logfile.path()} says more.", file=sys.stderr)
        return 1
