"""Two models, quantizations or settings on one prompt, beside each other; one after the other, so that each has the machine to itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on, work
from textual.app import ComposeResult, SystemCommand
from textual.binding import BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static

from qwen2_local.cli.output import gigabytes
from qwen2_local.errors import Qwen2LocalError, UsageError
from qwen2_local.sanitize import clean, clean_line
from qwen2_tui import contest, inventory, keys
from qwen2_tui.comparing import Comparisons
from qwen2_tui.contest import Contender, Result
from qwen2_tui.inventory import Installed
from qwen2_tui.live import LiveReply
from qwen2_tui.pace import LEAST, Pace
from qwen2_tui.widgets.composer import Composer
from qwen2_tui.widgets.dialogs import Ask, Choice, Choose
from qwen2_tui.widgets.side import Side
from qwen2_tui.widgets.topline import TopLine

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_STACKED_BELOW = 80
_OTHER, _SETTINGS = "=other", "=settings"
_ENDS = {"length": "cut at max_tokens", "context": "the context is full", "cancelled": "stopped"}


class CompareScreen(Screen[None]):
    """See the module. The chat's model is used as it is; others are loaded beside it, and closed with this screen."""

    DEFAULT_CSS = """
    CompareScreen {
        #how { height: auto; max-height: 4; padding: 0 2; color: $text-muted; }
        #how.-problem { color: $text-warning; }
        #sides { layout: horizontal; height: 1fr; }
        &.-stacked #sides { layout: vertical; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        keys.bind("compare.models", "choose", show=True, priority=True),
        keys.bind("compare.again", "again", show=True, priority=True),
        keys.bind("app.back", "back"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._installed: tuple[Installed, ...] = ()
        self._prompt, self._seed = "", contest.new_seed()
        self._pace = Pace()
        self._timer: Timer | None = None
        self.rounds = 0
        """Comparisons that are over."""

    @property
    def qwen(self) -> QwenApp:
        """The app."""
        return cast("QwenApp", self.app)

    @property
    def sides(self) -> tuple[Side, Side]:
        """Left and right, or upper and lower."""
        return self.query_one("#side0", Side), self.query_one("#side1", Side)

    def compose(self) -> ComposeResult:
        """Two sides, and the prompt."""
        yield TopLine()
        yield Static("", id="how", markup=False)
        with Container(id="sides"):
            yield Side(0)
            yield Side(1)
        composer = Composer()
        composer.placeholder = "One prompt for both."
        yield composer
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """The chat's model, and the next best."""
        self._comparisons = Comparisons(self.qwen.host, self, self.app.call_later)
        self._say_how()
        self.query_one(Composer).focus()
        self._look()

    def on_resize(self) -> None:
        """Side by side, or one above the other."""
        self.set_class(self.size.width < _STACKED_BELOW, "-stacked")

    def on_unmount(self) -> None:
        """What was loaded for this goes."""
        self._comparisons.close()

    # Who

    @work(thread=True, exclusive=True, group="look")
    def _look(self) -> None:
        try:
            installed = inventory.take().installed
        except (Qwen2LocalError, OSError) as error:
            self.qwen.call_later(self.qwen.problem, error)
            installed = ()
        self.qwen.call_later(self._found, installed)

    def _found(self, installed: tuple[Installed, ...]) -> None:
        if not self.is_attached:
            return
        self._installed = tuple(one for one in installed if one.size is not None)
        mine = self.qwen.host.label
        others = [one.name for one in self._installed if one.name not in (mine, "guide")] or ["guide:q4_0" if mine == "guide" else "guide"]
        for side, name in zip(self.sides, (mine, others[0]), strict=True):
            if side.contender is None:
                side.name_it(Contender(name))

    def action_choose(self) -> None:
        """The first, then the second."""
        self._choose(0, lambda: self._choose(1, lambda: None))

    @on(Side.Wanted)
    def _wanted(self, event: Side.Wanted) -> None:
        self._choose(event.place, lambda: None)

    def _choose(self, place: int, then: Callable[[], None]) -> None:
        if self._comparisons.busy:
            self.qwen.tell("A comparison is under way: esc stops it.")
            return
        side = self.sides[place]
        before = side.contender or Contender("guide")
        mine = self.qwen.host.label
        choices = [Choice(one.name, one.name, self._note(one, mine)) for one in self._installed]
        choices.append(Choice(_OTHER, "another …", "a quantization of the guide (guide:q4_0), or a path"))
        choices.append(Choice(_SETTINGS, "its settings …", before.settings or "the model's own"))

        def chosen(key: str | None) -> None:
            if key == _OTHER:
                self.app.push_screen(Ask("Which model?", before.name), lambda name: take(replace(before, name=name) if name else None))
            elif key == _SETTINGS:
                words = "temperature=0.2 top_p=0.9 max_tokens=200, or kv_bits=8 backend=mlx context=8192. Empty: the model's own."
                self.app.push_screen(Ask(f"Settings of {before.name}", before.settings, words=words, check=lambda text: _fault(before, text)), set_up)
            elif key is not None:
                take(replace(before, name=key))

        def set_up(text: str | None) -> None:
            take(before.with_settings(text) if text is not None else None)

        def take(contender: Contender | None) -> None:
            if contender is not None:
                side.name_it(contender)
                then()

        where = ("left" if place == 0 else "right") if not self.has_class("-stacked") else ("upper" if place == 0 else "lower")
        self.app.push_screen(Choose(f"The {where} one", choices, chosen=before.name), chosen)

    def _note(self, one: Installed, mine: str) -> str:
        return f"{one.form} · {gigabytes(one.size or 0)}{' · loaded for the chat' if one.name == mine else ''}"

    # The comparison

    @on(Composer.Sent)
    def _sent(self, event: Composer.Sent) -> None:
        event.stop()
        self._prompt = event.text
        self._begin()

    def action_again(self) -> None:
        """The same prompt, with another seed."""
        if not self._comparisons.busy:
            self._seed = contest.new_seed()
        self._prompt = self.query_one(Composer).text or self._prompt
        self._begin()

    def _begin(self) -> None:
        first, second = (side.contender for side in self.sides)
        if self._comparisons.busy or not self._prompt.strip() or first is None or second is None:
            return
        if self.qwen.chat_screen.busy:
            self._say_how("A reply is being written in the chat, and would take half of the speed. Wait for its end, or stop it.", problem=True)
            return
        for side in self.sides:
            side.clear()
        self._say_how()
        self._timer = self.set_interval(LEAST / 2, self._draw)
        self._comparisons.begin((first, second), self._prompt, self._seed)

    def _result(self, side: Side) -> Result:
        live, name = side.live, side.contender.name if side.contender is not None else ""
        if live is None:
            return Result()
        size = next((one.size or 0 for one in self._installed if one.name == name), 0)
        done = live.completion
        return Result(live.progress(), self._comparisons.memory[side.place], size, _ENDS.get(done.finish_reason, "") if done is not None else "")

    def _draw(self) -> None:
        if self._pace.wait() == 0.0:
            self._pace.flushed()
            for side in self.sides:
                if side.live is not None and not side.live.over:
                    side.draw(self._result(side))

    # What is told of it

    def said(self, words: str) -> None:
        """What goes on."""
        if self.is_attached:
            self._say_how(words)

    def began(self, place: int, live: LiveReply) -> None:
        """A reply is on its way."""
        if self.is_attached:
            self.sides[place].begin(live)

    def ended(self, place: int) -> None:
        """A reply is over."""
        if self.is_attached:
            self.sides[place].end(self._result(self.sides[place]))

    def over(self, problem: str) -> None:
        """All is over."""
        self.rounds += 1
        if self.is_attached:
            if self._timer is not None:
                self._timer.stop()
            self._say_how(problem, problem=bool(problem))

    def commands(self) -> Iterable[SystemCommand]:
        """For the palette."""
        for id, title, act in (("compare.models", "Choose the two models", self.action_choose), ("compare.again", "Ask again", self.action_again)):
            yield SystemCommand(title, f"{keys.BY_ID[id].help} · {self.qwen.key_of(id)}", act)

    def action_back(self) -> None:
        """Stop; then close."""
        if not self.stop():
            self.dismiss()

    def stop(self) -> bool:
        """Ends the comparison that is under way. False: there is none."""
        busy = self._comparisons.busy
        if busy:
            self._comparisons.stop()
            self._say_how("stopping …")
        return busy

    def _say_how(self, words: str = "", *, problem: bool = False) -> None:
        one = f" · {clean_line(self._prompt)}" if self._prompt else ""
        how = self.query_one("#how", Static)
        how.set_class(problem, "-problem")
        how.update(clean(words) or f"seed {self._seed} · one after the other: true speeds{one}")


def _fault(contender: Contender, text: str) -> str:
    try:
        contender.with_settings(text)
    except UsageError as error:
        return f"{error.what} {error.hint}".strip()
    return ""
