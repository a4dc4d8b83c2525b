"""What `selftest` has a model do, and how it compares what came of it. Plain data: all of it goes into the report."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qwen2_local import store
from qwen2_local.errors import BackendUnavailable, DoesNotFit, Qwen2LocalError, UnknownModel
from qwen2_local.kvcache import settings
from qwen2_local.types import Completion

if TYPE_CHECKING:
    from qwen2_local.model import Qwen2
    from qwen2_local.stream import Stream

PROMPTS = {
    "english": "Why is the sky blue? Answer in two sentences.",
    "chinese": "用一句话解释什么是量化。",
    "code": "Write a Python function that says whether a number is prime.",
    "copying": "Repeat exactly: one two three four five six seven eight nine ten eleven twelve thirteen fourteen.",
    "german": "Was ist der Unterschied zwischen GGUF und MLX?",
}
TEXTS = {
    "english": "The sky is blue because air scatters short waves of light more than long ones. In the evening the light has a longer way through "
    "the air, so that more of the blue is lost, and what is left looks red.",
    "chinese": "天空是蓝色的，因为空气对短波光的散射比对长波光更强。傍晚时，光线穿过空气的路程更长，蓝光损失更多，剩下的光看起来是红色的。",
    "code": "def is_prime(number):\n    if number < 2:\n        return False\n    for divisor in range(2, int(number ** 0.5) + 1):\n"
    "        if number % divisor == 0:\n            return False\n    return True\n",
}
_LONG = "The engine keeps the longest prefix it already knows, and computes only what is new. "

NOISE = 0.5
"""Nats. Batches of another size round otherwise, by up to this on any backend; what is wrong is further off."""

_TOKENS = 24
_TOP = 20
_KV_REPEATS = 40
_GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to try. backend: None for the one that its format has. bits: of a weight."""

    label: str
    name: str
    backend: str | None
    bits: float


@dataclass(frozen=True, slots=True)
class Written:
    """A greedy reply. Of each token: its log-probability, and the likeliest ids there with theirs."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]
    text: str

    @classmethod
    def of(cls, completion: Completion) -> Written:
        """Of a reply with log-probabilities."""
        logprobs = tuple(logprob for logprob, _ in completion.logprobs)
        return cls(completion.tokens, logprobs, tuple(top for _, top in completion.logprobs), completion.text)


@dataclass(frozen=True, slots=True)
class Check:
    """Something that has to hold. passed: None where it could not be tried."""

    what: str
    passed: bool | None
    detail: str


@dataclass(slots=True)
class Trial:
    """What came of a candidate. error: why it could not be tried; skipped: that is nobody's fault."""

    candidate: Candidate
    backend: str = ""
    version: str = ""
    load_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    replies: dict[str, Written] = field(default_factory=dict)
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    error: str = ""
    skipped: bool = False

    @property
    def perplexity(self) -> float | None:
        """Of all texts together."""
        logprobs = [logprob for scores in self.scores.values() for logprob in scores]
        return math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else None

    @property
    def passed(self) -> bool:
        """Nothing is wrong with it."""
        return self.skipped or (not self.error and all(check.passed is not False for check in self.checks))


@dataclass(frozen=True, slots=True)
class Parting:
    """How two replies to one prompt compare. at: the first token that differs, or None. margin: by how many nats the first preferred its own
    token there. drift: the largest difference of log-probabilities before it.
    """

    at: int | None
    margin: float
    drift: float

    @property
    def is_noise(self) -> bool:
        """May rounding explain it?"""
        return self.margin <= NOISE and self.drift <= NOISE

    def __str__(self) -> str:
        if self.at is None:
            return f"the same tokens, log-probabilities within {self.drift:.3f}"
        return f"parts at token {self.at}, where {self.margin:.3f} decided; before it within {self.drift:.3f}"


def parting(one: Written, other: Written) -> Parting:
    """Compare two replies. Where the other's token is not among the first's likeliest, the margin is at least what is given."""
    shared = min(len(one.tokens), len(other.tokens))
    at = next((place for place in range(shared) if one.tokens[place] != other.tokens[place]), None)
    drift = max((abs(a - b) for a, b in zip(one.logprobs[: shared if at is None else at], other.logprobs, strict=False)), default=0.0)
    if at is None:
        return Parting(None if len(one.tokens) == len(other.tokens) else shared, 0.0, drift)
    known = dict(one.tops[at])
    margin = one.logprobs[at] - known.get(other.tokens[at], min(known.values(), default=-math.inf))
    return Parting(at, margin, drift)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two candidates. differing: mean difference of the log-probabilities of all texts' tokens; ratio: of the perplexities."""

    reference: str
    other: str
    partings: Mapping[str, Parting]
    differing: float
    ratio: float
    passed: bool
    detail: str


