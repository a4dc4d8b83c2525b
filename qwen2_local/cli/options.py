"""Options that several commands share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from qwen2_local.types import Sampling

_COUNT = click.IntRange(min=1)
_SHARED = [
    click.option("--system", help="The system message. Default: Qwen2's own."),
    click.option("--temperature", type=float, help="0 is greedy. Default: the model's own, as for the next three."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
    click.option("--top-k", type=int, help="Keep so many of the likeliest tokens; 0 is off."),
    click.option("--seed", type=int, help="The same seed gives the same reply."),
    click.option("--max-tokens", type=_COUNT, metavar="N", help="The longest reply, in tokens. Default: what the context holds."),
    click.option("--context", type=_COUNT, metavar="N", help="Tokens of prompt and reply together. Default: 8192, or what the model has."),
    click.option("--backend", type=click.Choice(["mlx", "llama.cpp"]), help="Default: what fits the machine and the file."),
]


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds them to a command."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


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
    click.option("--logprobs", type=click.IntRange(0, 100), metavar="N", help="Also give log-probabilities, and those of the N likeliest tokens."),
]


def wishes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say how to reply. The command gets what was given of them as one mapping, `wishes`: `Options` of the API."""

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        asked = {name: given.pop(name) for name in _NAMES}
        return command(**given, wishes={name: value for name, value in asked.items() if value not in (None, ())})

    for option in reversed(_REPLY):
        called = option(called)
    return called


_NAMES = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "stop",
    "schema", "regex", "choice", "logprobs",
)  # fmt: skip


def sampling_from(base: Sampling, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling:
    """The model's own sampling with what was given on the command line. Raises InvalidSampling."""
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    return replace(base, **{name: value for name, value in given.items() if value is not None})
