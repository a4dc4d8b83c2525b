"""`qwen2-local run --batch`: a file of prompts in, a file of replies out, one JSON value a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qwen2_local.cli import output
from qwen2_local.cli.replies import as_object, require_form
from qwen2_local.errors import InvalidPrompt, Qwen2LocalError, UsageError
from qwen2_local.options import Settled, settle
from qwen2_local.types import Message

if TYPE_CHECKING:
    from qwen2_local.model import Qwen2
    from qwen2_local.stream import Stream

_MOST_LINE = 16_000_000
_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window", "logit_bias", "seed",
    "max_tokens", "stop", "schema", "regex", "choice", "logprobs", "lookup",
)  # fmt: skip
_HINT = 'A line is a string, or an object: {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}.'


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file with prompts. total: how many, where that is known."""

    file: BinaryIO
    total: int | None

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Those that are not empty, with their numbers, from 1. What is longer than any context comes cut off, as one line."""
        number = 0
        while line := self.file.readline(_MOST_LINE + 1):
            number += 1
            rest = line
            while len(rest) > _MOST_LINE and not rest.endswith(b"\n"):
                rest = self.file.readline(_MOST_LINE + 1)
            if line.strip():
                yield number, line


@dataclass(frozen=True, slots=True)
class Job:
    """A line as it was meant; error: why it means nothing."""

    id: object
    messages: tuple[Message, ...] = ()
    text: str = ""
    options: Mapping[str, Any] | None = None
    error: Qwen2LocalError | None = None


@contextmanager
def opened_lines(name: str) -> Iterator[Lines]:
    """The file of prompts; "-" is stdin. Raises OSError."""
    if name == "-":
        yield Lines(sys.stdin.buffer, None)
        return
    path = Path(name)
    with path.open("rb") as file:
        total = None
        if path.is_file():
            total = sum(1 for _ in Lines(file, None))
            file.seek(0)
        yield Lines(file, total)


def answer(loaded: Qwen2, lines: Lines, *, system: str | None, raw: bool, concurrency: int, wishes: Mapping[str, Any]) -> int:
    """Print a reply, or an error, for each line, in order. The exit code: that of the first line that failed."""
    from qwen2_local.many import Meter, in_order

    meter = Meter(lines.total, shown=not sys.stdout.isatty())
    jobs: list[Job] = []
    drawn = (parse(number, line, system=system, raw=raw) for number, line in lines)
    code = failed = 0

    def remembered() -> Iterator[Job]:
        for job in drawn:
            jobs.append(job)
            yield job

    def begin(job: Job) -> Stream:
        if job.error is not None:
            raise job.error
        options = {**wishes, **(job.options or {})}
        return loaded.respond(job.messages, **options) if job.messages else loaded.complete(job.text, **options)

    try:
        for result in in_order(begin, remembered(), concurrency=concurrency):
            job = jobs.pop(0)
            said: dict[str, Any] = {"id": job.id}
            error: Qwen2LocalError | None = None
            if isinstance(result, Qwen2LocalError):
                error = result
            elif isinstance(result, Exception):
                raise result
            else:
                wish = settle(loaded.sampling, **{**wishes, **(job.options or {})})
                said |= as_object(result, loaded.tokenizer, logprobs=wish.logprobs is not None)
                error = _form_error(result, wish)
            if error is not None:
                said["error"] = {"type": type(error).__name__, "what": error.what, "hint": error.hint}
                code, failed = code or error.exit_code, failed + 1
            print(json.dumps(said, ensure_ascii=False), flush=True)
            meter.advance()
    finally:
        meter.close()
    if failed:
        output.note(f'{failed:,} {"line" if failed == 1 else "lines"} failed: see "error" in the output.')
    return code


def parse(number: int, line: bytes, *, system: str | None, raw: bool) -> Job:
    """A line of the file. system: of lines that bring none. raw: prompts are continued as plain text."""
    id: object = number
    try:
        value = _json(line)
        if isinstance(value, dict):
            id = value.get("id", number)
        return _job(id, value, system, raw)
    except Qwen2LocalError as error:
        return Job(id, error=error)


def _json(line: bytes) -> object:
    if len(line) > _MOST_LINE:
        raise InvalidPrompt(f"The line has more than {_MOST_LINE // 10**6} MB.", hint="No context holds as much.")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidPrompt(f"The line is no JSON: {str(error)[:100]}.", hint=_HINT) from None


def _job(id: object, value: object, system: str | None, raw: bool) -> Job:
    match value:
        case str(prompt):
            given: dict[str, Any] = {"prompt": prompt}
        case dict():
            given = dict(value)
        case _:
            raise InvalidPrompt("The line is neither a string nor an object.", hint=_HINT)
    given.pop("id", None)
    options = {name: given.pop(name) for name in _OPTIONS if name in given}
    if isinstance(bias := options.get("logit_bias"), dict):
        options["logit_bias"] = {int(token) if token.isascii() and token.isdigit() else token: amount for token, amount in bias.items()}
    match given:
        case {"prompt": str(prompt), **rest} if prompt.strip() and not rest.keys() - {"system"}:
            own = rest.get("system", system)
            if own is not None and (raw or not isinstance(own, str)):
                raise UsageError('The line\'s "system" is no text, or has no place in a raw prompt.', hint=_HINT)
            if raw:
                return Job(id, text=prompt, options=options)
            return Job(id, _turns(own, [Message("user", prompt)]), options=options)
        case {"messages": [*listed], **rest} if listed and not rest and not raw:
            messages = [_message(one) for one in listed]
            return Job(id, _turns(None if messages[0].role == "system" else system, messages), options=options)
    unknown = sorted(given.keys() - {"prompt", "messages", "system"})
    raise InvalidPrompt(f"The line has no use for {unknown[0][:40]!r}." if unknown else "The line holds no prompt.", hint=_HINT)


def _turns(system: str | None, messages: list[Message]) -> tuple[Message, ...]:
    return (*([Message("system", system)] if system is not None else []), *messages)


def _message(value: object) -> Message:
    match value:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)} if len(value) == 2:  # type: ignore[arg-type]
            return Message(role, content)
    raise InvalidPrompt("A message of the line is none.", hint=_HINT)


def _form_error(completion: Any, wish: Settled) -> Qwen2LocalError | None:
    try:
        require_form(completion, wish)
    except Qwen2LocalError as error:
        return error
    return None
