"""The ten checkpoints of Qwen2: five sizes, each as base and Instruct. Numbers from their config.json files and model cards.

Nothing here is asked of a network. What a repository holds today only the hub knows: names of files and variants are those of the releases.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwen2_local.types import Sampling


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence: SPDX id (or the hub's), name, address."""

    id: str
    name: str
    url: str


APACHE = Licence("apache-2.0", "Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
TONGYI = Licence("tongyi-qianwen", "Tongyi Qianwen", "https://huggingface.co/Qwen/Qwen2-72B-Instruct/blob/main/LICENSE")


@dataclass(frozen=True, slots=True)
class Size:
    """One size. parameters: as announced; weights: counted, embedding and head both where they are two. Sizes of files in bytes.

    active: parameters that a token is computed with, 0 for all. context: tokens that Instruct was made for; yarn_context: with YaRN, where
    that was announced. tensors: of a checkpoint, experts stacked.
    gguf_bytes: by quantization, of what llama.cpp writes (the table of the project's facts, to three digits).
    """

    name: str
    title: str
    parameters: int
    weights: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    yarn_context: int | None
    licence: Licence
    shards: int
    tensors: int
    repetition_penalty: float
    recommended: str = "q4_k_m"
    variants: tuple[str, ...] = ("GGUF", "GPTQ-Int4", "GPTQ-Int8", "AWQ", "MLX")
    gguf_bytes: Mapping[str, int] = field(default_factory=dict)
    context: int = 32768
    active: int = 0

    @property
    def active_share(self) -> float:
        """Of the weights, those that are read for a token."""
        return self.active / self.parameters if self.active else 1.0

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache holds for a token of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One of the ten checkpoints."""

    size: Size
    instruct: bool

    @property
    def name(self) -> str:
        """What a person types: "7b", or "7b-base"."""
        return self.size.name if self.instruct else f"{self.size.name}-base"

    @property
    def title(self) -> str:
        """As its makers write it: "Qwen2-7B-Instruct"."""
        return f"Qwen2-{self.size.title}{'-Instruct' if self.instruct else ''}"

    @property
    def repo(self) -> str:
        """The hub's id."""
        return f"Qwen/{self.title}"

    @property
    def context(self) -> int:
        """max_position_embeddings of the config: tokens."""
        return self.size.context if self.instruct else 131072

    @property
    def sampling(self) -> Sampling:
        """Its generation_config: Instruct samples, base is greedy."""
        if not self.instruct:
            return Sampling()
        return Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=self.size.repetition_penalty)

    def variant_repo(self, variant: str) -> str:
        """The official repository of a variant of Instruct: "GGUF", "MLX" …"""
        return f"{self.repo}-{variant}"


def _gguf(*gigabytes: float) -> dict[str, int]:
    return {level: round(size * 1e9) for level, size in zip(("q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0"), gigabytes, strict=True)}


SIZES = (
    Size(
        "0.5b", "0.5B", 490_000_000, 494_032_768, layers=24, hidden=896, heads=14, kv_heads=2, intermediate=4864, vocabulary=151936, tied=True,
        yarn_context=None, licence=APACHE, shards=1, tensors=290, repetition_penalty=1.1, recommended="q8_0",
        gguf_bytes=_gguf(0.35, 0.39, 0.41, 0.50, 0.53),
    ),
    Size(
        "1.5b", "1.5B", 1_540_000_000, 1_543_714_304, layers=28, hidden=1536, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936, tied=True,
        yarn_context=None, licence=APACHE, shards=1, tensors=338, repetition_penalty=1.1, gguf_bytes=_gguf(0.82, 0.98, 1.12, 1.27, 1.64),
    ),
    Size(
        "7b", "7B", 7_070_000_000, 7_615_616_512, layers=28, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False,
        yarn_context=131072, licence=APACHE, shards=4, tensors=339, repetition_penalty=1.05, gguf_bytes=_gguf(3.80, 4.68, 5.44, 6.25, 8.09),
    ),
    Size(
        "57b", "57B-A14B", 57_410_000_000, 57_408_658_944, layers=28, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=151936,
        tied=False, yarn_context=65536, licence=APACHE, shards=30, tensors=479, repetition_penalty=1.05, variants=("GGUF", "GPTQ-Int4"),
        active=14_000_000_000, gguf_bytes=_gguf(27.5, 34.9, 40.8, 47.1, 61.0),
    ),
    Size(
        "72b", "72B", 72_710_000_000, 72_706_203_648, layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=29568, vocabulary=152064, tied=False,
        yarn_context=131072, licence=TONGYI, shards=37, tensors=963, repetition_penalty=1.05, gguf_bytes=_gguf(37.7, 47.4, 54.4, 64.3, 77.3),
        variants=("GGUF", "GPTQ-Int4", "GPTQ-Int8", "AWQ"),
    ),
)  # fmt: skip
"""The five sizes, smallest first."""

