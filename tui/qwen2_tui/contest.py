"""Two models, or one with two settings, on one prompt: who they are, what they need together, and what came of each. No widgets here."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from qwen2_local import fit, store
from qwen2_local.cli.output import gigabytes
from qwen2_local.errors import DoesNotFit, UsageError
from qwen2_local.sanitize import clean_line
from qwen2_tui.live import Progress
from qwen2_tui.model import LoadWish

CONTEXT = 4096
"""Tokens that a model is loaded with to be compared, so that two fit more often."""

_LOADS: Mapping[str, Callable[[str], Any]] = {"backend": str, "context": int, "kv_bits": int}
_SAYS: Mapping[str, Callable[[str], Any]] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "max_tokens": int,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contender:
    """One of the two. loads: how to load it; says: options of its reply. Both without what is the model's own."""

    name: str
    loads: Mapping[str, Any] = field(default_factory=dict)
    says: Mapping[str, Any] = field(default_factory=dict)

    @property
    def wish(self) -> LoadWish:
        """How it is loaded. Nothing of a comparison is kept on the disk."""
        return LoadWish(self.name, **{"context": CONTEXT, "kv_cache": False, **self.loads})

    @property
    def settings(self) -> str:
        """As `with_settings` reads them."""
        return " ".join(f"{name}={value}" for name, value in (*self.loads.items(), *self.says.items()))

    def with_settings(self, text: str) -> Contender:
        """The same with others: "temperature=0.2 kv_bits=8". Raises UsageError, with what there is."""
        loads: dict[str, Any] = {}
        says: dict[str, Any] = {}
        for part in text.replace(",", " ").split():
            name, equals, value = part.partition("=")
            read = _LOADS.get(name) or _SAYS.get(name)
            if read is None:
                near = get_close_matches(name, [*_LOADS, *_SAYS], 1)
                hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join([*_LOADS, *_SAYS])}."
                raise UsageError(f"There is no setting {clean_line(name)}.", hint=hint)
            try:
                (loads if name in _LOADS else says)[name] = read(value)
            except ValueError:
                raise UsageError(f"{name}={clean_line(value)} is no number." if equals else f"{name} has no value: write {name}=1, say.") from None
        return replace(self, loads=loads, says=says)


def new_seed() -> int:
    """Another one; short, as it is shown."""
    return random.randrange(1, 10_000)


def require_room(wishes: Sequence[LoadWish], memory: fit.Memory, needs: Callable[[LoadWish], int]) -> None:
    """Raises DoesNotFit, with the numbers, unless the models that `wishes` load fit together into what is free."""
    sizes = [needs(wish) for wish in wishes]
    if sum(sizes) <= memory.available:
        return
    free = f"{memory.available // 10**8 / 10:.1f} GB of memory are free"
    if len(wishes) == 1:
        what = f"{wishes[0].name} needs {fit.show_gb(sizes[0])} beside what is loaded, but {free}."
    else:
        what = f"{' and '.join(wish.name for wish in wishes)} need {fit.show_gb(sum(sizes))} together, but {free}."
    raise DoesNotFit(
        what, hint="Choose a smaller size or fewer bits for one of them, or compare with the model of the chat, which is loaded already."
    )


def memory_of(wish: LoadWish) -> int:
    """Bytes that loading it takes. Raises UnknownModel, BadFile, UnsupportedModel."""
    from qwen2_local.cli.models import memory_at

    return memory_at(store.resolve(wish.name), wish.context or CONTEXT, wish.kv_bits)


@dataclass(frozen=True, slots=True)
class Result:
    """What is said under a reply. memory, size: of the process and of the file, 0 if unknown. ended: why, if not by itself."""

    progress: Progress = field(default_factory=lambda: Progress("waiting"))
    memory: int = 0
    size: int = 0
    ended: str = ""

    @property
    def words(self) -> str:
        """One line."""
        how = self.progress
        if how.phase == "waiting":
            return "waiting"
        if how.phase == "reading":
            return f"reading {how.read:,} of {how.prompt:,} tokens"
        known = f" ({how.cached:,} of {how.prompt:,} tokens known already)" if how.cached else ""
        parts = [f"{how.tokens_per_s:.1f} tok/s", f"first token {how.first_token_s:.2f} s{known}", f"{how.written:,} tokens"]
        parts += [f"memory {fit.show_gb(self.memory)}"] if self.memory else []
        parts += [f"file {gigabytes(self.size)}"] if self.size else []
        return " · ".join([*parts, *([self.ended] if self.ended else [])])
