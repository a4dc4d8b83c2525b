"""Options that several commands share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

_COUNT = click.IntRange(min=1)

system = click.option("--system", metavar="TEXT", help="The system message. Default: the model's own.")


def _number(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else int(value)


def _schema(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """A JSON schema: itself, or a file (`@FILE`, or FILE where it cannot be JSON)."""
    if value is None:
        return None
    text, where = value, "the text"
    try:
        if not value.lstrip().startswith("{") and value.strip() not in ("true", "false"):
            where = value.removeprefix("@")
            with Path(where).open("rb") as file:
                text = file.read(_MOST_SCHEMA + 1).decode("utf-8-sig")
        if len(text) > _MOST_SCHEMA:
            raise click.BadParameter(f"{where} is too large for a JSON schema.")
        return json.loads(text)
    except OSError as error:
        raise click.BadParameter(f"{where}: {error.strerror or error}. Give a JSON schema, or a file that holds one.") from error
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{where} is no JSON: {str(error)[:100]}.") from error


_MOST_SCHEMA = 1 << 20
_REPLY = [
    click.option("--temperature", type=float, help="0 is greedy. Default: the model's own, as for the others down to --frequency-penalty."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
    click.option("--top-k", type=int, help="Keep so many of the likeliest tokens; 0 is off."),
    click.option("--min-p", type=float, help="Keep tokens at least so likely, beside the likeliest one; 0 is off."),
    click.option("--repetition-penalty", type=float, help="Make tokens that came before less likely; 1 is off."),
    click.option("--presence-penalty", type=float, help="Take this from the tokens of the reply so far; 0 is off."),
    click.option("--frequency-penalty", type=float, help="Take this from them for each time they came; 0 is off."),
    click.option("--seed", type=int, help="The same seed gives the same reply."),
    click.option("--max-tokens", type=_COUNT, metavar="N", help="The longest reply, in tokens. Default: what the context holds."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the reply before this text. May be given several times."),
    click.option("--schema", callback=_schema, metavar="JSON|FILE", help="Reply in JSON that fits this JSON schema, or the one in this file."),
    click.option("--regex", metavar="PATTERN", help="Reply with text that this regular expression matches as a whole."),
    click.option("--choice", multiple=True, metavar="TEXT", help="Reply with one of these texts. Give it once for each."),
    click.option(
        "--lookup", is_flag=True, default=None, help="Draft tokens from the text itself: the same reply, faster where it repeats something."
    ),
]
_LOAD = [
    click.option("--context", type=_COUNT, metavar="N", help="Tokens of prompt and reply together. Default: what the model and the memory allow."),
    click.option("--backend", type=click.Choice(["mlx", "llama.cpp"]), help="Default: what fits the machine and the file."),
    click.option("--draft", metavar="MODEL", help="A smaller model of the same family drafts: the same reply, faster."),
    click.option("--adapter", metavar="PATH", help="Put this LoRA adapter on the model."),
    click.option(
        "--kv-bits",
        type=click.Choice(["16", "8"]),
        callback=_number,
        help="Keep keys and values in 8 bits: half the memory, a little noise. Default: 16.",
    ),
    click.option("--no-kv-cache", "kv_cache", is_flag=True, flag_value=False, default=None, help="Keep nothing of this text on the disk."),
    click.option("--force", is_flag=True, default=None, help="Load it also where it does not seem to fit into memory."),
]
_WORKER = click.option("--worker", is_flag=True, default=None, help="Run the model in a process of its own, so that its crash is only an error.")


def wishes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say how to reply. The command gets what was given of them as one mapping, `wishes`: `Options` of the API."""
    return _together(command, "wishes", _REPLY)


def loads(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say how to load a model. The command gets what was given of them as one mapping, `loads`: arguments of `Qwen2`."""
    return _together(command, "loads", [*_LOAD, _WORKER])


def loads_apart(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a command that always runs the model in a process of its own."""
    return _together(command, "loads", _LOAD)


def _together(command: Callable[..., Any], argument: str, options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    known = set(getattr(command, "__click_params__", ()))
    names: list[str] = []

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        asked = {name: given.pop(name) for name in names}
        return command(**given, **{argument: {name: value for name, value in asked.items() if value not in (None, ())}})

    for option in reversed(options):
        called = option(called)
    names += [one.name for one in called.__dict__["__click_params__"] if one not in known]
    return called
