"""Text to token ids and back, for byte-level BPE of the Qwen2 kind.

Plain text can never become a control token: the BPE engine is built from the ordinary tokens alone and does not know the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from qwen2_local.errors import BadFile, InvalidPrompt
from qwen2_local.vocabulary import BYTE_OF, SPLIT_PATTERN, Vocabulary, read_gguf, read_tokenizer_json

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A tokenizer, immutable and safe to share between threads."""

    size: int
    """One more than the highest id. A model's ids from here on are padding: mask them."""

    special: Mapping[str, int]
    """Ids of the control tokens by name, `<|im_end|>` say."""

    def __init__(self, vocabulary: Vocabulary, where: str = "The vocabulary") -> None:
        """Prefer `from_json` and `from_gguf`. `where` names the source in errors."""
        self.size = 1 + max(max(vocabulary.base.values()), max(vocabulary.added, default=0))
        self.special = MappingProxyType({vocabulary.added[number]: number for number in sorted(vocabulary.control)})
        self._base: list[str] = [""] * self.size
        for letters, number in vocabulary.base.items():
            self._base[number] = letters
        self._added = dict(vocabulary.added)
        self._engine = _engine(vocabulary, where)

    @classmethod
    def from_json(cls, path: Path) -> Tokenizer:
        """From a Hugging Face tokenizer.json. Raises BadFile, and UnsupportedModel for a tokenizer of another kind."""
        return cls(read_tokenizer_json(path), str(path))

    @classmethod
    def from_gguf(cls, keys: Mapping[str, object], where: str = "The GGUF file") -> Tokenizer:
        """From the `tokenizer.ggml.*` keys of a GGUF file, arrays as lists. Raises as `from_json` does; `where` names the file."""
        return cls(read_gguf(keys, where), where)

    @cached_property
    def identity(self) -> str:
        """Hexadecimal; equal for tokenizers whose ids all mean the same, wherever they were read from."""
        digest = hashlib.sha256("\0".join(self._base).encode())
        digest.update(repr((sorted(self._added.items()), sorted(self.special.items()))).encode())
        return digest.hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, brought to NFC first if the vocabulary asks for it; `<|im_end|>` and the like count as the letters they are made of.

        Raises InvalidPrompt for lone surrogates.
        """
        require_text(text)
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, perhaps a part of a character; none for control tokens and ids without a token."""
        if not 0 <= token < self.size:
            return b""
        if token not in self._added:
            return bytes(map(BYTE_OF.__getitem__, self._base[token]))
        text = self._added[token]
        return b"" if text in self.special else text.encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def describe(self, token: int) -> str:
        """A token for a person to read: control tokens by name, parts of characters as U+FFFD."""
        return self._added.get(token) or self.token_bytes(token).decode(errors="replace")


def require_text(text: str, name: str = "The text") -> None:
    """Raise InvalidPrompt, saying the position, if `text` holds lone surrogates: they are no characters and have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InvalidPrompt(
            f"{name} holds a lone surrogate (U+{code:04X}) at character {error.start + 1}, which is no valid text.",
            hint="It was read with the wrong encoding: read it as UTF-8, or remove that character.",
        ) from error


def _engine(vocabulary: Vocabulary, where: str) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    try:
        bpe = models.BPE(dict(vocabulary.base), vocabulary.merges)
    except Exception as error:  # the library raises bare Exception
        # Also a merge that would make an added token out of plain text ends here: the base does not hold its result.
        raise BadFile(f"{where}: its merges do not fit its vocabulary ({error}).", hint="Fetch or convert the model again.") from error
    engine = tokenizers.Tokenizer(bpe)
    if vocabulary.nfc:
        engine.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return engine
