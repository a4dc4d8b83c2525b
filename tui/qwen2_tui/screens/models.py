"""Models: those on this computer, and the Qwen2 that there are, with what each needs and what this machine has. Fetches go on while one chats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on, work
from textual.app import ComposeResult, SystemCommand
from textual.binding import BindingType
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static

from qwen2_local.advice import Advice
from qwen2_local.cli.output import gigabytes
from qwen2_local.errors import Qwen2LocalError
from qwen2_local.sanitize import clean, clean_line
from qwen2_tui import inventory, keys
from qwen2_tui.events import HostChanged, JobChanged
from qwen2_tui.inventory import Installed, Inventory
from qwen2_tui.jobs import Job
from qwen2_tui.screens.details import DetailsScreen
from qwen2_tui.screens.plan import PlanScreen
from qwen2_tui.widgets.dialogs import Ask, Confirm
from qwen2_tui.widgets.modellist import ModelList, Row
from qwen2_tui.widgets.modelrows import MIDDLE, about
from qwen2_tui.widgets.topline import TopLine

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

_SHORT = 26


class ModelsScreen(Screen[None]):
    """See the module."""

    DEFAULT_CSS = """
    ModelsScreen {
        #machine { height: 1; padding: 0 2; color: $text-muted; }
        #about { height: auto; min-height: 3; max-height: 9; padding: 0 2; border-top: solid $border-blurred; }
        &.-short #about { max-height: 5; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        keys.bind("models.pause", "pause", show=True),
        keys.bind("models.cancel", "cancel", show=True),
        keys.bind("models.fetch", "fetch_other", show=True),
        keys.bind("models.details", "details", show=True),
        keys.bind("models.verify", "verify", show=True),
        keys.bind("models.remove", "remove", show=True),
        keys.bind("models.compare", "compare", show=True),
    ]

    @property
    def qwen(self) -> QwenApp:
        """The app."""
        return cast("QwenApp", self.app)

    @property
    def lines(self) -> ModelList:
        """The lines, of which one is selected."""
        return self.query_one(ModelList)

    @property
    def selected(self) -> tuple[Row | None, Job | None]:
        """What the selected line stands for, and the work on it."""
        row = self.lines.selected
        return row, self.lines.job_of(row)

    def compose(self) -> ComposeResult:
        """The machine, the lines, and words on the selected one."""
        yield TopLine()
        yield Static("looking …", id="machine", markup=False)
        yield ModelList()
        yield Static("", id="about", markup=False)
        yield Footer(show_command_palette=False)

    # What there is

    def on_mount(self) -> None:
        """Look, in a thread."""
        self.lines.focus()
        self._look()

    @work(thread=True, exclusive=True, group="look")
    def _look(self) -> None:
        try:
            self.qwen.jobs.look()
            found = inventory.take()
        except (Qwen2LocalError, OSError) as error:
            self.app.call_later(self.qwen.problem, error)
            return
        self.app.call_later(self._found, found)

    def _found(self, found: Inventory) -> None:
        if not self.is_attached:
            return
        self._fill(found)

    def _fill(self, found: Inventory | None) -> None:
        self.set_class(self.size.height < _SHORT, "-short")
        if found is not None:
            whose = "This machine: " if self.size.width >= MIDDLE else ""
            memory = f"{found.memory.total // 10**8 / 10:.1f} GB of memory, {found.memory.available // 10**8 / 10:.1f} free"
            self.query_one("#machine", Static).update(f"{whose}{memory} · disk {gigabytes(found.disk_free)} free")
            self.lines.show(found, self.qwen.jobs.jobs, self.qwen.host.label)
            self._describe()

    def on_resize(self) -> None:
        """Columns come and go with the width."""
        self._fill(self.lines.inventory)

    def on_host_changed(self, event: HostChanged) -> None:
        """Another model chats."""
        self._fill(self.lines.inventory)

    def on_job_changed(self, event: JobChanged) -> None:
        """Draw the one line that changed; what was installed or freed changes more."""
        self.lines.show_job(event.job, self.qwen.jobs.jobs)
        self._describe()
        if event.job.state in ("done", "cancelled"):
            self._look()

    @on(OptionList.OptionHighlighted)
    def _describe(self) -> None:
        """Words on the selected one."""
        row, job = self.selected
        found = self.lines.inventory
        words = self.query_one("#about", Static)
        self.refresh_bindings()
        if row is None or found is None:
            words.update("")
        elif job is not None and job.words and job.state in ("failed", "done"):
            words.update(Content.styled(clean(job.words), "$text-error" if job.state == "failed" else "$text-success"))
        elif isinstance(row, Advice):
            words.update(Content("\n").join(map(Content, about(row, found))))
        elif isinstance(row, Installed):
            words.update(clean(row.form) if row.size is None else f"{row.name} · {row.form} · {gigabytes(row.size)} · context {row.context:,}")
        else:
            words.update(clean_line(f"{row.name} was begun, and is not finished."))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The footer shows what can be done with the selected one."""
        if action not in ("pause", "cancel", "details", "verify", "remove") or not self.is_mounted:
            return True
        row, job = self.selected
        if action in ("pause", "cancel"):
            fetch = job is not None and job.kind == "fetch" and job.state in ("running", "paused", "failed")
            return fetch or (action == "cancel" and job is not None and job.state == "running")
        if not isinstance(row, Installed) or (job is not None and job.state == "running"):
            return False
        return not row.built_in if action == "remove" else row.size is not None

    # What can be done

    def commands(self) -> Iterable[SystemCommand]:
        """For the palette: what can be done with the selected one."""
        row, job = self.selected
        name = clean_line(row.model.name if isinstance(row, Advice) else row.name) if row is not None else ""
        going = "Pause" if job is not None and job.state == "running" else "Go on with"
        for action, title in (
            ("pause", f"{going} the fetch of {name}"),
            ("cancel", f"Cancel the fetch of {name}"),
            ("fetch_other", "Fetch another model"),
            ("details", f"Details of {name}"),
            ("verify", f"Verify {name}"),
            ("remove", f"Remove {name}"),
        ):
            if self.check_action(action, ()):
                key = keys.BY_ID["models.fetch" if action == "fetch_other" else f"models.{action}"]
                yield SystemCommand(title, f"{key.help or key.words} · {self.qwen.key_of(key.id)}", getattr(self, f"action_{action}"))

    @on(OptionList.OptionSelected)
    def _take(self) -> None:
        row, job = self.selected
        if job is not None and job.kind == "fetch" and job.state in ("paused", "failed"):
            self.qwen.jobs.resume(job.name)
        elif job is not None and job.state == "running" and job.kind == "fetch":
            self.qwen.tell(f"{job.name} is on its way: {self.qwen.key_of('models.pause')} pauses it.")
        elif isinstance(row, Advice):
            self._plan(row.model.name)
        elif isinstance(row, Installed) and row.size is not None:
            self.qwen.switch_model(self.qwen.wish(row.name))
            self.qwen.show_chat()
        elif isinstance(row, Installed):
            self.qwen.tell(f"{row.name} cannot be used: {row.form}.", problem=True)

    def action_fetch_other(self) -> None:
        """Any model or level, by what `pull` understands."""
        row, _ = self.selected
        words = "7b:q8_0, NAME/MODEL:q4_k_m of a hub, the address of a .gguf file, or a path."
        value = row.model.name if isinstance(row, Advice) else ""
        self.app.push_screen(Ask("Fetch which model?", value, words=words), lambda name: self._plan(name) if name else None)

    def _plan(self, name: str) -> None:
        def answered(plan: object) -> None:
            if plan is not None:
                self.qwen.jobs.start(name, accept_licence=True)
                self._fill(self.lines.inventory)

        self.app.push_screen(PlanScreen(name), answered)

    def action_pause(self) -> None:
        """Pause what is under way, or go on with it."""
        _, job = self.selected
        if job is None or job.kind == "verify":
            return
        if job.state == "running":
            self.qwen.jobs.pause(job.name)
        else:
            self.qwen.jobs.resume(job.name)

    def action_cancel(self) -> None:
        """Give a fetch up, with what came of it; or stop a verification."""
        _, job = self.selected
        if job is None:
            return
        if job.kind == "verify":
            self.qwen.jobs.cancel(job.name)
            return
        size = job.kept or job.done
        words = f"{gigabytes(size)} that have come are deleted." if size else "Nothing has come yet."
        self._ask(f"Cancel fetching {job.name}?", words, lambda: self.qwen.jobs.cancel(job.name))

    def action_verify(self) -> None:
        """Read it back."""
        row, _ = self.selected
        if isinstance(row, Installed):
            self.qwen.jobs.verify(row.name)

    def action_compare(self) -> None:
        """Two models beside each other."""
        self.qwen.open_compare()

    @work(thread=True, exclusive=True, group="details")
    def action_details(self) -> None:
        """All that is known of it."""
        row, _ = self.selected
        if isinstance(row, Installed):
            try:
                facts = inventory.details(row.name)
            except (Qwen2LocalError, OSError) as error:
                self.app.call_later(self.qwen.problem, error)
            else:
                self.app.call_later(self.app.push_screen, DetailsScreen(row.name, facts))

    def action_remove(self) -> None:
        """Ask first, with what it frees."""
        row, _ = self.selected
        if not isinstance(row, Installed) or row.built_in:
            return
        if row.name == self.qwen.host.label:
            self.qwen.tell(f"{row.name} is in use here. Switch to another model first.", problem=True)
        else:
            self._ask_to_remove(row)

    @work(thread=True, exclusive=True, group="details")
    def _ask_to_remove(self, row: Installed) -> None:
        texts = inventory.kept_texts(row.name)
        beside = f", and {gigabytes(texts)} that it keeps of texts it has read" if texts else ""
        words = f"It frees {gigabytes(row.size) if row.size is not None else 'its files'}{beside}. Chats stay as they are."
        self.app.call_later(self._ask, f"Remove {row.name}?", words, lambda: self._remove(row.name))

    @work(thread=True, group="remove")
    def _remove(self, name: str) -> None:
        try:
            inventory.remove(name)
        except (Qwen2LocalError, OSError) as error:
            self.app.call_later(self.qwen.problem, error)
        self.app.call_later(self._look)

    def _ask(self, title: str, words: str, act: Callable[[], object]) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                act()

        self.app.push_screen(Confirm(clean_line(title), words, grave=True), answered)
