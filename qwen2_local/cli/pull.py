"""`qwen2-local pull`: from a name to an installed model."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Literal, NoReturn

import click

from qwen2_local import fit
from qwen2_local.cli import output
from qwen2_local.cli.meter import Events, Meter
from qwen2_local.errors import BackendUnavailable, Cancelled, UsageError
from qwen2_local.sanitize import clean_line

if TYPE_CHECKING:
    from qwen2_converters.hub.choose import Way
    from qwen2_converters.pull_plan import PullPlan

_SHOWN_FILES = 6
_INDENT = 11


@click.command()
@click.argument("model")
@click.option("--to", "targets", multiple=True, metavar="TARGET", help="Fetch the original and convert it: gguf:q4_k_m, mlx:4bit … May be repeated.")
@click.option("--original", is_flag=True, help="Keep the original checkpoint, too (without --to: it alone).")
@click.option("--revision", default="", metavar="REV", help="A commit, branch or tag of the repository. Default: its newest.")
@click.option("--source", type=click.Choice(["huggingface", "modelscope"]), help="The hub to ask. Default: huggingface.")
@click.option("--name", default="", metavar="NAME", help="What to call it here. Default: as in the catalog, or after the repository.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the plan, and what is installed then.")
@click.option("--events", is_flag=True, help="Tell how far it is on stderr, one JSON object a line, for a program that shows it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--accept-licence", is_flag=True, help="Accept the model's licence, where it has to be accepted.")
@click.option("--discard-source", is_flag=True, help="With --to: delete each part of the original once it is converted, to need less disk.")
def pull(
    model: str,
    targets: tuple[str, ...],
    original: bool,
    revision: str,
    source: Literal["huggingface", "modelscope"] | None,
    name: str,
    dry_run: bool,
    as_json: bool,
    events: bool,
    yes: bool,
    accept_licence: bool,
    discard_source: bool,
) -> None:
    """Fetch MODEL and install it: 7b, 0.5b:q8_0, 7b-base, a hub's id (NAME/MODEL:q4_k_m), an address of a .gguf, or a file or folder.

    Takes what is quantized already where there is such, else converts the original. Stopped at any point, the same command goes on.
    """
    if discard_source and (original or not targets):
        raise click.UsageError("--discard-source is for --to, and not for --original, which keeps it.")
    from qwen2_converters.pull import carry_out, prepare
    from qwen2_converters.target import Target

    wanted = tuple(dict.fromkeys(Target.parse(target) for target in targets))
    with output.Status() as status:
        status.show(f"looking for {model}")
        plan = prepare(
            model,
            targets=wanted,
            original=original,
            revision=revision,
            source=source or "",
            install_as=name,
            discard_source=discard_source,
            backend=_backend(),
        )
    if not as_json:
        for line in _lines(plan):
            stream = sys.stdout if dry_run else sys.stderr
            print(output.wrap(clean_line(line), stream, indent=_INDENT), file=stream)
    if dry_run or plan.current:
        if as_json:
            _print_object(plan, "planned" if not plan.current else "current")
        if not dry_run:
            carry_out(plan)
        return
    _require_consent(plan, yes=yes, accepted=accept_licence)
    try:
        with Events() if events else Meter() as meter:
            made = carry_out(plan, progress=meter.step)
    except (KeyboardInterrupt, Cancelled):
        output.note(f"kept {output.gigabytes(plan.kept())}: the same command goes on, `qwen2-local rm {plan.draft}` frees it.")
        raise
    if as_json:
        _print_object(plan, "installed")
        return
    for manifest in made:
        output.note(f'{manifest.name} is installed: {output.gigabytes(manifest.size)}. Try `qwen2-local run {manifest.name} "Hello"`.')


def _backend() -> str:
    from qwen2_local import backends

    try:
        return backends.default_backend()
    except BackendUnavailable:
        return "llama.cpp"


def _require_consent(plan: PullPlan, *, yes: bool, accepted: bool) -> None:
    """Asks what has to be asked. Raises UsageError where nobody can be, click.Abort for a no."""
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if plan.licence_to_accept and not accepted:
        text = f"{plan.title} has the licence {plan.licence.name}: {plan.licence.url}"
        if not terminal:
            raise UsageError(f"{text}.", hint="Read it. If you accept it, say so with --accept-licence.")
        if not click.confirm(f"{clean_line(text)}\nDo you accept it?", default=False, err=True):
            _refuse()
    elif terminal and not yes:
        question = "Replace it by what the hub has now?" if plan.changed else "Go on?"
        if not click.confirm(question, default=plan.fits, err=True):
            _refuse()


def _refuse() -> NoReturn:
    output.note("Nothing was fetched.")
    raise click.Abort


# What is shown before


def _lines(plan: PullPlan) -> list[str]:
    if plan.current:
        names = " and ".join(model.name for model in plan.models)
        return [f"{names} is up to date ({plan.way.repository.id}{_commit(plan)})."]
    from qwen2_converters.hub.sources import NAMES

    shape = plan.shape
    facts = [plan.licence.name if plan.licence.id else "licence not stated"]
    facts += [f"{shape.parameters / 1e9:.2f} B parameters"] if shape.parameters else []
    facts += [f"{shape.context // 1024}K context"] if shape.context >= 1024 else []
    way = plan.way
    where = f"{NAMES[way.repository.source]}{_commit(plan)}"
    verified = "" if way.repository.source == "local" else ", verified by hash" if plan.source_hash else ", of no known hash"
    files = [file for file in way.files if file.name.endswith((".gguf", ".safetensors"))]
    small = [file for file in way.files if file not in files]
    shown = [f"{file.name}  {output.gigabytes(file.size)}" for file in files[:_SHOWN_FILES]]
    if len(files) > _SHOWN_FILES:
        shown.append(f"… and {len(files) - _SHOWN_FILES} more  {output.gigabytes(sum(file.size for file in files[_SHOWN_FILES:]))}")
    if small:
        shown.append(f"and {len(small)} small files  {output.gigabytes(sum(file.size for file in small))}")
    lines = [f"{plan.title}  {' · '.join(facts)}"]
    lines += [f"  {'plan' if not index else '':<8} {'fetch ' if not index else '      '}{text}" for index, text in enumerate(shown)]
    lines.append(f"  {'':<8} {output.gigabytes(way.fetched)} from {where}{verified}")
    if plan.here and way.repository.source != "local":
        lines.append(f"  {'':<8} of it {output.gigabytes(way.fetched - plan.fetch)} are here already, {output.gigabytes(plan.fetch)} to come")
    made = [f"{model.name} ({model.target})" for model in plan.models if model.target is not None]
    then = f"convert to {', '.join(made)}  {output.gigabytes(way.written)}" if made else "nothing to convert"
    lines.append(f"  {'':<8} {then}{_otherwise(plan.runner_up)}")
    for model in plan.models:
        if model.state == "changed":
            lines.append(f"  {'':<8} {model.name} is installed; its source has changed since, and it will be replaced")
    lines.append(f"  {'disk':<8} {output.gigabytes(plan.disk)} needed, {output.gigabytes(plan.disk_free)} free")
    lines.append(f"  {'memory':<8} {_memory(plan)}")
    if plan.speed and plan.fetch:
        lines.append(f"  {'time':<8} {_duration(plan.fetch / plan.speed)} at {plan.speed / 1e6:.1f} MB/s, as fast as the last pull")
    if plan.licence.to_accept:
        lines.append(f"  {'licence':<8} {plan.licence.name}, not a free one: {plan.licence.url}")
    return lines


def _memory(plan: PullPlan) -> str:
    total = f"of {plan.memory.total // 10**8 / 10:.1f} GB"
    verdict = "fits" if plan.fits else "does not fit well" if plan.memory_at(2048) < plan.memory.total else "does not fit"
    if not plan.shape.kv_values_per_token:
        return f"{fit.show_gb(plan.memory_at(0))} and what the context takes, {total}: {verdict}"
    longest = plan.shape.context
    contexts = sorted({min(8192, longest), min(32768, longest)})
    needs = ", ".join(f"{fit.show_gb(plan.memory_at(context))} at {_tokens(context)}" for context in contexts)
    return f"{needs} context, {total}: {verdict}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 else str(count)


def _commit(plan: PullPlan) -> str:
    revision = plan.way.repository.revision
    return f" at {revision[:8]}" if plan.way.repository.source in ("huggingface", "modelscope") and revision else ""


def _otherwise(way: Way | None) -> str:
    if way is None:
        return ""
    if way.targets:
        return f"  (--to {way.targets[0]} would fetch {output.gigabytes(way.fetched)} and write {output.gigabytes(way.written)})"
    return f"  ({way.repository.id}:{way.label} would be {output.gigabytes(way.fetched)})"


def _print_object(plan: PullPlan, status: str) -> None:
    from dataclasses import asdict

    way = plan.way
    contexts = sorted({min(8192, plan.shape.context), min(32768, plan.shape.context)} - {0})
    # ASCII: names and licences are a stranger's text, and may go to a terminal.
    print(json.dumps({
        "status": status,
        "title": plan.title,
        "source": way.repository.source,
        "repository": way.repository.id,
        "revision": way.repository.revision,
        "files": [asdict(file) for file in way.files],
        "models": [{"name": model.name, "target": str(model.target) if model.target else None, "state": model.state} for model in plan.models],
        "bytes": {"files": way.fetched, "to_fetch": plan.fetch, "to_convert": way.written, "disk_needed": plan.disk, "disk_free": plan.disk_free},
        "memory": {"at": {str(context): plan.memory_at(context) for context in contexts}, "total": plan.memory.total, "fits": plan.fits},
        "licence": {"id": plan.licence.id, "name": plan.licence.name, "url": plan.licence.url, "to_accept": plan.licence_to_accept},
        "speed": plan.speed,
    }))  # fmt: skip
