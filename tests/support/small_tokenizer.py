"""A tokenizer of Qwen2's kind with a handful of tokens: 256 bytes, a few merges, the ChatML marks and a plain added token."""

from __future__ import annotations

from typing import Any

from qwen2_local.vocabulary import BYTE_OF, SPLIT_PATTERN

MERGES = [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("Ġ", "hello"), ("Ã", "©")]
BASE = sorted(BYTE_OF, key=BYTE_OF.__getitem__) + ["".join(merge) for merge in MERGES]
CONTROL = {name: len(BASE) + number for number, name in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
TOOL = "<tool_call>"
"""An added token that is text: some fine-tunes have such."""

SIZE = len(BASE) + len(CONTROL) + 1


def small_json() -> dict[str, Any]:
    """Fresh contents of its tokenizer.json, to be changed at will."""
    return {
        "added_tokens": [
            *({"id": number, "content": name, "special": True} for name, number in CONTROL.items()),
            {"id": SIZE - 1, "content": TOOL, "special": False},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(BASE)}, "merges": [list(merge) for merge in MERGES]},
    }


def small_gguf() -> dict[str, Any]:
    """Fresh tokenizer keys of a GGUF file, with padding of both kinds behind."""
    padding = [f"[PAD{SIZE + number}]" for number in range(4)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*BASE, *CONTROL, TOOL, *padding],
        "tokenizer.ggml.token_type": [1] * len(BASE) + [3] * len(CONTROL) + [4] + [4, 4, 5, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.eos_token_id": CONTROL["<|im_end|>"],
    }
