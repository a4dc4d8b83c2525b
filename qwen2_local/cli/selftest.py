"""`qwen2-local selftest`: one model on every backend and precision at hand, held against each other, with a report to attach to a bug."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2_local.cli import output
from qwen2_local.sanitize import clean_line

if TYPE_CHECKING:
    from qwen2_local.cli.trials import Comparison, Trial

_FAILED = 4
"""The exit code: a backend that computes wrongly."""


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--backend", type=click.Choice(["mlx", "llama.cpp"]), help="Only on this one.")
@click.option("--output", "folder", default=".", metavar="FOLDER", help="Where the report is put. Default: here.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, and write no file.")
@click.option("--force", is_flag=True, help="Load also what does not seem to fit into memory.")
def selftest(models: tuple[str, ...], backend: str | None, folder: str, as_json: bool, force: bool) -> None:
    """Try MODEL with fixed prompts on every backend and precision at hand, and compare tokens, log-probabilities and perplexities.

    "7b" is every level of it that is installed, "guide" six levels of the built-in model; several models are held against each other.
    Writes a report (Markdown and JSON) that holds nothing of yours. Exits with 4 if something is wrong.
    """
    from qwen2_local import backends
    from qwen2_local.cli import trials
    from qwen2_local.model import Qwen2

    if not as_json and not Path(folder).is_dir():
        raise click.UsageError(f"There is no folder {folder}.")
    chosen = trials.candidates(models, backends.available(), backend)
    # In a worker, a crash of native code is a finding and not the end.
    load = partial(Qwen2, worker=True, parallel=len(trials.PROMPTS), force=force)
    done: list[Trial] = []
    with output.Status() as status:
        for candidate in chosen:
            trial = trials.tried(candidate, load, lambda doing, label=candidate.label: status.show(f"{label}: {doing}"))  # type: ignore[misc]
            status.clear()
            done.append(trial)
            if not as_json:
                _print_trial(trial)
    sound = [trial for trial in done if not trial.error]
    comparisons = [trials.compared(sound[0], other) for other in sound[1:]]
    if not as_json:
        for comparison in comparisons:
            _print_comparison(comparison)
    passed = bool(sound) and all(trial.passed for trial in done) and all(comparison.passed for comparison in comparisons)
    report = _report(models, done, comparisons, passed)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        stem = Path(folder) / f"selftest-{_name(models)}-{time.strftime('%Y%m%d-%H%M%S')}"
        stem.with_suffix(".json").write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
        markdown = stem.with_suffix(".md")
        markdown.write_text(_markdown(report, done, comparisons, passed), "utf-8")
        failed = "Something is wrong: see the report, and attach it to a bug report." if sound else "Nothing could be tried."
        print("All is well." if passed else failed)
        output.note(f"{markdown}\n{stem.with_suffix('.json')}")
    sys.exit(0 if passed else _FAILED)


def _name(models: tuple[str, ...]) -> str:
    """For a file: letters, digits and dashes of the first model's name."""
    last = models[0].rstrip("/").rpartition("/")[2]
    return "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in last)[:40].strip("-") or "model"


def _print_trial(trial: Trial) -> None:
    mark = "skip" if trial.skipped else "ok" if trial.passed else "FAIL"
    facts = trial.error or (
        f"{trial.backend} · loaded in {trial.load_s:.1f} s · {trial.decode_tokens_per_s:.0f} tokens/s · perplexity {trial.perplexity or 0:.3f}"
    )
    print(clean_line(f"{mark:<5} {trial.candidate.label:<24} {facts}"), flush=True)
    for check in trial.checks:
        if not check.passed:
            print(clean_line(f"{'':<5} {'not tried' if check.passed is None else 'WRONG'}: {check.what}: {check.detail}"), flush=True)


def _print_comparison(comparison: Comparison) -> None:
    apart = sum(one.at is not None for one in comparison.partings.values())
    print(
        clean_line(
            f"{'ok' if comparison.passed else 'FAIL':<5} {comparison.other:<24} beside {comparison.reference}: {apart} of"
            f" {len(comparison.partings)} replies part · log-probabilities differ by {comparison.differing:.4f} · perplexity × {comparison.ratio:.4f}"
            f"{f' · {comparison.detail}' if comparison.detail else ''}"
        )
    )


def _report(models: tuple[str, ...], done: list[Trial], comparisons: list[Comparison], passed: bool) -> dict[str, Any]:
    return {
        "passed": passed,
        "models": [_name((model,)) for model in models],
        "machine": _machine(),
        "trials": [{"passed": trial.passed, "perplexity": trial.perplexity, **asdict(trial)} for trial in done],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _machine() -> dict[str, object]:
    """What matters of this machine, and nothing that names its user."""
    import platform

    from qwen2_local import __version__, cpu, fit

    return {
        "program": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": cpu.name(),
        "cores": cpu.cores(),
        "features": sorted(cpu.features()),
        "memory": fit.machine_memory().total,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _markdown(report: dict[str, Any], done: list[Trial], comparisons: list[Comparison], passed: bool) -> str:
    machine = report["machine"]
    lines = [
        f"# Self-test: {'passed' if passed else 'FAILED'}",
        "",
        f"qwen2-local {machine['program']}, Python {machine['python']}, {machine['system']}, {machine['processor']} ({machine['cores']} cores),"
        f" {machine['memory'] / 1e9:.1f} GB, {machine['time']}",
        "",
        "| model | bits | backend | load | tokens/s | perplexity | |",
        "|---|---|---|---|---|---|---|",
    ]
    for trial in done:
        row = (
            trial.candidate.label, f"{trial.candidate.bits:g}", f"{trial.backend} {trial.version}", f"{trial.load_s:.1f} s",
            f"{trial.decode_tokens_per_s:.1f}", f"{trial.perplexity or 0:.4f}", trial.error or ("ok" if trial.passed else "FAILED"),
        )  # fmt: skip
        lines.append(_row(row))
    for trial in done:
        lines += ["", f"## {_cell(trial.candidate.label)}", "", *(f"- {_cell(note)}" for note in trial.notes)]
        lines += ["", "| check | | |", "|---|---|---|"]
        lines += [_row((check.what, {True: "ok", False: "WRONG", None: "not tried"}[check.passed], check.detail)) for check in trial.checks]
        lines += ["", "| prompt | reply |", "|---|---|", *(_row((name, reply.text)) for name, reply in trial.replies.items())]
    if comparisons:
        lines += ["", f"## Beside {_cell(comparisons[0].reference)}", "", "| model | prompt | |", "|---|---|---|"]
        for comparison in comparisons:
            lines += [_row((comparison.other, name, str(one))) for name, one in comparison.partings.items()]
            summary = f"log-probabilities of texts differ by {comparison.differing:.4f}, perplexity × {comparison.ratio:.4f}"
            lines.append(_row((comparison.other, "all texts", f"{'ok' if comparison.passed else 'FAILED'}: {comparison.detail or summary}")))
    return "\n".join(lines) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    return clean_line(text).replace("|", "\\|").replace("<", "&lt;")
