"""Models: those on this computer, and the Qwen2 that there are, with what each needs and what this machine has. Fetches go on while one chats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, cast

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from qwen2_local import fit
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
from qwen2_tui.widgets.modelrows import installed_row, job_row, size_head, size_row
from qwen2_tui.widgets.topline import TopLine

if TYPE_CHECKING:
    from qwen2_tui.app import QwenApp

Row = Installed | Advice | Job
"""What a line stands for."""


class ModelList(OptionList):
    """The lines. Enter takes one."""

    DEFAULT_CSS = """
    ModelList { height: 1fr; border: none; padding: 0 1; background: transparent;
        &:focus { border: none; background-tint: transparent; }
        & > .option-list--option { padding: 0; }
        & > .option-list--option-disabled { color: $text-muted; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [keys.bind("models.open", "select", show=True)]

    def action_cursor_up(self) -> None:
        """Not around the end: the head of the list comes into view instead."""
        first = next((place for place, option in enumerate(self.options) if not option.disabled), 0)
        if self.highlighted == first:
            self.scroll_home(animate=False)
        else:
            super().action_cursor_up()


class ModelsScreen(Screen[None]):
    """See the module."""

    DEFAULT_CSS = """
    ModelsScreen {
        #machine { height: 1; padding: 0 2; color: $text-muted; }
        #about { height: auto; min-height: 3; max-height: 9; padding: 0 2; border-top: solid $border-blurred; }
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

    def __init__(self) -> None:
        super().__init__()
        self._inventory: Inventory | None = None
        self._rows: dict[str, Row] = {}
        self._drawn = 0

    @property
    def qwen(self) -> QwenApp:
        """The app."""
        return cast("QwenApp", self.app)

    def compose(self) -> ComposeResult:
        """The machine, the lines, and words on the selected one."""
        yield TopLine()
        yield Static("looking …", id="machine", markup=False)
        yield ModelList(markup=False)
        yield Static("", id="about", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Look, in a thread."""
        self._look()

    # What there is

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
        self._inventory = found
        memory = f"{found.memory.total // 10**8 / 10:.1f} GB of memory, {found.memory.available // 10**8 / 10:.1f} free"
        self.query_one("#machine", Static).update(f"This machine: {memory} · {gigabytes(found.disk_free)} of disk free")
        self._fill()

    def on_resize(self) -> None:
        """Columns come and go with the width."""
        if self._inventory is not None and self._drawn != self.size.width:
            self._fill()

    def on_host_changed(self, event: HostChanged) -> None:
        """Another model chats."""
        if self._inventory is not None:
            self._fill()

    def on_job_changed(self, event: JobChanged) -> None:
        """Draw the one line that changed; what was installed or freed changes more."""
        if event.job.state in ("done", "cancelled"):
            self._look()
        options = self.query_one(ModelList)
        id = self._line_of(event.job)
        if self._inventory is None or id is None:
            return
        if isinstance(self._rows.get(id), Job):
            self._rows[id] = event.job
        options.replace_option_prompt(id, self._prompt(id))
        if options.highlighted_option is not None and options.highlighted_option.id == id:
            self._describe()

    def _fill(self) -> None:
        """All lines anew; the same one stays selected."""
        assert self._inventory is not None
        options = self.query_one(ModelList)
        before = options.highlighted_option.id if options.highlighted_option is not None else None
        self._drawn = self.size.width
        width = self._line_width
        catalogued = {one.model.name for one in self._inventory.advices}
        named = {one.name for one in self._inventory.installed}
        begun = [job for job in self.qwen.jobs.jobs.values() if job.name not in catalogued | named and job.state != "cancelled"]
        self._rows = {
            **{f"job {job.name}": job for job in begun},
            **{f"model {one.name}": one for one in self._inventory.installed},
            **{f"size {one.model.name}": one for one in self._inventory.advices},
        }
        lines: list[Option] = []
        if begun:
            lines.append(Option(Content.styled("  BEGUN", "$text-muted"), disabled=True))
        for id, row in self._rows.items():
            if isinstance(row, Installed) and row.built_in:
                lines.append(Option(Content.styled("  ON THIS COMPUTER", "$text-muted"), disabled=True))
            if isinstance(row, Advice) and row is self._inventory.advices[0]:
                lines.append(Option(size_head(width), disabled=True))
            lines.append(Option(self._prompt(id), id=id))
        options.clear_options()
        options.add_options(lines)
        best = next((id for id, row in self._rows.items() if isinstance(row, Advice) and row.recommended), None)
        wanted = before if before in self._rows else best if len(self._inventory.installed) == 1 else None
        options.highlighted = options.get_option_index(wanted) if wanted is not None else next(
            (place for place, line in enumerate(lines) if not line.disabled), None
        )  # fmt: skip
        if not options.has_focus:
            options.focus()
        self._describe()

    @property
    def _line_width(self) -> int:
        return max(20, self.size.width - 4)

    def _prompt(self, id: str) -> Content:
        assert self._inventory is not None
        row, width = self._rows[id], self._line_width
        job = self._job_of(row)
        if job is not None:
            return job_row(job, width)
        if isinstance(row, Advice):
            return size_row(row, self._inventory, width)
        assert isinstance(row, Installed)
        return installed_row(row, width, used=row.name == self._used)

    @property
    def _used(self) -> str:
        """The model that chats now, by the name that it has in the list."""
        name = self.qwen.host.state.wish.name.lower()
        names = [one.name for one in self._inventory.installed] if self._inventory is not None else []
        ours = [one for one in names if one.startswith(f"{name}:")]
        return name if name in names else ours[0] if len(ours) == 1 else name

    def _line_of(self, job: Job) -> str | None:
        return next((id for id in (f"model {job.name}", f"size {job.name}", f"job {job.name}") if id in self._rows), None)

    def _job_of(self, row: Row) -> Job | None:
        """The work on it that is worth a line: not what is over and well."""
        if isinstance(row, Job):
            return self.qwen.jobs.jobs.get(row.name, row)
        job = self.qwen.jobs.jobs.get(row.name if isinstance(row, Installed) else row.model.name)
        return job if job is not None and (job.state != "done" or job.kind == "verify") else None

    @property
    def _selected(self) -> Row | None:
        option = self.query_one(ModelList).highlighted_option
        return self._rows.get(option.id) if option is not None and option.id is not None else None

    # Words on the selected one

    @on(OptionList.OptionHighlighted)
    def _describe(self) -> None:
        row = self._selected
        about = self.query_one("#about", Static)
        self.refresh_bindings()
        if row is None or self._inventory is None:
            about.update("")
            return
        job = self._job_of(row)
        if job is not None and job.words and job.state in ("failed", "done"):
            about.update(Content.styled(clean(job.words), "$text-error" if job.state == "failed" else "$text-success"))
        elif isinstance(row, Advice):
            about.update(Content("\n").join(map(Content, _about(row, self._inventory))))
        elif isinstance(row, Installed):
            about.update(clean(row.form) if row.size is None else f"{row.name} · {row.form} · {gigabytes(row.size)} · context {row.context:,}")
        else:
            about.update(f"{row.name} was begun, and not finished.")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The footer shows what can be done with the selected one."""
        if action not in ("pause", "cancel", "details", "verify", "remove"):
            return True
        row = self._selected
        job = self._job_of(row) if row is not None else None
        if action in ("pause", "cancel"):
            return job is not None and job.state in ("running", "paused", "failed") and (job.kind == "fetch" or job.state == "running")
        usable = isinstance(row, Installed) and (job is None or job.state != "running")
        if action == "remove":
            return usable and isinstance(row, Installed) and not row.built_in
        return usable and isinstance(row, Installed) and row.size is not None

    # What can be done

    @on(OptionList.OptionSelected)
    def _take(self) -> None:
        row = self._selected
        if row is None:
            return
        job = self._job_of(row)
        if job is not None and job.kind == "fetch" and job.state in ("paused", "failed"):
            self.qwen.jobs.resume(job.name)
        elif job is not None and job.state == "running":
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
        row = self._selected
        value = row.model.name if isinstance(row, Advice) else ""
        words = "7b:q8_0, NAME/MODEL:q4_k_m of a hub, the address of a .gguf file, or a path."
        self.app.push_screen(Ask("Fetch which model?", value, words=words), lambda name: self._plan(name) if name else None)

    def _plan(self, name: str) -> None:
        def answered(plan: object) -> None:
            if plan is not None:
                self.qwen.jobs.start(name, accept_licence=True)
                self._fill()

        self.app.push_screen(PlanScreen(name), answered)

    def action_pause(self) -> None:
        """Pause what is under way, or go on with it."""
        row = self._selected
        job = self._job_of(row) if row is not None else None
        if job is not None and job.state == "running":
            self.qwen.jobs.pause(job.name)
        elif job is not None and job.kind == "fetch":
            self.qwen.jobs.resume(job.name)

    def action_cancel(self) -> None:
        """Give a fetch up, with what came of it; or stop a verification."""
        row = self._selected
        job = self._job_of(row) if row is not None else None
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
        row = self._selected
        if isinstance(row, Installed):
            self.qwen.jobs.verify(row.name)

    def action_compare(self) -> None:
        """Two models beside each other."""
        self.qwen.open_compare()

    @work(thread=True, exclusive=True, group="details")
    def action_details(self) -> None:
        """All that is known of it."""
        row = self._selected
        if not isinstance(row, Installed):
            return
        try:
            facts = inventory.details(row.name)
        except (Qwen2LocalError, OSError) as error:
            self.app.call_later(self.qwen.problem, error)
            return
        self.app.call_later(self.app.push_screen, DetailsScreen(row.name, facts))

    @work(thread=True, exclusive=True, group="details")
    def action_remove(self) -> None:
        """Ask first, with what it frees."""
        row = self._selected
        if not isinstance(row, Installed) or row.built_in:
            return
        if row.name == self._used:
            self.app.call_later(self.qwen.tell, f"{row.name} is in use here. Switch to another model first.", problem=True)
            return
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


def _about(one: Advice, found: Inventory) -> list[str]:
    """What there is to say of a Qwen2 before it is fetched."""
    size = one.model.size
    far = f", {size.yarn_context // 1024}K with YaRN" if size.yarn_context and one.model.instruct else ""
    kind = "" if one.model.instruct else " · base: it continues texts, and does not chat"
    head = f"{one.model.title} · {size.weights / 1e9:.2f} B parameters · {one.model.context // 1024}K context{far} · {size.licence.name}{kind}"
    contexts = ", ".join(f"{fit.show_gb(one.memory_at(context))} at {context // 1024}K" for context in (8192, 32768))
    verdicts = {
        "fits": "fits this machine.",
        "slow": "fits this machine, but reads slower than most people: a smaller one suits it better.",
        "tight": "loads, and leaves little memory for anything else.",
        "disk": f"fits the memory, but the disk has only {gigabytes(found.disk_free)} free.",
        "large": "is more than this machine has.",
    }
    lines = [head, f"memory {contexts} context, of {found.memory.total // 10**8 / 10:.1f} GB: {one.level} {verdicts[one.verdict]}"]
    made = "" if one.model.instruct else f": the original of {gigabytes(one.download)} is fetched, and converted to {gigabytes(one.size)}"
    lines.append(f"disk   {gigabytes(one.disk)} while it is fetched{made}; {gigabytes(found.disk_free)} free")
    if one.recommended:
        lines.append("★ The largest that fits this machine and runs well: recommended.")
    return lines
