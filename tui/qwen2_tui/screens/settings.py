"""The settings: of this chat, of every new one, of the model, of the app. What lies in the file, changed here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual import on
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import ContentSwitcher, Footer, Static, Tab, Tabs

from qwen2_local.sanitize import clean_line
from qwen2_tui.events import HostChanged, SettingsChanged
from qwen2_tui.fields import Value
from qwen2_tui.keys import bind
from qwen2_tui.model import DEFAULT
from qwen2_tui.screens.sections import SECTIONS, contents
from qwen2_tui.settings import ChatSettings, Settings
from qwen2_tui.widgets.dialogs import Choice, Choose
from qwen2_tui.widgets.fieldrow import FieldRow
from qwen2_tui.widgets.keylist import KeyList
from qwen2_tui.widgets.presets import Presets
from qwen2_tui.widgets.topline import TopLine

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp


class SettingsScreen(Screen[None]):
    """Sections of rows; nothing is changed before it is saved, but presets and keys, which ask."""

    DEFAULT_CSS = """
    SettingsScreen {
        Tabs { dock: top; margin-top: 1; }
        ContentSwitcher { height: 1fr; }
        .section { height: 1fr; padding: 1 2 0 2; scrollbar-size-vertical: 1; }
        .section > .words { color: $text-muted; margin-bottom: 1; }
        #state { height: 1; padding: 0 2; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; &.-edited { color: $text-warning; } }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("settings.save", "save", show=True, priority=True),
        bind("settings.reset", "reset", show=True, priority=True),
        bind("settings.previous", "section(-1)", priority=True),
        bind("settings.next", "section(1)", show=True, priority=True),
        bind("app.back", "leave", show=True),
        Binding("up", "row(-1)", show=False),
        Binding("down", "row(1)", show=False),
    ]

    @property
    def qwen(self) -> QwenApp:
        """The app, by its own type."""
        return cast("QwenApp", self.app)

    def __init__(self, section: str = "chat") -> None:
        super().__init__()
        self._first = section

    def compose(self) -> ComposeResult:
        """The sections, of which each is filled when it is first looked at."""
        self._made: dict[str, list[FieldRow]] = {}
        yield TopLine()
        yield Tabs(*(Tab(title, id=name) for name, title in SECTIONS.items()), active=self._first)
        with ContentSwitcher(initial=f"section-{self._first}"):
            for name in SECTIONS:
                yield VerticalScroll(id=f"section-{name}", classes="section", can_focus=False)
        yield Static(id="state", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """The keyboard begins with the sections."""
        self.query_one(Tabs).focus()
        self._say()

    @on(Tabs.TabActivated)
    def _activated(self, event: Tabs.TabActivated) -> None:
        name = str(event.tab.id)
        switcher = self.query_one(ContentSwitcher)
        switcher.current = f"section-{name}"
        section = self.query_one(f"#section-{name}", VerticalScroll)
        if not section.children:
            section.mount_all(self._filled(name))

    def _filled(self, name: str) -> list[Widget]:
        widgets = list(contents(self.qwen, name))
        self._made[name] = [one for one in widgets if isinstance(one, FieldRow)]
        return widgets

    # What was changed

    def _rows(self, section: str = "") -> list[FieldRow]:
        """Of one section, or of all."""
        return self._made.get(section, []) if section else [row for rows in self._made.values() for row in rows]

    @on(FieldRow.Changed)
    def _say(self) -> None:
        edited = [row for row in self._rows() if row.edited]
        state = self.query_one("#state", Static)
        state.set_class(bool(edited), "-edited")
        if not edited:
            state.update(f"What is set for one chat lies with it, all else in {clean_line(str(self.qwen.settings_file.path))}", layout=False)
            return
        what = "1 change" if len(edited) == 1 else f"{len(edited)} changes"
        anew = " The model is then loaded anew." if any(row.edited for row in self._rows("model")) else ""
        state.update(f"{what}: {self.qwen.key_of('settings.save')} saves.{anew}", layout=False)

    def action_save(self) -> bool:
        """Takes all that was changed, in every section; nothing while something is wrong."""
        wrong = next((row for row in self._rows() if row.problem), None)
        if wrong is not None:
            self.query_one(Tabs).active = next(name for name in SECTIONS if wrong in self._rows(name))
            wrong.focus()
            self.qwen.tell(f"{wrong.field.title}: {wrong.problem}", problem=True)
            return False
        new, old = self._changed(), self.qwen.settings
        chat = self._given("chat")
        if new != old:
            self.qwen.change_settings(new)
        if chat:  # what it has as every new chat goes on following that
            self.qwen.chat_screen.change_chat(replace(self.qwen.chat_screen.chat_settings, **chat))
        if new.model != old.model:
            name = new.model.model if new.model.model != old.model.model else self.qwen.host.state.wish.name
            self.qwen.switch_model(self.qwen.wish(name or DEFAULT))
        for row in self._rows():
            row.settle(row.value)
        if chat or new != old:
            self.qwen.tell("Saved. The model is loaded anew." if new.model != old.model else "Saved.")
        self._say()
        return True

    def _given(self, section: str) -> dict[str, Any]:
        return {row.field.name: row.value for row in self._rows(section) if row.edited}

    def _changed(self) -> Settings:
        settings = self.qwen.settings
        return replace(
            settings,
            chat=replace(settings.chat, **self._given("new")),
            model=replace(settings.model, **self._given("model")),
            **self._given("look"),
        )

    def action_reset(self) -> None:
        """The row with the keyboard back to what it would be without it."""
        row = next((one for one in self._rows() if one.has_focus_within), None)
        if row is None:
            return
        here = row in self._rows("chat")
        base: object = self.qwen.settings.chat if here else {"new": ChatSettings(), "model": Settings().model}.get(self._section, Settings())
        value: Value | None = getattr(base, row.field.name)
        row.put(value)

    @property
    def _section(self) -> str:
        return str(self.query_one(Tabs).active)

    def on_settings_changed(self, event: SettingsChanged) -> None:
        """Rows that nobody has touched show what is so now."""
        for section, part in (("new", event.settings.chat), ("model", event.settings.model), ("look", event.settings)):
            for row in self._rows(section):
                row.settle(getattr(part, row.field.name))
        self.chat_changed()
        for widget in (*self.query(Presets), *self.query(KeyList)):
            widget.show()

    @on(Presets.Used)
    def chat_changed(self) -> None:
        """This chat has other settings."""
        for row in self._rows("chat"):
            if not row.disabled:
                row.settle(getattr(self.qwen.chat_screen.chat_settings, row.field.name))

    def on_host_changed(self, event: HostChanged) -> None:
        """Another model has other values of its own: sections are made anew, if nothing was touched."""
        if event.state.phase == "ready" and not any(row.edited for row in self._rows()):
            self.call_later(self._make_anew)

    async def _make_anew(self) -> None:
        for name in ("chat", "new"):
            section = self.query_one(f"#section-{name}", VerticalScroll)
            if section.children and not section.has_focus_within:
                await section.remove_children()
                await section.mount_all(self._filled(name))

    def commands(self) -> Iterable[SystemCommand]:
        """For the palette."""
        yield SystemCommand("Read the settings file again", "after changing it by hand", self.read_again)

    def read_again(self) -> None:
        """What a person has changed in the file meanwhile holds from now on."""
        read, notes = self.qwen.settings_file.read()
        for note in notes:
            self.qwen.tell(note, problem=True)
        self.qwen.settings = read

    # Moving

    def action_section(self, by: int) -> None:
        """To another section."""
        names = list(SECTIONS)
        tabs = self.query_one(Tabs)
        tabs.active = names[(names.index(self._section) + by) % len(names)]
        tabs.focus()

    def action_row(self, by: int) -> None:
        """To the next row, or the one before."""
        focused = self.focused
        inside = [one for one in self.query_one(f"#section-{self._section}").query(Widget) if one.focusable]
        place = inside.index(focused) + by if focused in inside else 0
        if place < 0:
            self.query_one(Tabs).focus()
        elif place < len(inside):
            inside[place].focus()

    def action_leave(self) -> None:
        """Back to the chat. What was changed and not saved is asked about."""
        if not any(row.edited for row in self._rows()):
            self.dismiss()
            return
        choices = (Choice("save", "save them"), Choice("drop", "drop them"), Choice("stay", "go on changing"))
        self.app.push_screen(Choose("There are changes", choices), self._answered)

    def _answered(self, answer: str | None) -> None:
        if answer == "drop" or (answer == "save" and self.action_save()):
            self.dismiss()
