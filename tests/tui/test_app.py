"""The app as a whole: what is global, what it tells its screens, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from textual.app import ComposeResult
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from qwen2_local.chats import ChatMessage, ChatStore
from qwen2_local.errors import UnknownModel, UsageError
from qwen2_tui import logfile
from qwen2_tui.app import QwenApp
from qwen2_tui.commands import commands
from qwen2_tui.events import HostChanged, JobChanged, SettingsChanged
from qwen2_tui.host import HostState
from qwen2_tui.jobs import Job
from qwen2_tui.model import LoadWish
from qwen2_tui.opening import Opening, first_model, wish_of
from qwen2_tui.settings import ModelSettings, Settings
from qwen2_tui.theme import theme_named
from qwen2_tui.widgets.topline import line
from tests.tui.pilot import ScriptedJobs, make_app, screen_text, wait_for_text, wait_until
from tests.tui.scripted import Say, ScriptedLoader, ScriptedModel

COLOURS = {name: "#ffffff" for name in ("foreground", "warning", "success", "error")}


class Listener(Screen[None]):
    """A screen that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def compose(self) -> ComposeResult:
        yield Static("listening")

    def on_host_changed(self, event: HostChanged) -> None:
        self.heard.append(event.state.phase)

    def on_settings_changed(self, event: SettingsChanged) -> None:
        self.heard.append(event.settings)

    def on_job_changed(self, event: JobChanged) -> None:
        self.heard.append(event.job)


# What it begins with


async def test_the_chat_is_there_while_the_model_loads():
    loader = ScriptedLoader(hold=True)
    app = make_app(loader=loader)
    async with app.run_test(size=(100, 30)) as pilot:
        await wait_for_text(pilot, "Three things to try")
        assert "loading guide" in screen_text(app)
        loader.go.release()
        await wait_for_text(pilot, "● ready")


def chat_of(store: ChatStore, model: str) -> int:
    number = store.create()
    store.add(number, ChatMessage("user", "hi"))
    store.add(number, ChatMessage("assistant", "ho", model=model))
    return number


def test_the_model_is_that_of_the_command_line_then_of_the_chat_then_of_the_settings_then_the_guide():
    settings = ModelSettings(model="7b")
    with ChatStore.temporary() as store:
        number = chat_of(store, "0.5b")
        assert first_model(Opening("1.5b", number), settings, store) == "1.5b"
        assert first_model(Opening(chat=number), settings, store) == "0.5b"
        assert first_model(Opening(continue_last=True), settings, store) == "0.5b"
        assert first_model(Opening(), settings, store) == "7b"
        assert first_model(Opening(chat=99), ModelSettings(), store) == "guide"  # the last chat's is not installed


def test_without_any_wish_it_is_the_model_of_the_last_chat():
    with ChatStore.temporary() as store:
        assert first_model(Opening(), ModelSettings(), store) == "guide"
        chat_of(store, "guide:q4_0")
        assert first_model(Opening(), ModelSettings(), store) == "guide:q4_0"


def test_the_command_line_says_how_to_load_before_the_settings():
    settings = ModelSettings(backend="mlx", context=512, kv_bits=8, draft="guide")
    assert wish_of(Opening(), settings, "7b") == LoadWish("7b", "mlx", 512, 8, "guide")
    loads = {"backend": "llama.cpp", "context": None, "force": True, "worker": True}
    assert wish_of(Opening(loads=loads), settings, "7b") == LoadWish("7b", "llama.cpp", 512, 8, "guide", force=True)


async def test_a_model_that_is_not_there_is_said_and_the_app_goes_on():
    app = make_app(
        loader=ScriptedLoader(fails=[UnknownModel('No model is called "9b".', hint="Installed here: guide.")]),
        opening={"model": "9b\x1b[31m[bold]:q4\x07"},
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, 'No model is called "9b".')
        assert "Installed here: guide." in screen_text(app)
        first = screen_text(app).splitlines()[0]
        assert "no model" in first and "9b[31m[bold] · Q4" in first  # a name cannot reach the terminal


# The first line


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, "qwen2-local   7b · Q4_K_M · llama.cpp   ● ready   ctrl+p commands"),
        (60, "qwen2-local   7b · Q4_K_M   ● ready   ctrl+p commands"),
        (45, "qwen2-local   7b   ● ready   ctrl+p commands"),
        (30, "7b   ● ready   ctrl+p commands"),
        (12, "7b   ● ready"),
    ],
)
def test_the_first_line_leaves_out_what_does_not_fit(width: int, shown: str):
    text = line(HostState("ready", LoadWish("7b")), ("7b", "Q4_K_M", "llama.cpp"), "ctrl+p", width, COLOURS)
    assert text.plain.split() == shown.split() and text.cell_len == width


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (HostState("ready", LoadWish(safe=True)), "● ready in safe mode"),
        (HostState("loading", LoadWish(), "preparing guide: converting 41 %"), "◌ preparing guide: converting 41 %"),
        (HostState("failed", LoadWish(), "It does not fit."), "✕ no model"),
        (HostState("failed", LoadWish(), "Killed.", crashed=True), "✕ the model crashed"),
    ],
)
def test_the_first_line_says_how_it_is(state: HostState, shown: str):
    assert shown in line(state, ("guide",), "ctrl+p", 80, COLOURS).plain


