"""Settings of a chat under a name: to be used in this chat, in every new one, renamed and deleted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from textual import on
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from qwen2_local.sanitize import clean_line
from qwen2_tui.fields import CHAT
from qwen2_tui.settings import ChatSettings, applied, preset_problem
from qwen2_tui.widgets.dialogs import Ask, Choice, Choose, Confirm

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_KEEP = "keep"


class Presets(OptionList):
    """A row for each; enter asks what to do with it, which is done at once."""

    DEFAULT_CSS = "Presets { height: 1fr; border: none; padding: 0; background: $background; &:focus { border: none; } }"

    class Used(Message):
        """This chat has the settings of a preset now."""

    def __init__(self) -> None:
        super().__init__(markup=False)

    def on_mount(self) -> None:
        """Fills it."""
        self.show()

    @property
    def _app(self) -> QwenApp:
        return cast("QwenApp", self.app)

    def show(self) -> None:
        """What there is now."""
        highlighted = self.highlighted
        self.clear_options()
        self.add_option(Option(Content("+ keep the settings of this chat as a preset"), id=_KEEP))
        for number, (name, preset) in enumerate(self._app.settings.presets.items()):
            said = Content(clean_line(name)) + Content.styled(f"\n  {summary(preset)}", "dim")
            self.add_option(Option(said, id=f"preset-{number}"))
        self.highlighted = highlighted if highlighted is not None and highlighted < self.option_count else 0

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option_id == _KEEP:
            self.app.push_screen(Ask("Keep as a preset", placeholder="its name", check=partial(self._name_problem, "")), self._keep)
            return
        name = list(self._app.settings.presets)[event.option_index - 1]
        choices = (
            Choice("chat", "use it in this chat"),
            Choice("new", "use it for every new chat"),
            Choice("over", "replace it with the settings of this chat"),
            Choice("rename", "rename it"),
            Choice("delete", "delete it"),
        )
        self.app.push_screen(Choose(name, choices, words=summary(self._app.settings.presets[name])), partial(self.do, name))

    def _name_problem(self, now: str, name: str) -> str:
        if name != now and name in self._app.settings.presets:
            return "There is a preset of that name."
        return preset_problem(name)

    def _keep(self, name: str | None) -> None:
        if name is not None:
            self._change(name, self._app.chat_screen.chat_settings)
            self._app.tell(f"Kept as {name}.")

    def do(self, name: str, what: str | None) -> None:
        """What was chosen for the preset `name`: a key of the choices, None for nothing."""
        app = self._app
        preset = app.settings.presets[name]
        match what:
            case "chat":
                app.chat_screen.change_chat(applied(preset, app.settings.chat))
                self.post_message(self.Used())
                app.tell(f"This chat has the settings of {name}.")
            case "new":
                app.change_settings(replace(app.settings, chat=applied(preset, app.settings.chat)))
                app.tell(f"Every new chat has the settings of {name}.")
            case "over":
                self._change(name, app.chat_screen.chat_settings)
            case "rename":
                app.push_screen(Ask("Rename the preset", name, check=partial(self._name_problem, name)), partial(self._rename, name))
            case "delete":
                app.push_screen(Confirm("Delete the preset?", name, yes="delete", grave=True), lambda yes: self._delete(name) if yes else None)

    def _rename(self, name: str, wanted: str | None) -> None:
        if wanted is not None and wanted != name:
            presets = {wanted if one == name else one: preset for one, preset in self._app.settings.presets.items()}
            self._app.change_settings(replace(self._app.settings, presets=presets))

    def _delete(self, name: str) -> None:
        presets = {one: preset for one, preset in self._app.settings.presets.items() if one != name}
        self._app.change_settings(replace(self._app.settings, presets=presets))

    def _change(self, name: str, preset: ChatSettings) -> None:
        self._app.change_settings(replace(self._app.settings, presets={**self._app.settings.presets, name: preset}))


def summary(preset: ChatSettings) -> str:
    """What it sets, in a line."""
    given = [(one, getattr(preset, one.name)) for one in CHAT]
    said = [f"{one.title} {clean_line(one.show(value))[:40]}" for one, value in given if value is not None and value is not False]
    return " · ".join(said) or "the model's own"
