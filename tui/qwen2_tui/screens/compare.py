"""Two models, quantizations or settings on one prompt, beside each other; one after the other, so that each has the machine to itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static

from qwen2_local import fit
from qwen2_local.cli.output import gigabytes
from qwen2_local.errors import Cancelled, Qwen2LocalError, UsageError
from qwen2_local.sanitize import clean, clean_line
from qwen2_local.types import Message
from qwen2_tui import contest, inventory, keys
from qwen2_tui.contest import Contender, Result
from qwen2_tui.host import resident
from qwen2_tui.inventory import Installed
from qwen2_tui.live import LiveReply
from qwen2_tui.model import LoadWish, Model
from qwen2_tui.pace import LEAST, Pace
from qwen2_tui.widgets.composer import Composer
from qwen2_tui.widgets.dialogs import Ask, Choice, Choose
from qwen2_tui.widgets.side import Side
from qwen2_tui.widgets.topline import TopLine

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_log = logging.getLogger(__name__)
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
        self._loaded: dict[LoadWish, Model] = {}
        self._prompt, self._seed = "", contest.new_seed()
        self._pace = Pace()
        self._timer: Timer | None = None
        self._comparing = False
        self.rounds = 0
        """Comparisons that are over."""
        self._stop = threading.Event()
        self._memory = [0, 0]

    @property
    def qwen(self) -> QwenApp:
        """The app, in threads too, and when this is closed already."""
        return self._qwen

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
        self._qwen = cast("QwenApp", self.app)
        self._say_how()
        self.query_one(Composer).focus()
        self._look()

    def on_resize(self) -> None:
        """Side by side, or one above the other."""
        self.set_class(self.size.width < _STACKED_BELOW, "-stacked")

    def on_unmount(self) -> None:
        """What was loaded for this goes."""
        self._stop.set()
        for side in self.query(Side):
            if side.live is not None:
                side.live.stop()
        models, self._loaded = list(self._loaded.values()), {}
        threading.Thread(target=_close, args=(models,), name="qwen2-local closes", daemon=True).start()

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
        self._installed = tuple(one for one in installed if one.size is not None)
        mine = self.qwen.host.state.wish.name
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
        if self._comparing:
            self.qwen.tell("A comparison is under way: esc stops it.")
            return
        side = self.sides[place]
        before = side.contender or Contender("guide")
        mine = self.qwen.host.state.wish.name
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
        if not self._comparing:
            self._seed = contest.new_seed()
        self._prompt = self.query_one(Composer).text or self._prompt
        self._begin()

    def _begin(self) -> None:
        contenders = tuple(side.contender for side in self.sides)
        if self._comparing or not self._prompt.strip() or None in contenders:
            return
        if self.qwen.chat_screen.busy:
            self._say_how("A reply is being written in the chat, and would take half of the speed. Wait for its end, or stop it.", problem=True)
            return
        self._comparing = True
        self._stop.clear()
        for side in self.sides:
            side.clear()
        self._say_how()
        self._timer = self.set_interval(LEAST / 2, self._draw)
        # No thread that Textual would wait for at its end: loading cannot be broken off.
        threading.Thread(target=self._compete, args=(contenders, self._prompt, self._seed), name="qwen2-local compares", daemon=True).start()

    def _compete(self, contenders: tuple[Contender, Contender], prompt: str, seed: int) -> None:
        """In a thread: load what is missing, then one after the other."""
        problem = ""
        try:
            models = self._load(contenders)
            for side, contender, model in zip(self.sides, contenders, models, strict=True):
                if self._stop.is_set():
                    break
                self._ask(side, contender, model, prompt, seed)
        except Cancelled:
            pass
        except Qwen2LocalError as error:
            problem = str(error)
        except Exception as error:
            _log.exception("comparing")
            problem = f"{type(error).__name__}: {error}"
        finally:
            self.qwen.call_later(self._over, problem)

    def _load(self, contenders: tuple[Contender, Contender]) -> list[Model]:
        """The models of both; those of earlier comparisons that are no longer wanted go first. Raises DoesNotFit, and what loading raises."""
        wanted = [contender.wish for contender in contenders if self._hosted(contender) is None]
        for wish in [wish for wish in self._loaded if wish not in wanted]:
            self._loaded.pop(wish).close()
        missing = list(dict.fromkeys(wish for wish in wanted if wish not in self._loaded))
        if missing:
            contest.require_room(missing, fit.machine_memory(), contest.memory_of)
        for wish in missing:
            self.qwen.call_later(self._say_how, f"loading {wish.name} …")
            model = self.qwen.host.beside(wish, self._report)
            if self._stop.is_set():
                model.close()
                raise Cancelled("Stopped.")
            self._loaded[wish] = model
            # What is read for the first time comes from the disk: that is not the model's speed. No chat begins like this text.
            for _ in model.write(model.tokenizer.encode("Hi"), max_tokens=1, persist=False):
                pass
        self.qwen.call_later(self._say_how)
        return [self._hosted(contender) or self._loaded[contender.wish] for contender in contenders]

    def _hosted(self, contender: Contender) -> Model | None:
        """The chat's model, if it is that one."""
        host = self.qwen.host
        return host.model if host.state.phase == "ready" and not contender.loads and contender.name == host.state.wish.name else None

    def _report(self, what: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Cancelled("Stopped.")
        if total:
            self.qwen.call_later(self._say_how, f"{what} {done / total:.0%}")

    def _ask(self, side: Side, contender: Contender, model: Model, prompt: str, seed: int) -> None:
        """Waits for its end."""
        live = LiveReply(lambda tell: model.respond([Message("user", prompt)], seed=seed, persist=False, progress=tell, **contender.says))
        self.qwen.call_later(side.begin, live)
        over = False
        while not over:
            over = live.wait(0.2)
            if self._stop.is_set():
                live.stop()
            self._memory[side.place] = resident(model.pid) if model.pid is not None else 0
        self.qwen.call_later(self._ended, side)

    def _result(self, side: Side) -> Result:
        live, name = side.live, side.contender.name if side.contender is not None else ""
        if live is None:
            return Result()
        size = next((one.size or 0 for one in self._installed if one.name == name), 0)
        done = live.completion
        return Result(live.progress(), self._memory[side.place], size, _ENDS.get(done.finish_reason, "") if done is not None else "")

    def _draw(self) -> None:
        if self._pace.wait() == 0.0:
            self._pace.flushed()
            for side in self.sides:
                if side.live is not None and not side.live.over:
                    side.draw(self._result(side))

    def _ended(self, side: Side) -> None:
        if self.is_attached:
            side.end(self._result(side))

    def _over(self, problem: str) -> None:
        self._comparing = False
        self.rounds += 1
        if not self.is_attached:
            return
        if self._timer is not None:
            self._timer.stop()
        self._say_how(problem, problem=bool(problem))

    def action_back(self) -> None:
        """Stop; then close."""
        if not self.stop():
            self.dismiss()

    def stop(self) -> bool:
        """Ends the comparison that is under way. False: there is none."""
        if self._comparing:
            self._stop.set()
            self._say_how("stopping …")
        return self._comparing

    def _say_how(self, words: str = "", *, problem: bool = False) -> None:
        one = f" · {clean_line(self._prompt)}" if self._prompt else ""
        how = self.query_one("#how", Static)
        how.set_class(problem, "-problem")
        how.update(clean(words) or f"seed {self._seed} · one after the other: true speeds{one}")


def _close(models: list[Model]) -> None:
    for model in models:
        model.close()


def _fault(contender: Contender, text: str) -> str:
    try:
        contender.with_settings(text)
    except UsageError as error:
        return f"{error.what} {error.hint}".strip()
    return ""