CATALOG = tuple(CatalogModel(size, instruct) for size in SIZES for instruct in (True, False))
"""The ten checkpoints."""

_NAME = re.compile(r"(qwen/)?(qwen2-)?(?P<size>[0-9.]+b)(-a14b)?(?P<kind>-base|-instruct)?(:(?P<quantization>[a-z0-9_.-]+))?")


def lookup(name: str) -> tuple[CatalogModel, str | None] | None:
    """The checkpoint that a typed name means, and the quantization asked for: "7b", "7b-base", "0.5b:q4_0", "Qwen/Qwen2-7B". None if none.

    A name as the hub has it ("Qwen2-7B") is the base model; a short one ("7b") Instruct.
    """
    match = _NAME.fullmatch(name.strip().lower())
    if not match:
        return None
    short = not match.group(1) and not match.group(2)
    instruct = match["kind"] == "-instruct" or (short and match["kind"] is None)
    for model in CATALOG:
        if model.size.name == match["size"] and model.instruct == instruct:
            return model, match["quantization"]
    return None


def defaults_of(hidden: int, layers: int, names: Sequence[str], *, chats: bool) -> Sampling:
    """How to sample a model whose files do not say, as its makers' generation_config does: base models are greedy.

    names: what the model and its file are called (of the official files, only theirs say Instruct); chats: whether it ends replies as chat models do.
    """
    called = re.sub(r"[ _]", "-", " ".join(names).lower())
    if "r1-distill" in called:
        return Sampling(temperature=0.6, top_p=0.95)
    if not chats and "instruct" not in called:
        return Sampling()
    for model in CATALOG:
        # 7B and 57B-A14B share their shape, and their sampling.
        if model.instruct and (model.size.hidden, model.size.layers) == (hidden, layers):
            return model.sampling
    return Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)


def yarn_context_of(hidden: int, layers: int, context: int, names: Sequence[str], *, experts: bool, chats: bool) -> int:
    """How far YaRN stretches a model, as its makers announced: tokens, 0 where they announced nothing. names, chats: as in `defaults_of`.

    context: what its files say, which for Instruct is the context without YaRN. Qwen2.5's models of these shapes may be stretched as far.
    """
    if not chats and "instruct" not in " ".join(names).lower():
        return 0
    for size in SIZES:
        # 7B and 57B-A14B differ by the experts alone.
        if (size.hidden, size.layers, size.context, size.name == "57b") == (hidden, layers, context, experts):
            return size.yarn_context or 0
    return 0


def how_to_get(model: CatalogModel, level: str | None = None) -> str:
    """The command that fetches a checkpoint, for a person to copy; `level`: the quantization asked for."""
    return f"`qwen2-local pull {model.name}{f':{level}' if level else ''}`."


def suggestions(name: str, known: tuple[str, ...] = ()) -> list[str]:
    """Up to three names of the catalog, or of `known`, that look like `name`."""
    names = [*known, *(model.name for model in CATALOG)]
    return difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
