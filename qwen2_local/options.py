"""What a caller may ask of one reply: the keyword arguments of `ask`, `stream`, `respond`, `complete`, `map` and their async twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from qwen2_local.errors import UsageError
from qwen2_local.types import Sampling

if TYPE_CHECKING:
    from qwen2_local.grammar import Spec

Progress = Callable[[int, int], None]
"""Called while a prompt is read: tokens done, tokens in all."""

_MOST_LOGPROBS = 100
_OF_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window", "logit_bias", "seed",
)  # fmt: skip


class Wishes(TypedDict, total=False):
    """Options of every method. All may be left out. The first group says how to sample; what is not given is the model's own.

    sampling: a whole `Sampling` instead of the model's own; what else is given changes that one.
    max_tokens: the longest reply. stop: strings that end the reply, and are no part of it.
    regex, choice: a pattern that the reply has to match, or the texts to choose from.
    logprobs: also give log-probabilities, and those of so many of the likeliest tokens. lookup: draft tokens from what the conversation
    itself says; the reply is the same, faster where it repeats something. persist: may its KV be kept on the disk?
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    penalty_window: int | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    sampling: Sampling | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    regex: str | None
    choice: Sequence[str] | None
    logprobs: int | None
    lookup: bool
    persist: bool


class Options(Wishes, total=False):
    """And those of methods that give a `Stream`.

    schema: a JSON schema, or a pydantic model, that the reply has to fit. progress: told while the prompt is read.
    """

    schema: Any
    progress: Progress | None


_KNOWN = Options.__required_keys__ | Options.__optional_keys__


@dataclass(frozen=True, slots=True)
class Settled:
    """Options with everything decided. form: what the reply has to look like, if anything."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    form: Spec | None
    logprobs: int | None
    lookup: bool
    persist: bool
    progress: Progress | None


def settle(own: Sampling, **options: Unpack[Options]) -> Settled:
    """own: the model's sampling. Raises UsageError, InvalidSampling, and UnsupportedSchema for a schema that cannot be kept to."""
    for name in options:
        if name not in _KNOWN:
            near = get_close_matches(name, _KNOWN, 1)
            raise UsageError(f"There is no option {name!r}.", hint=f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(_KNOWN))}.")
    sampling = options.get("sampling") or own
    given: dict[str, Any] = {name: value for name in _OF_SAMPLING if (value := options.get(name)) is not None}
    if given:
        sampling = replace(sampling, **given)
    return Settled(
        sampling,
        _whole("max_tokens", options.get("max_tokens"), 1, "Leave it out for as much as the context holds."),
        _texts("stop", options.get("stop")) or (),
        _form(options.get("schema"), options.get("regex"), _texts("choice", options.get("choice"))),
        _whole("logprobs", options.get("logprobs"), 0, f"It may be 0 to {_MOST_LOGPROBS}.", _MOST_LOGPROBS),
        options.get("lookup", False),
        options.get("persist", True),
        options.get("progress"),
    )


def _whole(name: str, value: int | None, low: int, hint: str, high: int | None = None) -> int | None:
    if value is not None and (type(value) is not int or value < low or (high is not None and value > high)):
        raise UsageError(f"{name} is {value!r}, but has to be a whole number, at least {low}.", hint=hint)
    return value


def _texts(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    texts = (value,) if isinstance(value, str) else value
    if texts is None:
        return None
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{name} is no list of texts.")
    return tuple(texts)


def _form(schema: Any, regex: str | None, choice: tuple[str, ...] | None) -> Spec | None:
    if sum(wish is not None for wish in (schema, regex, choice)) > 1:
        raise UsageError("Of schema, regex and choice only one can be given.")
    if schema is None and regex is None and choice is None:
        return None
    if regex is not None and not isinstance(regex, str):
        raise UsageError("regex is no text.")
    from qwen2_local import grammar

    if schema is not None:
        return grammar.spec_of(schema)
    return grammar.Regex(regex) if regex is not None else grammar.OneOf(choice or ())
