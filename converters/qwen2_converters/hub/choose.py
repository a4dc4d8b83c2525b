"""The ways to the model that was asked for, and which one to take: what fits this machine, fetches least and need not be converted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen2_converters.hub.asked import Asked
from qwen2_converters.hub.repository import HubFile, Repository, checkpoint_files, ggufs, level_of
from qwen2_converters.target import GGUF, Target
from qwen2_local.errors import UnknownModel, UnsupportedModel, UsageError
from qwen2_local.formats.checkpoint import parameters

ORIGINAL = "original"
"""The level that means the checkpoint as its makers published it."""

_ORDER = (
    "q4_k_m", "q5_k_m", "q4_k_s", "q4_0", "iq4_xs", "iq4_nl", "q4_1", "q5_k_s", "q5_0", "q5_1", "q6_k", "q8_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
    "bf16", "f16", "f32",
)  # fmt: skip
_BITS = (4, 5, 6, 8, 3, 2, 16)
_SMALL = 1_000_000_000
"""Weights below which 4 bits lose too much, and 8 cost little."""

_FOREIGN = ("gptq-int4", "gptq-int8", "awq")


@dataclass(frozen=True, slots=True)
class Way:
    """One way. files: what is fetched. format: theirs ("hf": to be converted). targets: what they are converted to. written: bytes of that.

    label: what the fetched files are called once installed, "" where they are only converted.
    """

    repository: Repository
    files: tuple[HubFile, ...]
    format: Literal["gguf", "mlx", "hf"]
    label: str = ""
    targets: tuple[Target, ...] = ()
    written: int = 0

    @property
    def fetched(self) -> int:
        """Bytes of `files`."""
        return sum(file.size for file in self.files)

    @property
    def weights(self) -> int:
        """Bytes of the weights that are to be run, roughly: of the largest model that comes of it."""
        return self.written if self.targets else sum(file.size for file in self.files if file.name.endswith((".gguf", ".safetensors")))

    @property
    def labels(self) -> tuple[str, ...]:
        """Of all models that come of it."""
        return (*([self.label] if self.label else []), *(target.label for target in self.targets))


@dataclass(frozen=True, slots=True)
class Choice:
    """The best way, and the cheapest other one, if there is any."""

    best: Way
    runner_up: Way | None = None


def siblings(asked: Asked, backend: str, targets: Sequence[Target], *, original: bool) -> list[str]:
    """The repositories to ask the hub about, in the order of their use. Raises UsageError for a level beside what would overrule it."""
    if (targets or original) and asked.level not in ("", ORIGINAL):
        what = f"--to {targets[0]}" if targets else "--original"
        raise UsageError(f"The name says :{asked.level}, but {what} starts from the original.", hint="Leave one of the two out.")
    model = asked.model
    if asked.exact or model is None:
        return [asked.where]
    variants = model.size.variants if model.instruct else ()
    level = asked.level
    if targets or original or level == ORIGINAL:
        return [model.repo]
    for variant in ("GPTQ-Int4", "GPTQ-Int8", "AWQ"):
        if level == variant.lower():
            return [model.variant_repo(variant)]
    wants_mlx = level.startswith("mlx") if level else backend == "mlx"
    formats = ["MLX"] if wants_mlx else ["GGUF"]
    if wants_mlx and not level and "MLX" not in variants:
        formats = ["GPTQ-Int4"]  # converted without loss, and a quarter of the original
    return [*(model.variant_repo(one) for one in formats if one in variants), model.repo]


def choose(
    asked: Asked,
    repositories: Iterable[Repository],
    *,
    backend: str,
    targets: Sequence[Target] = (),
    original: bool = False,
    size_of: Callable[[Repository, Target], int],
    fits: Callable[[Way], bool],
) -> Choice:
    """The way to take. size_of: bytes of a conversion. fits: does what comes of a way fit into this machine's memory?

    Raises UnknownModel for a level that is not there and cannot be made, UnsupportedModel for a conversion from what is quantized already.
    """
    repositories = tuple(repositories)
    if targets or original or asked.level == ORIGINAL:
        return Choice(_converted(asked, repositories, tuple(targets), original or asked.level == ORIGINAL, size_of))
    ready = _ready(asked, repositories)
    if asked.file:
        found = [way for way in ready if any(file.path == asked.file for file in way.files)]
        return Choice(_require(found, asked, ready)[0])
    made = _made(asked, repositories, backend, size_of)
    if asked.level:
        ways = [way for way in (*ready, *made) if _matches(asked.level, way)]
        ways = sorted(_require(ways, asked, ready), key=_cost)
        return Choice(ways[0], next((way for way in ways if way.repository is not ways[0].repository), None))
    # What can be run as it comes is tried first: an original is at least twice as large.
    kind = "mlx" if backend == "mlx" else "gguf"
    mine = sorted((way for way in ready if way.format == kind), key=lambda way: _rank(way, _start(asked, way)))
    others = [way for way in ready if way.format != kind]
    made = sorted(made, key=lambda way: (_rank(way, _start(asked, way)), _cost(way)))
    ways = [*(way for way in (*mine, *made) if fits(way)), *mine, *made, *others]
    best = _require(ways, asked, ready)[0]
    elsewhere = [way for way in (*ready, *made) if way.repository is not best.repository]
    rest = sorted([way for way in elsewhere if set(way.labels) & set(best.labels)] or elsewhere, key=_cost)
    return Choice(best, rest[0] if rest else None)


def exact_targets(repository: Repository) -> dict[str, Target]:
    """What a GPTQ or AWQ checkpoint is converted to without loss (AWQ: hardly any), by backend."""
    packed = repository.config.packed if repository.config else None
    assert packed is not None
    level = "q4_1" if packed.method == "awq" else {4: "q4_0", 8: "q8_0"}[packed.bits]
    group = next((group for group in (128, 64) if packed.group % group == 0), 32)
    return {"llama.cpp": Target("gguf", level), "mlx": Target.parse(f"mlx:{packed.bits}bit-g{group}")}


def _cost(way: Way) -> int:
    return way.fetched + way.written


def _ready(asked: Asked, repositories: Iterable[Repository]) -> list[Way]:
    """Ways to models that are taken as they are."""
    ways = []
    for repository in repositories:
        for gguf in ggufs(repository):
            ways.append(Way(repository, gguf.files, "gguf", gguf.level or "gguf"))
        if repository.kind == "mlx":
            config = repository.config
            assert config is not None
            bits = config.quantization
            plain = {"float32": "mlx-f32", "float16": "mlx-f16"}.get(config.dtype, "mlx-bf16")
            label = plain if bits is None else f"mlx-{bits.bits}bit{'' if bits.group == 64 else f'-g{bits.group}'}"
            ways.append(Way(repository, checkpoint_files(repository), "mlx", label))
    return ways


def _made(asked: Asked, repositories: Iterable[Repository], backend: str, size_of: Callable[[Repository, Target], int]) -> list[Way]:
    """Ways to what was asked that end with a conversion."""
    ways = []
    for repository in repositories:
        if repository.kind in ("gptq", "awq"):
            chosen = [exact_targets(repository)[backend]]
        elif repository.kind == "original":
            chosen = _levels(asked, repository, backend)
        else:
            continue
        files = checkpoint_files(repository)
        ways += [Way(repository, files, "hf", targets=(target,), written=size_of(repository, target)) for target in chosen]
    return ways


def _levels(asked: Asked, repository: Repository, backend: str) -> list[Target]:
    """What an original may be converted to: the level asked for; else those to choose from."""
    level = asked.level
    if level.startswith("mlx"):
        weights = level.removeprefix("mlx").removeprefix("-") or "4bit"
        return [Target.parse(f"mlx:{weights}")]
    if level:
        level = level_of(f"-{level}") or level
        return [Target("gguf", level)] if level in GGUF else []
    start = "q8_0" if repository.config and parameters(repository.config) < _SMALL else "q4_k_m"
    if backend == "mlx":
        return [Target("mlx", "8bit" if start == "q8_0" else "4bit")]
    return [Target("gguf", weights) for weights in dict.fromkeys((start, "q4_k_m", "q3_k_m", "q2_k"))]


def _converted(
    asked: Asked, repositories: tuple[Repository, ...], targets: tuple[Target, ...], keep: bool, size_of: Callable[[Repository, Target], int]
) -> Way:
    """From the checkpoint, to the targets that were named."""
    for repository in repositories:
        if repository.kind in ("original", "gptq", "awq"):
            written = sum(size_of(repository, target) for target in targets)
            return Way(repository, checkpoint_files(repository), "hf", ORIGINAL if keep else "", targets, written)
    for repository in repositories:
        if repository.kind == "mlx" or ggufs(repository):
            hint = "Name the repository of the original, or leave --to and --original away."
            raise UnsupportedModel(f"{repository.id} is quantized already; conversions start from the original checkpoint.", hint=hint)
    raise _nothing(asked, repositories)


def _matches(level: str, way: Way) -> bool:
    level = level.removesuffix(".gguf")
    if way.repository.kind in ("gptq", "awq"):
        return level in (*_FOREIGN, *way.labels)
    if level in ("gguf", "mlx"):
        return way.format == level or any(target.format == level for target in way.targets)
    if level in way.labels or (level_of(f"-{level}") or level) in way.labels:
        return True
    return way.format == "gguf" and any(file.name.lower().startswith(level) for file in way.files)


def _start(asked: Asked, way: Way) -> str:
    if asked.model:
        return asked.model.size.recommended
    config = way.repository.config
    weights = parameters(config) if config else way.weights
    return "q8_0" if weights < _SMALL else "q4_k_m"


def _rank(way: Way, start: str) -> int:
    """0 for the level to start from, then down the order; what is not in it comes last."""
    label = way.labels[0]
    if way.format == "mlx" or (way.targets[:1] and way.targets[0].format == "mlx"):
        match = re.search(r"(\d)bit", label)
        bits = int(match[1]) if match else 16
        return 0 if bits == 8 and start == "q8_0" else 1 + (_BITS.index(bits) if bits in _BITS else len(_BITS))
    return 0 if label == start else 1 + (_ORDER.index(label) if label in _ORDER else len(_ORDER))


def _require(ways: list[Way], asked: Asked, ready: list[Way]) -> list[Way]:
    if ways:
        return ways
    if asked.level or asked.file:
        there = ", ".join(dict.fromkeys(label for way in ready for label in way.labels)) or "nothing that runs as it is"
        raise UnknownModel(f'{asked.where} has no "{asked.level or asked.file}".', hint=f"There is: {there[:500]}.")
    raise _nothing(asked, ())


def _nothing(asked: Asked, repositories: Iterable[Repository]) -> UnknownModel | UsageError:
    held = next((file.path for one in repositories for file in one.files), "")
    fault = f"{asked.where} holds no model that is run here{f' (but {held[:80]}, say)' if held else ''}."
    return UnknownModel(fault, hint="A model is a .gguf file, or config.json with .safetensors files.")