def compared(reference: Trial, other: Trial) -> Comparison:
    """Hold a candidate against a more exact one. What fewer bits may cost is judged by the texts, replies part early for honest reasons."""
    partings = {
        name: parting(reference.replies[name], other.replies[name]) for name in PROMPTS if name in reference.replies and name in other.replies
    }
    pairs = [(a, b) for name in TEXTS if name in reference.scores and name in other.scores
             for a, b in zip(reference.scores[name], other.scores[name], strict=False)]  # fmt: skip
    differing = math.fsum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else 0.0
    ratio = (other.perplexity or 1.0) / (reference.perplexity or 1.0)
    bits = other.candidate.bits
    # As a part of what a token's log-probability is on average: rounding costs little of it, four bits a twentieth on real models.
    usual = math.fsum(abs(a) for a, _ in pairs) / len(pairs) if pairs else 0.0
    limit = 0.02 + usual * (0.03 if bits >= 12 else 0.06 if bits >= 7.5 else 0.5)
    same_vocabulary = all(
        len(reference.scores[name]) == len(other.scores[name]) for name in TEXTS if name in reference.scores and name in other.scores
    )
    wide = [f"{name}: {one}" for name, one in partings.items() if not one.is_noise] if bits >= 12 else []
    if not same_vocabulary:
        detail = "their tokens differ: these are different models"
    elif differing > limit:
        detail = f"log-probabilities differ by {differing:.3f} on average, more than {limit:.3f}"
    else:
        detail = "; ".join(wide)
    return Comparison(reference.candidate.label, other.candidate.label, partings, differing, ratio, not detail, detail)


def candidates(names: Sequence[str], available: Sequence[str], backend: str | None = None) -> list[Candidate]:
    """What to try for models as a person names them: each level and format that is at hand. Raises UnknownModel."""
    found: list[Candidate] = []
    for name in names:
        if name.lower() == store.GUIDE:
            levels = [("llama.cpp", level) for level in ("f16", "q8_0", "q4_0")] + [("mlx", f"mlx-{level}") for level in ("bf16", "8bit", "4bit")]
            found += [Candidate(f"guide:{level}", f"guide:{level}", own, _bits(level)) for own, level in levels]
            continue
        installed = [one.name for one in store.Store().list() if one.name.startswith(f"{name.lower()}:") and not one.name.endswith(":original")]
        for each in installed or [name]:
            found += _of(each)
    kept = [one for one in found if one.backend in available and backend in (None, one.backend)]
    if not kept:
        raise BackendUnavailable("None of the backends that these models need is here.", hint="Run `qwen2-local doctor`.")
    return sorted(kept, key=lambda one: -one.bits)


def _of(name: str) -> list[Candidate]:
    ref = store.resolve(name)
    if ref.format != "hf":
        from qwen2_local.formats.summarize import summarize

        own = {"gguf": "llama.cpp", "mlx": "mlx"}[ref.format]
        return [Candidate(ref.label, name, own, round(summarize(ref.path).bits_per_weight or 0.0, 2))]
    if ref.target:
        return [Candidate(ref.label, name, "mlx" if ref.target.startswith("mlx:") else "llama.cpp", _bits(ref.target))]
    return [Candidate(f"{ref.label} (GGUF F16)", name, "llama.cpp", 16.0), Candidate(f"{ref.label} (MLX BF16)", name, "mlx", 16.0)]


def _bits(level: str) -> float:
    number = re.search(r"(?:b?f|i?q)(\d+)|(\d)bit|mixed_(\d)", level)
    return float(next(group for group in number.groups() if group)) if number else 0.0


def tried(candidate: Candidate, load: Callable[..., Qwen2], say: Callable[[str], None]) -> Trial:
    """Load a candidate and have it do everything. load: `Qwen2`, with what all candidates are loaded with. say: told what is being done."""
    trial = Trial(candidate)
    try:
        _try(trial, load, say)
    except (DoesNotFit, UnknownModel) as error:
        trial.error, trial.skipped = f"{type(error).__name__}: {error}", True
    except Qwen2LocalError as error:
        trial.error = f"{type(error).__name__}: {error}"
    return trial


