"""The lines of the models: what was begun, what is on this computer, and the ten Qwen2. Work on one is shown in its own line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from textual.binding import BindingType
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from qwen2_local.advice import Advice
from qwen2_tui import keys
from qwen2_tui.inventory import Installed, Inventory
from qwen2_tui.jobs import Job
from qwen2_tui.widgets.modelrows import installed_row, job_row, size_head, size_row

Row = Installed | Advice | Job
"""What a line stands for."""


class ModelList(OptionList):
    """Enter takes a line."""

    DEFAULT_CSS = """
    ModelList { height: 1fr; border: none; padding: 0 1; background: transparent;
        &:focus { border: none; background-tint: transparent; }
        & > .option-list--option { padding: 0; }
        & > .option-list--option-disabled { color: $text-muted; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [keys.bind("models.open", "select", show=True)]

    def __init__(self) -> None:
        super().__init__(markup=False)
        self.inventory: Inventory | None = None
        """None until it is known."""
        self._rows: dict[str, Row] = {}
        self._jobs: Mapping[str, Job] = {}
        self._used = ""

    @property
    def selected(self) -> Row | None:
        """What the selected line stands for."""
        option = self.highlighted_option
        return self._rows.get(option.id) if option is not None and option.id is not None else None

    def job_of(self, row: Row | None) -> Job | None:
        """The work on it that is worth a line: not a fetch that is over and well."""
        if row is None:
            return None
        job = self._jobs.get(row.model.name if isinstance(row, Advice) else row.name, row if isinstance(row, Job) else None)
        return job if job is not None and (job.state != "done" or job.kind == "verify") else None

    def show(self, inventory: Inventory, jobs: Mapping[str, Job], used: str) -> None:
        """All lines anew; the same one stays selected. used: the name of the model that chats."""
        before = self.highlighted_option.id if self.highlighted_option is not None else None
        self.inventory, self._jobs, self._used = inventory, jobs, used
        catalogued = {one.model.name for one in inventory.advices}
        named = {one.name for one in inventory.installed}
        begun = [job for job in jobs.values() if job.name not in catalogued | named and job.state in ("running", "paused", "failed")]
        self._rows = {
            **{f"job {job.name}": job for job in begun},
            **{f"model {one.name}": one for one in inventory.installed},
            **{f"size {one.model.name}": one for one in inventory.advices},
        }
        lines: list[Option] = []
        if begun:
            lines.append(_head("BEGUN"))
        for id, row in self._rows.items():
            if row is inventory.installed[0]:
                lines.append(_head("ON THIS COMPUTER"))
            if row is inventory.advices[0]:
                lines.append(Option(size_head(self._width), disabled=True))
            lines.append(Option(self._prompt(id), id=id))
        self.clear_options()
        self.add_options(lines)
        best = next((id for id, row in self._rows.items() if isinstance(row, Advice) and row.recommended), None)
        wanted = before if before in self._rows else best if len(inventory.installed) == 1 else None
        first = next(place for place, line in enumerate(lines) if not line.disabled)
        self.highlighted = self.get_option_index(wanted) if wanted is not None else first

    def show_job(self, job: Job, jobs: Mapping[str, Job]) -> None:
        """Draw the one line again that it is about."""
        self._jobs = jobs
        id = next((id for id in (f"model {job.name}", f"size {job.name}", f"job {job.name}") if id in self._rows), None)
        if id is not None:
            self.replace_option_prompt(id, self._prompt(id))

    def action_cursor_up(self) -> None:
        """Not around the end: the head of the list comes into view instead."""
        if self.highlighted == next((place for place, option in enumerate(self.options) if not option.disabled), 0):
            self.scroll_home(animate=False)
        else:
            super().action_cursor_up()

    @property
    def _width(self) -> int:
        return max(20, self.app.size.width - 4)

    def _prompt(self, id: str) -> Content:
        assert self.inventory is not None
        row, width = self._rows[id], self._width
        job = self.job_of(row)
        if isinstance(row, Installed) and (job is None or job.state == "done"):
            return installed_row(row, width, used=row.name == self._used, verified=job is not None)
        if isinstance(row, Advice) and job is None:
            return size_row(row, self.inventory, width)
        if job is None:
            assert isinstance(row, Job)
            job = row
        return job_row(job, width)


def _head(words: str) -> Option:
    return Option(Content.styled(f"  {words}", "$text-muted"), disabled=True)
