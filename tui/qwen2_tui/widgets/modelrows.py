"""One line for each model: what there is of it, what it needs and what this machine has. Pure: widths in, styled text out."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from textual.content import Content

from qwen2_local import fit
from qwen2_local.advice import CONTEXT, Advice, Verdict
from qwen2_local.cli.output import gigabytes
from qwen2_local.sanitize import clean_line
from qwen2_tui.inventory import Installed, Inventory
from qwen2_tui.jobs import Job

WIDE = 92
"""Cells from which there are two bars; from `MIDDLE` on there is one."""

MIDDLE = 70
_BAR = 8
_LONG_BAR = 20

VERDICTS: dict[Verdict, tuple[str, str]] = {
    "fits": ("fits", "$text-success"),
    "slow": ("fits, slow", "$text-warning"),
    "tight": ("tight", "$text-warning"),
    "disk": ("disk full", "$text-warning"),
    "large": ("too large", "$text-error"),
}
"""In words, and their colour."""


def bar(share: float, length: int) -> str:
    """How much of something: full is all of it, or more."""
    full = round(min(1.0, max(0.0, share)) * length)
    if share > 0:
        full = max(1, full)
    return "▓" * full + "░" * (length - full)


def size_row(one: Advice, inventory: Inventory, width: int) -> Content:
    """A Qwen2 that could be fetched, with bars for what it takes of this machine."""
    verdict, colour = VERDICTS[one.verdict]
    there = inventory.levels_of(one.model.name)
    if there:
        verdict, colour = f"✓ {' '.join(there)}", "$text-muted"
    star = "★ " if one.recommended else "  "
    memory = f"{bar(one.memory / inventory.memory.total, _BAR)} {fit.show_gb(one.memory):<8}"
    parts: list[tuple[str, str]] = [(star, "$text-accent"), (f"{one.model.name:<10}", "bold")]
    parts.append((f"{gigabytes(one.download):>9}  ", ""))
    if width >= WIDE:
        parts.append((f"{bar(one.disk / max(1, inventory.disk_free), _BAR)} {gigabytes(one.disk):<10}", _colour(one, "disk")))
    parts.append((f"{memory} ", _colour(one, "tight", "large")))
    if width >= MIDDLE:
        parts.append((f"{one.model.size.licence.name:<15} ", "$text-muted"))
    parts.append((verdict, colour))
    if one.recommended and not there and width >= WIDE:
        parts.append((" · recommended", "$text-accent"))
    return _line(parts, width)


def size_head(width: int) -> Content:
    """The columns of `size_row`."""
    disk = f"{'DISK':<{_BAR + 11}}" if width >= WIDE else ""
    licence = f"{'LICENCE':<16}" if width >= MIDDLE else ""
    return _line([(f"  {'QWEN2':<10}{'FETCH':>9}  {disk}{f'MEMORY {CONTEXT // 1024}K':<{_BAR + 10}}{licence}HERE", "$text-muted")], width)


def installed_row(one: Installed, width: int, *, used: bool, verified: bool = False) -> Content:
    """An installed model. used: it is the one that chats now. verified: it was read back, and is well."""
    context = f"{one.context // 1024}K" if one.context else ""
    size = gigabytes(one.size) if one.size is not None else ""
    name = max(12, min(28, width - 40))
    parts = [
        ("● " if used else "  ", "$text-success"),
        (set_cell_size(one.name, name), "bold"),
        (f" {size:>9}  {context:<6}", ""),
        (one.form, "$text-muted" if one.size is not None else "$text-error"),
        ("  ✓ verified" if verified else "", "$text-success"),
    ]
    return _line(parts, width)


def job_row(job: Job, width: int) -> Content:
    """Work that is under way, or was: in the place of the model's own line."""
    signs = {"running": ("▶ ", "$text-primary"), "paused": ("‖ ", "$text-warning"), "failed": ("✕ ", "$text-error")}
    sign, name = signs.get(job.state, ("✓ ", "$text-success")), clean_line(job.name)
    return _line([sign, (f"{name} ", "bold"), *_progress(job, width - 2 - cell_len(name) - 1)], width)


def about(one: Advice, found: Inventory) -> list[str]:
    """What there is to say of a Qwen2 before it is fetched, in lines."""
    size = one.model.size
    far = f", {size.yarn_context // 1024}K with YaRN" if size.yarn_context and one.model.instruct else ""
    kind = "" if one.model.instruct else " · base: it continues texts, and does not chat"
    head = f"{one.model.title} · {size.weights / 1e9:.2f} B parameters · {one.model.context // 1024}K context{far} · {size.licence.name}{kind}"
    contexts = ", ".join(f"{fit.show_gb(one.memory_at(context))} at {context // 1024}K" for context in (8192, 32768))
    verdicts = {
        "fits": "fits this machine." if not one.recommended else "runs well here: recommended.",
        "slow": "fits this machine, but reads slower than most people: a smaller one suits it better.",
        "tight": "loads, and leaves little memory for anything else.",
        "disk": f"fits the memory, but the disk has only {gigabytes(found.disk_free)} free.",
        "large": "is more than this machine has.",
    }
    lines = [head, f"memory {contexts} context, of {found.memory.total // 10**8 / 10:.1f} GB: {one.level} {verdicts[one.verdict]}"]
    made = "" if one.model.instruct else f": the original of {gigabytes(one.download)} is fetched, and converted to {gigabytes(one.size)}"
    lines.append(f"disk   {gigabytes(one.disk)} while it is fetched{made}; {gigabytes(found.disk_free)} free")
    return lines


def duration(seconds: float) -> str:
    """How long still: "2:18", "1:02:18"."""
    whole = int(seconds)
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    minutes = whole % 3600 // 60
    return f"{hours}{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _progress(job: Job, room: int) -> list[tuple[str, str]]:
    if job.state == "failed":
        return [(clean_line(job.words.partition("\n")[0]), "$text-error")]
    if job.state == "paused":
        kept = f"paused · {gigabytes(job.kept)}{f' of {gigabytes(job.total)}' if job.total else ''} kept · enter goes on"
        return [(kept if job.kept else "paused · enter goes on", "$text-warning")]
    if job.state != "running":
        return [(job.words or "done", "$text-success")]
    if not job.total or job.phase in ("looking", "stopping"):
        return [(f"{job.phase} …", "$text-primary")]
    share = min(1.0, job.done / job.total)
    amount = f" {share:4.0%}"
    more = [f"  {gigabytes(job.done)} of {gigabytes(job.total)}"]
    more += [f"  {job.speed / 1e6:.1f} MB/s"] if job.speed else []
    more += [f"  {duration(job.left_s)} left"] if job.left_s is not None else []
    more += [f" · {job.words}"] if job.words else []
    phase = "" if job.phase == "fetching" else f"{job.phase} "
    # What does not fit is left out: first the end, then what is done already; the bar takes what is left.
    while more and cell_len(phase + amount + "".join(more)) + 8 > room:
        more.pop(0 if len(more) > 1 and "of" in more[0] and room < 40 else -1)
    length = min(_LONG_BAR, max(4, room - cell_len(phase + amount + "".join(more)) - 1))
    full = round(share * length)
    return [(phase, ""), ("━" * full, "$text-primary"), ("─" * (length - full), "$text-muted"), (amount, "bold"), ("".join(more), "")]


def _colour(one: Advice, *bad: Verdict) -> str:
    return VERDICTS[one.verdict][1] if one.verdict in bad else ""


def _line(parts: list[tuple[str, str]], width: int) -> Content:
    return Content.assemble(*parts).truncate(max(1, width), ellipsis=True)
