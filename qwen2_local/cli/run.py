"""`qwen2-local run`: one prompt and its reply, several replies, or a file of prompts; for people and scripts."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2_local.cli import output
from qwen2_local.cli.opening import opened
from qwen2_local.cli.options import loads, system, wishes
from qwen2_local.cli.replies import as_object, require_form
from qwen2_local.errors import InvalidPrompt, SchemaError
from qwen2_local.options import settle
from qwen2_local.types import Message, Sampling

if TYPE_CHECKING:
    from qwen2_local.model import Qwen2
    from qwen2_local.stream import Stream

_MOST_STDIN = 16_000_000
"""Bytes: more than any context holds, and little enough for any memory."""

_MOST_REPLIES = 10_000
_USUAL_CONCURRENCY = 8


@click.command()
@click.argument("model", default="guide")
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a chat template (for base models).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead: text, finish_reason, usage; a list of them with --n.")
@click.option("--n", "count", type=click.IntRange(1, _MOST_REPLIES), metavar="N", help="N replies, computed together. Seeds count up from --seed.")
@click.option("--logprobs", type=click.IntRange(0, 100), metavar="N", help="With JSON: log-probabilities of each token and the N likeliest there.")
@click.option("--batch", metavar="FILE", help='Answer each line of a JSONL file ("-": stdin); a JSON object for each goes to stdout.')
@click.option("--concurrency", type=click.IntRange(1, 256), metavar="N", help=f"With --batch or --n: so many at once. Default: {_USUAL_CONCURRENCY}.")
@system
@wishes
@loads
def run(
    model: str,
    prompt: str | None,
    raw: bool,
    as_json: bool,
    count: int | None,
    logprobs: int | None,
    batch: str | None,
    concurrency: int | None,
    system: str | None,
    wishes: dict[str, Any],
    loads: dict[str, Any],
) -> None:
    """Answer PROMPT with MODEL: a name (see `ls`), a GGUF file, an MLX folder or a Hugging Face folder.

    Text on stdin is added to PROMPT: `cat report.txt | qwen2-local run guide "Summarise"`.

    A line of a --batch file is a JSON string, or an object with "prompt" or "messages" and, if wished, "id", "system", and options like
    "max_tokens". Lines that fail have an "error", and the exit code is that of the first one.
    """
    if prompt is None and len(model.split()) > 1 and not Path(model).exists():
        raise click.UsageError(f'The model comes first: `qwen2-local run guide "{model}"`.')
    if raw and system is not None:
        raise click.UsageError("--system has no place in a --raw prompt: there is no chat template.")
    if logprobs is not None:
        if not as_json and batch is None:
            raise click.UsageError("--logprobs goes with --json or --batch.")
        wishes["logprobs"] = logprobs
    settle(Sampling(), **wishes)  # what cannot be is refused before anything is loaded
    at_once = concurrency or _USUAL_CONCURRENCY
    if batch is not None:
        if prompt is not None or count is not None:
            raise click.UsageError("--batch has its prompts in its file: leave PROMPT and --n away.")
        from qwen2_local.cli import batches

        with batches.opened_lines(batch) as lines, opened(model, {**loads, "parallel": at_once}) as loaded:
            failed = batches.answer(loaded, lines, system=system, raw=raw, concurrency=at_once, wishes=wishes)
        sys.exit(failed)
    text = _whole_prompt(prompt)
    with opened(model, {**loads, "parallel": at_once}) as loaded:
        if count is None:
            _one(loaded, text, system, raw, as_json, wishes)
        else:
            _several(loaded, text, system, raw, as_json, count, at_once, wishes)


def _begin(loaded: Qwen2, text: str, system: str | None, raw: bool, options: Mapping[str, Any]) -> Stream:
    if raw:
        return loaded.complete(text, **options)
    messages = [Message("system", system)] if system is not None else []
    return loaded.respond([*messages, Message("user", text)], **options)


def _one(loaded: Qwen2, text: str, system: str | None, raw: bool, as_json: bool, wishes: Mapping[str, Any]) -> None:
    with output.Status() as status:
        stream = _begin(loaded, text, system, raw, {**wishes, "progress": status.prefill})
        try:
            for piece in stream:
                if not as_json:
                    output.reply(piece.text)
        finally:
            # Also after Ctrl-C: what was written stays, and the line ends.
            stream.close()
            if stream.completion is not None:
                if as_json:
                    print(_dump(as_object(stream.completion, loaded.tokenizer, logprobs="logprobs" in wishes)), flush=True)
                elif stream.completion.text:
                    print(flush=True)
    require_form(stream.finish(), settle(loaded.sampling, **wishes))


def _several(loaded: Qwen2, text: str, system: str | None, raw: bool, as_json: bool, count: int, concurrency: int, wishes: Mapping[str, Any]) -> None:
    """Replies with one seed after the other; as text, they are printed in order, with an empty line between."""
    import secrets

    from qwen2_local.many import Meter, in_order

    wish = settle(loaded.sampling, **wishes)
    if wish.sampling.temperature == 0 and count > 1:
        output.note("note: sampling is greedy, so all replies are the same; --temperature 0.7 makes them differ.")
    first = wish.sampling.seed if wish.sampling.seed is not None else secrets.randbelow(2**32)
    seeds = [(first + number) % 2**64 for number in range(count)]
    said: list[dict[str, Any]] = []
    meter = Meter(count, shown=as_json or not sys.stdout.isatty())
    broken: SchemaError | None = None
    replies = in_order(lambda seed: _begin(loaded, text, system, raw, {**wishes, "seed": seed}), seeds, concurrency=concurrency)
    try:
        for seed, result in zip(seeds, replies, strict=True):
            if isinstance(result, Exception):
                raise result
            meter.advance()
            if as_json:
                said.append({"seed": seed, **as_object(result, loaded.tokenizer, logprobs=wish.logprobs is not None)})
            else:
                output.reply(("" if seed == first else "\n") + result.text + "\n")
            try:
                require_form(result, wish)
            except SchemaError as error:
                broken = broken or error
    finally:
        replies.close()
        meter.close()
        if as_json:
            print(_dump(said), flush=True)
    if broken is not None:
        raise broken


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _whole_prompt(prompt: str | None) -> str:
    """PROMPT and what comes on stdin, as one text."""
    piped = ""
    if sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty():
        # Who has given a prompt may not know that something is still awaited.
        waiting = threading.Timer(2.0, output.note, ["reading stdin to its end, as it is no terminal (`< /dev/null` gives none) …"])
        waiting.daemon = True
        if prompt:
            waiting.start()
        try:
            data = sys.stdin.buffer.read(_MOST_STDIN + 1)
        finally:
            waiting.cancel()
        if len(data) > _MOST_STDIN:
            raise InvalidPrompt(f"More than {_MOST_STDIN // 10**6} MB came on stdin.", hint="Give it a shorter text: no context holds as much.")
        try:
            piped = data.decode("utf-8")
        except UnicodeDecodeError as error:
            hint = "Give it text, not a picture or a document."
            raise InvalidPrompt(f"What came on stdin is no UTF-8 text (byte {error.start:,}).", hint=hint) from None
    whole = "\n\n".join(part for part in (prompt or "", piped.removesuffix("\n")) if part.strip())
    if not whole:
        raise InvalidPrompt("There is no prompt.", hint='Give one: `qwen2-local run guide "What is GGUF?"`, or send text to stdin.')
    return whole
