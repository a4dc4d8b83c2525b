"""The real Qwen2 tokenizer, made from the official vocabulary that Alibaba's SDK on PyPI, `dashscope`, carries (Apache-2.0).

The SDK is never imported. Its file lists tokens by rank; Hugging Face's format wants merges, which follow from the ranks.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
import json
from pathlib import Path

from qwen2_local.vocabulary import BYTE_OF, SPLIT_PATTERN

CONTROL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
TOKENS = 151646
EMBEDDINGS = 151936
"""vocab_size of 0.5B and 1.5B: TOKENS padded."""

SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""chat_template of Qwen2's tokenizer_config.json."""

_LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}


def vocabulary_file() -> Path | None:
    """The installed qwen.tiktoken, or None without the package."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("resources") / "qwen.tiktoken"
    return path if path.is_file() else None


@functools.cache
def ranks() -> dict[bytes, int]:
    """Each token's bytes and rank, which is its id. Raises FileNotFoundError without the package."""
    path = vocabulary_file()
    if path is None:
        raise FileNotFoundError("the package dashscope, which carries Qwen2's vocabulary, is not installed")
    raw = path.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == SHA256, "another version of the vocabulary"
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())}


@functools.cache
def merges() -> list[tuple[str, str]]:
    """All 151,387 merges in order, in the byte alphabet; takes about a second."""
    known = ranks()
    return [_merge(token, rank, known) for token, rank in known.items() if len(token) > 1]


def _merge(token: bytes, rank: int, known: dict[bytes, int]) -> tuple[str, str]:
    """The merge that makes `token`: the two parts that BPE with the lower ranks alone leaves of it."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda index: known.get(parts[index] + parts[index + 1], rank))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    left, right = parts
    return _letters(left), _letters(right)


def _letters(token: bytes) -> str:
    return "".join(map(_LETTER_OF.__getitem__, token))


def tokenizer_json() -> dict[str, object]:
    """The contents of Qwen2's tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in CONTROL.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {_letters(token): rank for token, rank in ranks().items()},
            "merges": [" ".join(merge) for merge in merges()],
        },
    }


def gguf_keys() -> dict[str, object]:
    """The tokenizer keys of a GGUF file of Qwen2, padded as the official ones."""
    tokens = [_letters(token) for token in ranks()]
    padding = [f"[PAD{number}]" for number in range(TOKENS, EMBEDDINGS)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *CONTROL, *padding],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(CONTROL) + [4] * len(padding),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges()],
        "tokenizer.ggml.eos_token_id": CONTROL["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": CONTROL["<|endoftext|>"],
        "tokenizer.ggml.bos_token_id": CONTROL["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
    }


def write_real_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json as Qwen2-0.5B-Instruct has them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
    }
    for name, content in (("tokenizer", tokenizer_json()), ("tokenizer_config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