# What it tells


async def test_every_open_screen_is_told_what_changed():
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    below, above = Listener(), Listener()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        app.push_screen(below)
        app.push_screen(above)
        await wait_for_text(pilot, "listening")
        app.switch_model(app.wish("7b"))
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        wanted = Settings(sidebar=False)
        app.change_settings(wanted)
        job = Job("7b", state="done", models=("7b:q4_k_m",))
        jobs.tell(job)
        await wait_until(pilot, lambda: job in above.heard)
        assert below.heard == above.heard == ["loading", "ready", wanted, job]
        await wait_until(pilot, lambda: [one.message for one in app._notifications] == ["7b:q4_k_m is installed."])
        assert app.host.state.wish.name == "7b"


async def test_notes_of_a_model_are_said_once():
    app = make_app(notes=("It runs in safe mode.",))
    said: list[str] = []
    app.notify = lambda text, **_: said.append(text)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: said)
        app.host.restart(safe=False)
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        assert said == ["It runs in safe mode."]


async def test_problems_are_told_cleaned_and_never_as_markup():
    app = make_app()
    async with app.run_test(notifications=True, size=(100, 30)) as pilot:
        app.problem(UsageError("[red]No\x1b[2J[/red] such thing.", hint="[Look] elsewhere."))
        await wait_for_text(pilot, "[red]No[2J[/red] such thing.")
        assert "[Look] elsewhere." in screen_text(app)


# Settings


async def test_a_theme_from_the_palette_is_kept(own_home: Path):
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        assert app.theme == "qwen2-dark"
        app.theme = "qwen2-light"
        await wait_until(pilot, lambda: app.settings.theme == "light")
        app.theme = "nord"
        await wait_until(pilot, lambda: 'theme = "nord"' in app.settings_file.path.read_text())
    again = make_app()
    async with again.run_test(size=(80, 24)):
        assert again.theme == "nord"


async def test_settings_that_cannot_be_kept_are_taken_and_said():
    app = make_app()
    async with app.run_test(notifications=True, size=(80, 24)) as pilot:

        def write(settings: Settings) -> None:
            raise UsageError("The disk is full.")

        app.settings_file.write = write
        app.change_settings(Settings(theme="light"))
        await wait_for_text(pilot, "The disk is full.")
        assert app.theme == "qwen2-light"


async def test_what_was_changed_last_is_kept_at_the_end(own_home: Path):
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        app._keeping.acquire()  # as if a slow disk was still at the one before
        app.change_settings(Settings(sidebar=False))
        app._keeping.release()
        await pilot.press("ctrl+q")
        await wait_until(pilot, lambda: app._exit)
    assert "sidebar = false" in (own_home / "settings.toml").read_text()


def test_themes_have_short_names_and_an_unknown_one_is_ours():
    known = {"qwen2-dark": 1, "qwen2-light": 2, "nord": 3}
    assert [theme_named(name, known) for name in ("light", "nord", "no such", "")] == ["qwen2-light", "nord", "qwen2-dark", "qwen2-dark"]


async def test_keys_of_the_settings_work_at_once(tmp_path: Path):
    (tmp_path / "s.toml").write_text('[keys]\n"app.help" = "f12"\n"app.nothing" = "f11"\n')
    app = make_app(settings_file=tmp_path / "s.toml")
    async with app.run_test(notifications=True, size=(100, 30)) as pilot:
        await wait_for_text(pilot, "There is no key named app.nothing")
        await pilot.press("f1")
        assert app.screen is app.chat_screen
        await pilot.press("f12")
        await wait_until(pilot, lambda: app.screen is not app.chat_screen)


# The palette


async def test_everything_is_in_the_palette():
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        titles = [one.title for one in commands(app, app.screen)]
        for title in ("New chat", "New temporary chat", "Search chats", "Models", "Settings", "Help", "Compare two models", "Theme: light", "Quit"):
            assert title in titles
        assert "Restart the model in safe mode" in titles
        assert len(set(titles)) == len(titles)


# Keys


class Dialog(ModalScreen[None]):
    def compose(self) -> ComposeResult:
        yield Static("a dialog")


async def test_below_a_dialog_nothing_changes():
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        app.push_screen(Dialog())
        await wait_for_text(pilot, "a dialog")
        await pilot.press("f1", "ctrl+n", "ctrl+o", "f2", "ctrl+p", "ctrl+t", "ctrl+f", "f3")
        assert isinstance(app.screen, Dialog) and len(app.screen_stack) == 2


