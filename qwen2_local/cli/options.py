"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


def sampling_from(base: Sampling, temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling:
    """The model's own sampling with what was given on the command line. Raises InvalidSampling."""
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    return replace(base, **{name: value for name, value in given.items() if value is not None})
