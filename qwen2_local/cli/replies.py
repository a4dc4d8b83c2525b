"""Replies as JSON, for `run --json` and `run --batch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen2_local.types import Completion

if TYPE_CHECKING:
    from qwen2_local.options import Settled
    from qwen2_local.tokens import Tokenizer


def as_object(completion: Completion, tokenizer: Tokenizer, *, logprobs: bool = False) -> dict[str, Any]:
    """What is printed of one reply. logprobs: they were asked for."""
    usage = completion.usage
    said: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "drafted_tokens": usage.drafted_tokens,
            "accepted_tokens": usage.accepted_tokens,
            "prefill_s": round(usage.prefill_s, 6),
            "decode_s": round(usage.decode_s, 6),
            "decode_tokens_per_s": round(usage.decode_tokens_per_s, 2),
        },
    }
    if logprobs:
        said["logprobs"] = [
            {**of_token(tokenizer, token, logprob), "top": [of_token(tokenizer, *one) for one in top]}
            for token, (logprob, top) in zip(completion.tokens, completion.logprobs, strict=False)
        ]
    return said


def of_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token with its log-probability; its text has U+FFFD where it is part of a character."""
    return {"id": token, "token": tokenizer.describe(token), "logprob": round(logprob, 6) or 0.0}


def require_form(completion: Completion, wish: Settled) -> None:
    """Raises TruncatedReply or SchemaError for a reply that is not what a schema, regex or choice asks for."""
    if wish.form is not None:
        from qwen2_local import grammar

        grammar.parse(completion.text, wish.form, whole=completion.finish_reason == "stop")