async def test_ctrl_c_copies_what_is_selected_and_says_so(monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []
    monkeypatch.setattr("qwen2_tui.clipboard.copied", lambda text: taken.append(text) or "Copied.")
    app = make_app()
    async with app.run_test(notifications=True, size=(80, 24)) as pilot:
        app.chat_screen.composer.load_text("some\x1b]0;title\x07 words")
        app.chat_screen.composer.select_all()
        await pilot.press("ctrl+c")
        await wait_for_text(pilot, "Copied.")
        assert taken == [app.clipboard] == ["some]0;title words"]


async def test_ctrl_c_stops_a_reply_and_keeps_it():
    app = make_app(Say("a long reply", hold=2))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        assert "esc stop" not in screen_text(app)
        app.chat_screen.ask("hello")
        await wait_for_text(pilot, "esc stop")
        await pilot.press("ctrl+c")
        await wait_until(pilot, lambda: not app.chat_screen.busy and "esc stop" not in screen_text(app))
        assert app.is_running and app._exit is False


async def test_ctrl_c_twice_quits():
    app = make_app()
    async with app.run_test(notifications=True, size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        await pilot.press("ctrl+c")
        await wait_for_text(pilot, "Press ctrl+c again to quit.")
        await pilot.press("ctrl+c")
        await wait_until(pilot, lambda: app._exit)
    assert app.scripted.closed


# Sizes


async def test_too_small_is_said_and_passes():
    app = make_app()
    async with app.run_test(size=(40, 10)) as pilot:
        await wait_for_text(pilot, "A little more room, please")
        await pilot.resize_terminal(60, 20)
        await wait_until(pilot, lambda: app.screen is app.chat_screen)
        await pilot.resize_terminal(59, 24)
        await wait_for_text(pilot, "59x24")
        await pilot.press("ctrl+n")
        await pilot.resize_terminal(60, 20)
        await wait_until(pilot, lambda: app.screen is app.chat_screen)


# The end


async def test_quit_keeps_the_draft_and_the_partial_reply_and_closes_the_model(own_home: Path):
    app = make_app(Say("one two three four five six", hold=4))
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        app.chat_screen.ask("count")
        await wait_until(pilot, lambda: app.chat_screen.session.live is not None and app.chat_screen.session.live.progress().written >= 4)
        app.chat_screen.composer.write("a draft")
        await pilot.press("ctrl+q")
        await wait_until(pilot, lambda: app._exit)
    assert app.scripted.closed
    with ChatStore.open(own_home / "chats.db") as store:
        (summary,) = store.summaries()
        reply = store.record(summary.id).messages[-1]
        assert (reply.role, reply.state) == ("assistant", "partial") and reply.text.startswith("one two")
        assert store.draft(summary.id) == "a draft"


async def test_a_fault_in_one_part_does_not_keep_the_others_from_closing(monkeypatch: pytest.MonkeyPatch):
    jobs = ScriptedJobs()
    app = make_app(jobs=jobs)
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_until(pilot, lambda: app.host.state.phase == "ready")
        monkeypatch.setattr(app.chat_screen, "leave", lambda: 1 / 0)
        await pilot.press("ctrl+q")
        await wait_until(pilot, lambda: app._exit)
    assert app.scripted.closed and ("close", "") in jobs.asked


class Faulty(QwenApp):
    """Begins, then fails; or fails before."""

    early = False

    def run(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        self._begun = not self.early
        self._handle_exception(ZeroDivisionError("division by zero"))


def test_a_crash_is_one_sentence_and_a_log(capsys: pytest.CaptureFixture[str]):
    model = ScriptedModel()
    app = Faulty(loader=ScriptedLoader(model), jobs=ScriptedJobs())  # type: ignore[arg-type]
    app.host.model = model
    assert app.hold() == 1
    said = capsys.readouterr().err
    assert said == f"error: the app crashed (ZeroDivisionError). Your chats are kept.\n  {logfile.path()} says more.\n"
    assert "division by zero" in logfile.path().read_text() and logfile.path().stat().st_mode & 0o777 == 0o600
    assert model.closed


def test_whoever_debugs_sees_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QWEN2_LOCAL_DEBUG", "1")
    assert Faulty(loader=ScriptedLoader(), jobs=ScriptedJobs()).hold() == 1  # type: ignore[arg-type]
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_what_keeps_it_from_beginning_is_raised():
    app = Faulty(loader=ScriptedLoader(), jobs=ScriptedJobs())  # type: ignore[arg-type]
    app.early = True
    with pytest.raises(ZeroDivisionError):
        app.hold()


def test_the_first_screen_needs_neither_numpy_nor_the_other_screens():
    import subprocess

    code = "import sys, qwen2_tui.app; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert loaded & {"numpy", "tokenizers", "markdown_it", "pygments", "httpx2", "huggingface_hub", "tomlkit", "llguidance"} == set()
    assert {one for one in loaded if one.startswith("qwen2_tui.screens.")} & {
        f"qwen2_tui.screens.{name}" for name in ("models", "settings", "compare", "help", "prompt", "tokens")
    } == set()
