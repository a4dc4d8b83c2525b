"""`qwen2-local score`: the perplexity of a text."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from qwen2_local.cli import output
from qwen2_local.cli.opening import opened
from qwen2_local.cli.options import loads
from qwen2_local.cli.replies import of_token
from qwen2_local.errors import InvalidPrompt, UsageError

_MOST = 64_000_000


@click.command()
@click.argument("model")
@click.argument("text", required=False)
@click.option("--file", "name", metavar="FILE", help="Score this file's text.")
@click.option("--after", metavar="TEXT", help="Score the text as what comes behind this one; only its own tokens count.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the log-probability of each token.")
@loads
def score(model: str, text: str | None, name: str | None, after: str | None, as_json: bool, loads: dict[str, Any]) -> None:
    """Say how likely MODEL finds TEXT ("-", or none: what comes on stdin): log-probability and perplexity, without a chat template.

    Lower perplexity is likelier. Comparisons are fair between models with one vocabulary; bits per byte also between others.
    """
    if text is not None and name is not None:
        raise click.UsageError("Give TEXT or --file, not both.")
    whole = text if text is not None and text != "-" else _read(name)
    with opened(model, loads) as loaded:
        result = loaded.score(whole) if after is None else loaded.loglikelihood(after, whole)
        tokenizer = loaded.tokenizer
        size = sum(len(tokenizer.token_bytes(token)) for token in result.tokens)
    bits = -result.logprob / math.log(2) / size if size else None
    if as_json:
        said = {
            "perplexity": result.perplexity,
            "logprob": result.logprob,
            "bits_per_byte": bits,
            "greedy": result.greedy,
            "tokens": [of_token(tokenizer, token, logprob) for token, logprob in zip(result.tokens, result.logprobs, strict=True)],
        }
        print(json.dumps(said, ensure_ascii=False))
        return
    print(f"perplexity  {result.perplexity:.4f}")
    print(f"logprob     {result.logprob:.4f}")
    print(f"tokens      {len(result.tokens)}" + (f", {bits:.4f} bits per byte" if bits is not None else ""))


def _read(name: str | None) -> str:
    """A file's text, or stdin's. Raises InvalidPrompt, OSError."""
    if name is not None:
        with Path(name).open("rb") as file:
            data = file.read(_MOST + 1)
    elif sys.stdin is None or sys.stdin.closed:
        data = b""
    else:
        if sys.stdin.isatty():
            output.note("reading the text to its end (Ctrl-D) …")
        data = sys.stdin.buffer.read(_MOST + 1)
    if len(data) > _MOST:
        raise InvalidPrompt(f"The text has more than {_MOST // 10**6} MB.", hint="Give a shorter one: no context holds as much.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidPrompt(f"This is no UTF-8 text (byte {error.start:,}).", hint="Give it text, not a picture or a document.") from None
    if not text:
        raise UsageError("There is no text.", hint='Give one: `qwen2-local score guide "GGUF is a file format."`, or --file.')
    return text
