"""What a fetch would do, asked of our own command line: `pull NAME --dry-run --json`. The one place that reads its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen2_local import fit
from qwen2_local.cli.output import gigabytes
from qwen2_local.sanitize import clean_line
from qwen2_tui.child import Child, Ended

_HUBS = {"huggingface": "Hugging Face", "modelscope": "ModelScope", "address": "its address", "local": "this computer"}


@dataclass(frozen=True, slots=True)
class Plan:
    """A fetch before it begins. Sizes in bytes. models: names of what will be installed, each with what it is converted to ("": as it comes).

    memory: needed at contexts of so many tokens. current: all of it is there; changed: what is there will be replaced.
    licence: its name; licence_to_accept: a person has to accept it first. speed: bytes a second of the last fetch, 0 if there was none.
    """

    name: str
    title: str
    source: str
    repository: str
    models: tuple[tuple[str, str], ...]
    files: int
    to_fetch: int
    to_convert: int
    disk: int
    disk_free: int
    memory: tuple[tuple[int, int], ...]
    memory_total: int
    fits: bool
    licence: str
    licence_url: str
    licence_to_accept: bool
    speed: int
    current: bool
    changed: bool

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """For a person: what, and how much of it."""
        where = _HUBS.get(self.source, self.source)
        here = f", of it {gigabytes(self.files - self.to_fetch)} are here already" if 0 < self.to_fetch < self.files else ""
        made = ", ".join(f"{name} ({target})" for name, target in self.models if target)
        contexts = ", ".join(f"{fit.show_gb(needed)} at {context // 1024}K" for context, needed in self.memory)
        verdict = "fits" if self.fits else "does not fit well"
        lines = [("fetch", f"{gigabytes(self.to_fetch)} from {where}: {self.repository}{here}")]
        if made:
            lines.append(("convert", f"to {made}, {gigabytes(self.to_convert)}"))
        lines.append(("disk", f"{gigabytes(self.disk)} needed, {gigabytes(self.disk_free)} free"))
        if contexts:
            lines.append(("memory", f"{contexts} context, of {self.memory_total // 10**8 / 10:.1f} GB: {verdict}"))
        if self.speed and self.to_fetch:
            minutes = self.to_fetch / self.speed / 60
            lines.append(("time", f"about {minutes:.0f} min" if minutes >= 1.5 else "about a minute"))
        lines.append(("licence", f"{self.licence or 'not stated'}  {self.licence_url}"))
        return tuple(lines)


def look_up(name: str, on_end: Callable[[Plan | None, str], None]) -> Child:
    """Asks the hub. on_end: gets the plan, or what went wrong and what to do, in a thread. The child may be stopped. Raises OSError."""

    def ended(how: Ended) -> None:
        if how.code == 0 and how.answer:
            try:
                on_end(read(name, how.answer), "")
            except (KeyError, TypeError, ValueError) as error:
                on_end(None, clean_line(f"The answer cannot be read: {error!r}"))
        else:
            on_end(None, how.words.removeprefix("error: ") or f"It ended with the exit code {how.code}.")

    return Child(["pull", "--dry-run", "--json", "--", name], on_end=ended)


def read(name: str, answer: Mapping[str, Any]) -> Plan:
    """The plan that `pull --json` printed. Raises KeyError, TypeError, ValueError for anything else."""
    sizes, memory, licence = answer["bytes"], answer["memory"], answer["licence"]
    return Plan(
        name=clean_line(name),
        title=clean_line(str(answer["title"])),
        source=clean_line(str(answer["source"])),
        repository=clean_line(str(answer["repository"])),
        models=tuple((clean_line(str(one["name"])), clean_line(str(one["target"] or ""))) for one in answer["models"]),
        files=int(sizes["files"]),
        to_fetch=int(sizes["to_fetch"]),
        to_convert=int(sizes["to_convert"]),
        disk=int(sizes["disk_needed"]),
        disk_free=int(sizes["disk_free"]),
        memory=tuple(sorted((int(context), int(needed)) for context, needed in memory["at"].items())),
        memory_total=int(memory["total"]),
        fits=bool(memory["fits"]),
        licence=clean_line(str(licence["name"] if licence["id"] else "")),
        licence_url=clean_line(str(licence["url"])),
        licence_to_accept=bool(licence["to_accept"]),
        speed=int(answer.get("speed") or 0),
        current=answer["status"] == "current",
        changed=any(one["state"] == "changed" for one in answer["models"]),
    )
