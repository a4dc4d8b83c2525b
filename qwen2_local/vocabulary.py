"""What a tokenizer file says, checked: the tokens and merges of a byte-level BPE of the Qwen2 kind.

Both sources are hostile input. Nothing of them but plain strings and ids, and whether text is brought to NFC first, gets past this
module: no pattern or template of a file is ever used, because a file with any other than Qwen2's own is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.strict_json import read_object

SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2 cuts text into words before BPE; the mark by which its tokenizer is known (Hugging Face's tokenizer.json of Qwen2)."""

GGUF_PRE = {"qwen2": True, "deepseek-r1-qwen": False}
"""The names llama.cpp gives to that pattern (llama-vocab.cpp); whether text is brought to NFC before it."""

_QWEN2_SIZES = (151_643, 151_387)
"""Qwen2's base tokens and merges: how its vocabulary is known in a file that gives no name, as those of early 2024."""

_CONTROL_TEXTS = frozenset({"<|endoftext|>", "<|im_start|>", "<|im_end|>"})
_LIMIT_BYTES = 32_000_000  # Qwen2's own is 7 MB; JSON grows about twentyfold in memory.
_LIMIT_TOKENS = 1 << 20


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest are moved to U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + index): byte for index, byte in enumerate(moved)}


BYTE_OF = _byte_alphabet()
"""From a letter of the byte alphabet, in which base tokens are written, to its byte."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE vocabulary.

    base: ordinary tokens, written in the byte alphabet, to their ids. merges: pairs of them, best first. added: plain text of the tokens
    outside BPE, by id. control: those of `added` that are marks, not text. nfc: text is brought to NFC first. Ids may have gaps.
    """

    base: Mapping[str, int]
    merges: list[tuple[str, str]]
    added: Mapping[int, str]
    control: frozenset[int]
    nfc: bool = True


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The vocabulary in a Hugging Face tokenizer.json.

    Raises BadFile for a damaged file, UnsupportedModel for a tokenizer that is not of Qwen2's kind; both say what it is about.
    """
    where = str(path)
    root = read_object(path, _LIMIT_BYTES)
    _require_qwen2_kind(root, where)
    model = _mapping(root.get("model"), where, "model")

    added: dict[int, str] = {}
    control: set[int] = set()
    for entry in _list(root.get("added_tokens", []), where, "added_tokens"):
        token = _mapping(entry, where, "added_tokens")
        number, content, special = token.get("id"), token.get("content"), token.get("special")
        if type(number) is not int or type(content) is not str or type(special) is not bool or number in added:
            raise BadFile(f"{where}: an entry of added_tokens has no valid id, content and special, or repeats an id.", hint=_FETCH_AGAIN)
        added[number] = content
        if special or content in _CONTROL_TEXTS:
            control.add(number)

    vocab = _mapping(model.get("vocab"), where, "model.vocab")
    if not set(map(type, vocab.values())) <= {int}:
        raise BadFile(f"{where}: model.vocab holds ids that are no whole numbers.", hint=_FETCH_AGAIN)
    base = cast(dict[str, int], vocab)
    # Some writers repeat the added tokens here.
    for number, content in added.items():
        if base.get(content) == number:
            del base[content]
    merges = _pairs(_list(model.get("merges"), where, "model.merges"), where, "model.merges")
    return _checked(Vocabulary(base, merges, added, frozenset(control), _nfc(root.get("normalizer"), where)), where)


def read_gguf(keys: Mapping[str, object], where: str) -> Vocabulary:
    """The vocabulary in the `tokenizer.ggml.*` keys of a GGUF file; `where` names the file in errors.

    Padding up to the size of the embedding (`[PAD151646]`, or the type "unused") is left out. Raises as `read_tokenizer_json` does.
    """
    model, pre = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise _unsupported(where, f"tokenizer.ggml.model is {_shown(model)}, not 'gpt2'")
    if not isinstance(pre, str) or pre not in (*GGUF_PRE, "default"):
        raise _unsupported(where, f"tokenizer.ggml.pre is {_shown(pre)}, not 'qwen2'")
    texts = _list(keys.get("tokenizer.ggml.tokens"), where, "tokenizer.ggml.tokens")
    kinds = _list(keys.get("tokenizer.ggml.token_type"), where, "tokenizer.ggml.token_type")
    if len(texts) != len(kinds) or not set(map(type, texts)) <= {str}:
        raise BadFile(f"{where}: tokenizer.ggml.tokens and token_type do not fit together.", hint=_FETCH_AGAIN)

    base: dict[str, int] = {}
    added: dict[int, str] = {}
    control: set[int] = set()
    for number, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        assert isinstance(text, str)
        if text in _CONTROL_TEXTS or kind == 3:  # control
            added[number] = text
            control.add(number)
        elif kind == 1:  # normal
            if base.setdefault(text, number) != number:
                raise BadFile(f"{where}: tokenizer.ggml.tokens holds {_shown(text)} twice.", hint=_FETCH_AGAIN)
        elif kind == 4:  # user defined; converters of 2024 gave padding this type too
            if text != f"[PAD{number}]":
                added[number] = text
        elif kind != 5:  # unused
            raise _unsupported(where, f"tokenizer.ggml.token_type holds {_shown(kind)}")
    merges = _pairs(_list(keys.get("tokenizer.ggml.merges"), where, "tokenizer.ggml.merges"), where, "tokenizer.ggml.merges")
    if pre == "default" and (len(base), len(merges)) != _QWEN2_SIZES:
        raise _unsupported(where, "tokenizer.ggml.pre does not name its pattern, and its vocabulary is not Qwen2's")
    return _checked(Vocabulary(base, merges, added, frozenset(control), GGUF_PRE.get(pre, True)), where)


_FETCH_AGAIN = "The file is damaged or made by a faulty tool: fetch or convert the model again."


def _nfc(normalizer: object, where: str) -> bool:
    """Whether the normalizer is NFC; False for none at all."""
    if normalizer == {"type": "NFC"}:
        return True
    if normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}:
        return False
    raise _unsupported(where, "its normalizer is not NFC")


def _require_qwen2_kind(root: Mapping[str, object], where: str) -> None:
    pre = root.get("pre_tokenizer")
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else None
    if not isinstance(steps, list) or len(steps) != 2 or not all(isinstance(step, dict) for step in steps):
        raise _unsupported(where, "its pre_tokenizer is not a split followed by ByteLevel")
    split, bytes_ = steps
    if split.get("type") != "Split" or split.get("pattern") != {"Regex": SPLIT_PATTERN}:
        raise _unsupported(where, "its split pattern is not Qwen2's")
    if split.get("behavior") != "Isolated" or split.get("invert", False) is not False:
        raise _unsupported(where, "its split does not isolate words")
    if bytes_.get("type") != "ByteLevel" or bytes_.get("add_prefix_space") is not False or bytes_.get("use_regex") is not False:
        raise _unsupported(where, "its ByteLevel step adds a space or splits by itself")

    model = root.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise _unsupported(where, "its model is not BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise _unsupported(where, f"its BPE sets {name}")


def _checked(vocabulary: Vocabulary, where: str) -> Vocabulary:
    """Raise BadFile unless ids are unique and in range, and any text can be written in the base tokens."""
    base, added = vocabulary.base, vocabulary.added
    ids = set(base.values())
    if not base or min(ids) < 0 or max(ids, default=0) >= _LIMIT_TOKENS or any(not 0 <= number < _LIMIT_TOKENS for number in added):
        raise BadFile(f"{where}: the vocabulary is empty, or has ids outside 0 to {_LIMIT_TOKENS - 1}.", hint=_FETCH_AGAIN)
    if len(ids) != len(base) or not ids.isdisjoint(added):
        raise BadFile(f"{where}: two tokens have the same id.", hint=_FETCH_AGAIN)
    if not set("".join(base)) <= BYTE_OF.keys() or "" in base:
        raise BadFile(f"{where}: the vocabulary holds a token that is not written in the byte alphabet.", hint=_FETCH_AGAIN)
    if not base.keys() >= BYTE_OF.keys():
        raise BadFile(f"{where}: the vocabulary lacks single bytes, so not every text can be encoded.", hint=_FETCH_AGAIN)
    if any(text == "" or any("\ud800" <= letter <= "\udfff" for letter in text) for text in added.values()):
        raise BadFile(f"{where}: an added token is no valid text.", hint=_FETCH_AGAIN)
    if len(set(added.values())) != len(added):
        raise BadFile(f"{where}: an added token occurs twice.", hint=_FETCH_AGAIN)
    return vocabulary


def _pairs(merges: list[object], where: str, name: str) -> list[tuple[str, str]]:
    """Merges as pairs; files write them as "a b" or as ["a", "b"]."""
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or type(parts[0]) is not str or type(parts[1]) is not str:
            raise BadFile(f"{where}: {name} holds {_shown(merge)}, which is no pair of tokens.", hint=_FETCH_AGAIN)
        pairs.append((parts[0], parts[1]))
    return pairs


def _mapping(value: object, where: str, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadFile(f"{where}: {name} is not a JSON object.", hint=_FETCH_AGAIN)
    return value


def _list(value: object, where: str, name: str) -> list[object]:
    if isinstance(value, array):  # numbers, as the GGUF reader gives them
        return list(value)
    if not isinstance(value, list):
        raise BadFile(f"{where}: {name} is missing or no list.", hint=_FETCH_AGAIN)
    return value


def _unsupported(where: str, difference: str) -> UnsupportedModel:
    return UnsupportedModel(f"{where}: not a tokenizer of Qwen2's kind: {difference}.", hint="Only Qwen2 and its relatives run here: see the README.")


def _shown(value: object) -> str:
    """A value of a hostile file, short enough for a sentence."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
