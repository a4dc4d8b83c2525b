"""The empty chat: a greeting, three things to try, and the model that would suit this machine. No wizard: one may just type.

It is also where an app without a model says why, and what can be done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from qwen2_local.sanitize import clean_line
from qwen2_tui.host import HostState
from qwen2_tui.model import DEFAULT

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_OF_GUIDE = ("What can you do?", "Which model fits my machine?", "What is quantization?")
_OF_OTHERS = (
    "Explain why the sky is blue, in three sentences.",
    "Write a Python function that finds the longest word in a text.",
    "Translate into Chinese: The river is quiet in the morning.",
)
_OTHER = ("models", "Choose another model")
_AFTER_FAILURE = (("again", "Try again"), ("guide", "Go on with the guide, which is always there"), _OTHER)
_AFTER_CRASH = (("again", "Start it again"), ("safe", "Start it in safe mode: slower, without special matrix code"), _OTHER)


class Choices(OptionList):
    """A few things to choose from; what is chosen last is not marked while one writes."""

    DEFAULT_CSS = """
    Choices {
        height: auto; max-height: 8; border: none; padding: 0; background: transparent; margin-bottom: 1;
        &:focus { border: none; background-tint: transparent; }
        & > .option-list--option { padding: 0 1; }
        & > .option-list--option-highlighted { background: transparent; color: $foreground; text-style: none; }
        &:focus > .option-list--option-highlighted { background: $primary 30%; text-style: bold; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "take it"),
        Binding("k", "cursor_up", show=False),
        Binding("j", "cursor_down", show=False),
    ]


class Welcome(VerticalScroll, can_focus=False):
    """What is shown instead of a conversation that has not begun. It follows the app's model by itself."""

    DEFAULT_CSS = """
    Welcome {
        width: 1fr; height: 1fr; align: center middle; padding: 0 2;
        & > * { width: 100%; max-width: 72; height: auto; }
        & > #greeting { text-style: bold; }
        & > #words { color: $text-muted; margin-bottom: 1; }
        & > #what { color: $text-muted; }
        & > #model { color: $text-muted; display: none; }
        &.-problem > #greeting { color: $text-error; }
    }
    """

    @dataclass
    class Picked(Message):
        """A person wants to begin with this question."""

        text: str

    def compose(self) -> ComposeResult:
        """Greeting, words, choices, and what is recommended."""
        yield Static(id="greeting", markup=False)
        yield Static(id="words", markup=False)
        yield Static(id="what", markup=False)
        yield Choices(id="choices", compact=True)
        yield Static(id="model", markup=False)

    def on_mount(self) -> None:
        """Follow the model."""
        self.watch(self.app, "host_state", self._show)
        self._recommend()

    def _show(self, state: HostState) -> None:
        greeting, words = said(state)
        self.set_class(state.phase == "failed", "-problem")
        self.query_one("#greeting", Static).update(greeting)
        self.query_one("#words", Static).update(words)
        choices = self.query_one("#choices", Choices)
        if state.phase == "failed":
            what, wanted = "What now", [Option(text, id) for id, text in (_AFTER_CRASH if state.crashed else _AFTER_FAILURE)]
        else:
            what, wanted = "Three things to try", [Option(text) for text in (_OF_GUIDE if _is_guide(state) else _OF_OTHERS)]
        self.query_one("#what", Static).update(what)
        if [option.prompt for option in wanted] != [option.prompt for option in choices.options]:
            choices.set_options(wanted)
            choices.highlighted = 0

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        app = cast("QwenApp", self.app)
        match event.option_id:
            case "again":
                app.host.restart(safe=app.host.state.wish.safe)
            case "safe":
                app.host.restart(safe=True)
            case "guide":
                app.switch_model(app.wish(DEFAULT))
            case "models":
                app.open_models()
            case _:
                self.post_message(self.Picked(str(event.option.prompt)))

    @work(thread=True)
    def _recommend(self) -> None:
        key = cast("QwenApp", self.app).key_of("app.models")
        words = recommendation(key)
        self.app.call_later(self._show_recommendation, words)

    def _show_recommendation(self, words: str) -> None:
        if self.is_attached:
            model = self.query_one("#model", Static)
            model.update(words)
            model.display = bool(words)


def said(state: HostState) -> tuple[str, str]:
    """The greeting, and a word on how things are."""
    name = clean_line(state.wish.name)
    if state.phase == "failed":
        return state.words, state.hint
    if _is_guide(state):
        greeting = "Hello. I am the guide, a small model that knows this program."
        words = "Ask me about it, or about Qwen2. Nothing that you write leaves this machine."
    else:
        greeting, words = f"{name} is here. Ask anything.", "Nothing that you write leaves this machine."
    if state.phase == "ready":
        return greeting, words
    if not _is_guide(state):
        greeting = f"{name} is on its way."
    return greeting, f"{state.words[:1].upper()}{state.words[1:]} … You can type already." if state.words else words


def recommendation(key: str) -> str:
    """What to fetch, if nothing was fetched yet; "" otherwise. key: opens the models. Looks at the disk, so it is for a thread."""
    from qwen2_local import advice, fit
    from qwen2_local.store import Store

    if any(one.manifest is not None for one in Store().list()):
        return ""
    best = advice.recommended(advice.here())
    if best is None:
        return f"This machine is too small for the other models. {key} shows what each needs."
    needs = f"{fit.show_gb(best.download)} to fetch · {fit.show_gb(best.memory)} of memory at {advice.CONTEXT:,} tokens"
    words = f"For real work: {best.model.title}, {best.level.upper()}\n{needs} · {best.model.size.licence.name}\n"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return f"{words}The network is switched off (HF_HUB_OFFLINE), so nothing is fetched. {key} shows what is here."
    return f"{words}{key} shows all sizes, and fetches while we go on chatting."


def _is_guide(state: HostState) -> bool:
    return state.wish.name.partition(":")[0] == DEFAULT
