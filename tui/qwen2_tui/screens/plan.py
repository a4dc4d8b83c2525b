"""Before a fetch: what it would take, and its licence. Nothing has come yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from qwen2_local.sanitize import clean, clean_line
from qwen2_tui.plan import Plan

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp
    from qwen2_tui.child import Child


class PlanScreen(ModalScreen[Plan | None]):
    """Asks the hub what a fetch would be, shows it, and asks whether to go on: the plan, or None for a no.

    Whoever says yes where there is a licence to accept has accepted it: the button says so.
    """

    DEFAULT_CSS = """
    PlanScreen { align: center middle;
        #dialog {
            width: 88; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
            border: round $primary; background: $surface; border-title-color: $foreground; border-title-style: bold;
        }
        #buttons { height: 1; margin-top: 1; align-horizontal: right; }
        #buttons Button { margin-left: 2; min-width: 0; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "no"),
        Binding("y", "answer(True)", "yes"),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def __init__(self, name: str) -> None:
        super().__init__()
        self._wanted = clean_line(name)
        self._plan: Plan | None = None
        self._child: Child | None = None

    def compose(self) -> ComposeResult:
        """Words, and the two answers."""
        with VerticalScroll(id="dialog", can_focus=False) as dialog:
            dialog.border_title = Content(self._wanted).markup
            yield Static(f"Looking for {self._wanted} …", id="words", markup=False)
            with Horizontal(id="buttons"):
                yield Button(Content("Fetch · y"), id="yes", variant="primary", compact=True)
                yield Button(Content("Cancel · esc"), id="no", compact=True)

    def on_mount(self) -> None:
        """A process of its own asks, as a hub may take its time."""
        self.query_one("#yes").display = False
        self.query_one("#no").focus()
        try:
            self._child = cast("QwenApp", self.app).jobs.plan(self._wanted, self._answered)
        except OSError as error:
            self._looked_up(None, f"No process can be started: {error.strerror}.")

    def on_unmount(self) -> None:
        """Nobody waits any more."""
        if self._child is not None:
            self._child.stop()

    def _answered(self, plan: Plan | None, fault: str) -> None:
        """In a thread."""
        self.app.call_later(self._looked_up, plan, fault)

    def _looked_up(self, plan: Plan | None, fault: str) -> None:
        if not self.is_attached:
            return
        words = self.query_one("#words", Static)
        if plan is None:
            words.update(Content.styled(clean(fault), "$text-error"))
            return
        self.query_one("#dialog").border_title = Content(plan.title).markup
        words.update(_shown(plan))
        if plan.current:
            return
        self._plan = plan
        yes = self.query_one("#yes", Button)
        yes.display = True
        if plan.licence_to_accept:
            # Enter does not accept a licence by itself.
            yes.label = Content("I have read the licence and accept it: fetch · y")
        elif plan.fits and plan.disk <= plan.disk_free and not plan.changed:
            yes.focus()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.action_answer(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        """Leave with it; a yes needs a plan."""
        if answer and self._plan is None:
            return
        self.dismiss(self._plan if answer else None)


def _shown(plan: Plan) -> Content:
    if plan.current:
        return Content(f"{' and '.join(name for name, _ in plan.models)} is up to date: {plan.repository} has the same.")
    parts: list[tuple[str, str] | str] = []
    for what, text in plan.lines:
        parts += [(f"{what:<9}", "$text-muted"), f"{text}\n"]
    parts.append((f"It becomes {' and '.join(name for name, _ in plan.models)}.", "bold"))
    if plan.changed:
        parts.append(("\nWhat is installed under this name has changed at its source since, and will be replaced.", "$text-warning"))
    if plan.disk > plan.disk_free:
        parts.append(("\nThe disk has too little room for it: free some, or choose a smaller one.", "$text-error"))
    if not plan.fits:
        parts.append(("\nIt leaves this machine little memory, or none: a smaller size or fewer bits would run better.", "$text-warning"))
    if plan.licence_to_accept:
        parts.append(
            (f"\n{plan.licence} is not a free licence: it says what you may use the model for. Read it at the address above.", "$text-warning")
        )
    return Content.assemble(*parts)