def _try(trial: Trial, load: Callable[..., Qwen2], say: Callable[[str], None]) -> None:
    say("loading")
    name, backend = trial.candidate.name, trial.candidate.backend
    began = time.perf_counter()
    with load(name, backend=backend) as model:
        trial.load_s = time.perf_counter() - began
        trial.backend, trial.version, trial.notes = model.info.name, model.info.version, model.notes
        for prompt, text in PROMPTS.items():
            say(f"writing: {prompt}")
            completion = _begin(model, text).finish()
            trial.replies[prompt] = Written.of(completion)
            trial.decode_tokens_per_s = max(trial.decode_tokens_per_s, completion.usage.decode_tokens_per_s)
        for prompt, text in TEXTS.items():
            say(f"scoring: {prompt}")
            trial.scores[prompt] = model.score(text).logprobs
        trial.checks.append(_numbers(trial))
        say("once more, from the cache")
        again = {prompt: Written.of(_begin(model, text).finish()) for prompt, text in PROMPTS.items()}
        trial.checks.append(_same("a second time, its prompt cached", trial.replies, again))
        say("all at once")
        streams = {prompt: _begin(model, text) for prompt, text in PROMPTS.items()}
        trial.checks.append(_same("all prompts at once", trial.replies, {prompt: Written.of(stream.finish()) for prompt, stream in streams.items()}))
        say("with lookup")
        drafted = {prompt: Written.of(_begin(model, text, lookup=True).finish()) for prompt, text in PROMPTS.items()}
        trial.checks.append(_same("with prompt lookup", trial.replies, drafted))
        say("saving KV")
        repeats = min(_KV_REPEATS, model.longest // 2 // len(model.tokenizer.encode(_LONG)))
        # Begins like no other text, so that no earlier run has computed it.
        long = f"{secrets.token_hex(8)}\n{_LONG * repeats}"
        cold = _begin(model, long, persist=True).finish()
    say("restoring KV")
    with load(name, backend=backend) as model:
        warm = _begin(model, long, persist=True).finish()
        model.forget({*cold.chunks, *warm.chunks})
    trial.checks.append(_restored(cold, warm))


def _begin(model: Qwen2, text: str, *, lookup: bool = False, persist: bool = False) -> Stream:
    from qwen2_local.types import Message

    messages = [Message("user", text)]
    return model.respond(messages, max_tokens=_TOKENS, logprobs=_TOP, lookup=lookup, persist=persist, **_GREEDY)


def _numbers(trial: Trial) -> Check:
    """Log-probabilities that can be such."""
    values = [value for scores in (*trial.scores.values(), *(reply.logprobs for reply in trial.replies.values())) for value in scores]
    wrong = sum(not math.isfinite(value) or value > 1e-3 for value in values)
    unlikely = sum(
        token != top[0][0] and top[0][1] - logprob > 1e-3
        for reply in trial.replies.values()
        for token, logprob, top in zip(reply.tokens, reply.logprobs, reply.tops, strict=True)
    )
    return Check(
        "its numbers", not wrong and not unlikely, f"{len(values):,} log-probabilities, {wrong} impossible; {unlikely} tokens not the likeliest"
    )


def _same(what: str, before: Mapping[str, Written], after: Mapping[str, Written]) -> Check:
    partings = {name: parting(before[name], after[name]) for name in before}
    apart = {name: one for name, one in partings.items() if one.at is not None}
    drift = max((one.drift for one in partings.values()), default=0.0)
    detail = "; ".join(f"{name} {one}" for name, one in apart.items()) or f"the same tokens, log-probabilities within {drift:.4f}"
    return Check(what, all(one.is_noise for one in partings.values()), detail)


def _restored(cold: Completion, warm: Completion) -> Check:
    what = "KV from the disk, in a new process"
    if not cold.chunks or not settings.is_on():
        return Check(what, None, "nothing was kept: the KV cache is switched off, or cannot be used here")
    apart = parting(Written.of(cold), Written.of(warm))
    detail = f"{warm.usage.cached_tokens:,} of {warm.usage.prompt_tokens:,} tokens were there; {apart}"
    return Check(what, warm.usage.cached_tokens >= warm.usage.prompt_tokens // 2 and apart.is_noise, detail)
