"""`qwen2-local run`: one prompt, one reply, for people and scripts."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import click

from qwen2_local.cli import output
from qwen2_local.cli.options import sampling_from, shared
from qwen2_local.errors import InvalidPrompt
from qwen2_local.types import Completion, Message, Sampling

_MOST_STDIN = 16_000_000
"""Bytes: more than any context holds, and little enough for any memory."""


@click.command()
@click.argument("model", default="guide")
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without a chat template (for base models).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead: text, finish_reason, usage, timings.")
@shared
def run(
    model: str,
    prompt: str | None,
    raw: bool,
    as_json: bool,
    system: str | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    max_tokens: int | None,
    context: int | None,
    backend: str | None,
) -> None:
    """Answer PROMPT with MODEL: a name (see `ls`), a GGUF file, an MLX folder or a Hugging Face folder.

    Text on stdin is added to PROMPT: `cat report.txt | qwen2-local run guide "Summarise"`.
    """
    if prompt is None and len(model.split()) > 1 and not Path(model).exists():
        raise click.UsageError(f'The model comes first: `qwen2-local run guide "{model}"`.')
    text = _whole_prompt(prompt)
    if raw and system is not None:
        raise click.UsageError("--system has no place in a --raw prompt: there is no chat template.")
    from qwen2_local.model import Qwen2

    sampling_from(Sampling(), temperature, top_p, top_k, seed)  # what cannot be is refused before anything is loaded
    with output.Status() as status:
        status.show(f"loading {model}")
        loaded = Qwen2(model, backend=backend, context=context, report=status.bytes)
    with loaded, output.Status() as status:
        for warning in loaded.notes:
            output.note(f"note: {warning}")
        sampling = sampling_from(loaded.sampling, temperature, top_p, top_k, seed)
        if raw:
            stream = loaded.complete(text, sampling=sampling, max_tokens=max_tokens, progress=status.prefill)
        else:
            messages = [Message("system", system)] if system is not None else []
            stream = loaded.respond([*messages, Message("user", text)], sampling=sampling, max_tokens=max_tokens, progress=status.prefill)
        try:
            for piece in stream:
                if not as_json:
                    output.reply(piece.text)
        finally:
            # Also after Ctrl-C: what was written stays, and the line ends.
            stream.close()
            if stream.completion is not None:
                if as_json:
                    print(json.dumps(as_object(stream.completion), ensure_ascii=False), flush=True)
                elif stream.completion.text:
                    print(flush=True)


def as_object(completion: Completion) -> dict[str, object]:
    """What --json prints."""
    usage = completion.usage
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "prefill_s": round(usage.prefill_s, 6),
            "decode_s": round(usage.decode_s, 6),
            "decode_tokens_per_s": round(usage.decode_tokens_per_s, 2),
        },
    }


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
