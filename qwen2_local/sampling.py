"""The one meaning of sampling, in NumPy. Backends that sample on a device are tested against this.

In this order: ids from `limit` on are out; logit bias; repetition penalty (Hugging Face's: logits above zero are divided, others multiplied);
presence and frequency penalty (OpenAI's: subtracted); mask; temperature; top_k; softmax; top_p (the smallest start of the likeliest that
reaches it); min_p; one uniform number through the inverse of the cumulative distribution, candidates ordered by probability, then id.
So (seed, position) decides a token alike on every backend. `choose` does it fast, `reference` and `distribution` plainly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from qwen2_local.backends.base import Choice, Chosen, Mask, Scores
from qwen2_local.types import Sampling

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

_WORD = 2**64 - 1
_SHORTLIST = 1024
_LARGEST = float(np.finfo(np.float32).max)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for the token at `position`: SplitMix64 of both (Steele et al., 2014), its top 53 bits."""
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return ((z ^ (z >> 31)) >> 11) / 2**53


def choose(logits: Logits, choice: Choice) -> Chosen:
    """The next token for one row of logits [vocabulary], which stays as it is.

    Its token is -1 where the logits below the limit hold a NaN or +inf, or leave no id that may be chosen.
    """
    raw = logits[: choice.limit]
    # argmax finds a NaN first, so this one look covers all of them.
    best = int(raw.argmax())
    if not np.isfinite(raw[best]):
        return Chosen(-1)
    # The mask first: what it excludes stays so, and one copy of the logits serves for both.
    scores = raw if choice.mask is None else _masked(raw, choice.mask())
    scores = _adjusted(scores, choice, fresh=scores is not raw)
    if scores is not raw:
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            return Chosen(-1)
    token = best if choice.temperature == 0.0 else _draw(scores, best, choice)
    return Chosen(token) if choice.top_logprobs is None else _with_logprobs(raw, token, choice.top_logprobs)


def score(logits: Logits, targets: Sequence[int], limit: int) -> Scores:
    """How likely each target was by its row of logits [n, vocabulary], over the ids below `limit`."""
    rows = logits[:, :limit]
    wanted = np.asarray(targets, np.intp)
    logprobs = np.array([float(row[token]) - _log_total(row) for row, token in zip(rows, wanted, strict=True)])
    return Scores(logprobs, rows.argmax(axis=1) == wanted)


class Window:
    """The tokens of one sequence as its penalties see them. Grows by `add`, and forgets drafted tokens by `drop`."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self._sampling = sampling
        self._penalized = _Tally() if sampling.repetition_penalty != 1.0 else None
        self._counted = _Tally() if sampling.presence_penalty or sampling.frequency_penalty else None
        self._size = sampling.penalty_window
        self._prompt = len(prompt)
        self._tokens = list(prompt) if self._penalized or self._counted else []
        if self._penalized:
            self._penalized.fill(self._tokens if self._size is None else self._tokens[-self._size :])

    def add(self, token: int) -> None:
        """A token of the reply."""
        if self._penalized is None and self._counted is None:
            return
        self._move(token, 1)
        self._tokens.append(token)
        leaving = len(self._tokens) - 1 - (self._size or len(self._tokens))
        if leaving >= 0:
            self._move(self._tokens[leaving], -1, reply=leaving >= self._prompt)

    def drop(self, count: int) -> None:
        """Forget the last `count` tokens that were added."""
        for _ in range(count if self._tokens else 0):
            back = len(self._tokens) - 1 - (self._size or len(self._tokens))
            self._move(self._tokens.pop(), -1)
            if back >= 0:
                self._move(self._tokens[back], 1, reply=back >= self._prompt)

    def choice(self, limit: int, uniform: float, *, mask: Callable[[], Mask] | None = None, top_logprobs: int | None = None) -> Choice:
        """How to choose the next token; what is added later does not change it."""
        s = self._sampling
        return Choice(
            limit,
            s.temperature,
            s.top_p,
            s.top_k,
            s.min_p,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
            uniform,
            self._penalized.ids() if self._penalized else _NO_IDS,
            self._counted.ids() if self._counted else _NO_IDS,
            self._counted.counts() if self._counted else _NO_IDS,
            s.logit_bias,
            mask,
            top_logprobs,
        )

    def _move(self, token: int, by: int, *, reply: bool = True) -> None:
        if self._penalized is not None:
            self._penalized.change(token, by)
        if self._counted is not None and reply:
            self._counted.change(token, by)


_NO_IDS = np.empty(0, np.int32)


class _Tally:
    """How often each id occurs, packed, so that a snapshot is two copies."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(64, np.int32)
        self._counts = np.empty(64, np.int32)

    def __bool__(self) -> bool:
        return True

    def fill(self, tokens: Sequence[int]) -> None:
        """Count many at once, in an empty tally."""
        ids, counts = np.unique(np.asarray(tokens, np.int32), return_counts=True)
        self._place = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._ids, self._counts = np.append(ids, self._ids), np.append(counts.astype(np.int32), self._counts)

    def change(self, token: int, by: int) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, 0
        self._counts[place] += by
        if not self._counts[place]:  # the last one takes its place
            last = len(self._place) - 1
            moved = int(self._ids[last])
            self._ids[place], self._counts[place], self._place[moved] = moved, self._counts[last], place
            del self._place[token]

    def ids(self) -> Ids:
        return _snapshot(self._ids[: len(self._place)])

    def counts(self) -> Ids:
        return _snapshot(self._counts[: len(self._place)])


def _snapshot(ids: Ids) -> Ids:
    """A copy, by way of bytes: NumPy's own gives the interpreter to another thread meanwhile, and whoever decodes waits to get it back."""
    return np.frombuffer(ids.tobytes(), np.int32)


def _adjusted(scores: Logits, choice: Choice, *, fresh: bool) -> Logits:
    """With bias and penalties; `scores` itself where there are none, or where it is fresh and may be changed."""
    repeats = choice.repetition_penalty != 1.0 and len(choice.penalized)
    counts = (choice.presence_penalty or choice.frequency_penalty) and len(choice.counted)
    if not (repeats or counts or choice.logit_bias):
        return scores
    if not fresh:
        scores = scores.copy()
    if choice.logit_bias:
        ids = np.fromiter(choice.logit_bias.keys(), np.intp, len(choice.logit_bias))
        bias = np.fromiter(choice.logit_bias.values(), np.float64, len(choice.logit_bias))[ids < scores.size]
        ids = ids[ids < scores.size]
        _put(scores, ids, scores[ids] + bias)
    if repeats:
        ids = np.asarray(choice.penalized, np.intp)
        ids = ids[ids < scores.size]
        seen = scores[ids].astype(np.float64)
        _put(scores, ids, np.where(seen > 0, seen / choice.repetition_penalty, seen * choice.repetition_penalty))
    if counts:
        ids = np.asarray(choice.counted, np.intp)
        penalty = choice.presence_penalty + choice.frequency_penalty * np.asarray(choice.counts, np.float64)[ids < scores.size]
        ids = ids[ids < scores.size]
        _put(scores, ids, scores[ids] - penalty)
    return scores


def _put(scores: Logits, ids: npt.NDArray[np.intp], values: npt.NDArray[np.float64]) -> None:
    """Set some scores; what was minus infinity stays, and nothing else becomes infinite."""
    scores[ids] = np.where(np.isneginf(values), values, np.clip(values, -_LARGEST, _LARGEST))


def _masked(scores: Logits, mask: Mask) -> Logits:
    """Minus infinity where the mask's bit is not set."""
    size = min(scores.size, 32 * mask.size)
    bits = np.unpackbits(mask.astype("<u4", copy=False).view(np.uint8), count=size, bitorder="little")
    # Minima with infinities are five times as fast as `where`, whose branches are guessed wrong. In place, as fresh pages are dear.
    result = np.full_like(scores, -0.5)
    result[:size] += bits
    np.copysign(np.float32(np.inf), result, out=result)
    return np.minimum(scores, result, out=result)


def _draw(scores: Logits, best: int, choice: Choice) -> int:
    """A draw at a temperature. Sorting a whole vocabulary takes 20 ms, so first the likeliest thousand are tried: they nearly always decide."""
    limited = 0 < choice.top_k < scores.size
    cut = choice.top_p < 1.0 or choice.min_p > 0.0
    total = None
    for count in (choice.top_k,) if limited else (_SHORTLIST, 16 * _SHORTLIST, scores.size):
        ids = _likeliest(scores, count)
        weights = _weights(scores[ids], scores[best], choice.temperature)
        cumulative = np.cumsum(weights)
        # All cuts keep a start of the candidates. One that falls among these settles what is kept; so does having all of them.
        whole = limited or len(ids) < count or count >= scores.size
        if not whole and total is None:
            total = _total(scores, ids, weights, choice.temperature)
        mass = float(cumulative[-1]) if whole or total is None else total
        kept = int(np.count_nonzero(weights >= choice.min_p if choice.min_p else weights))
        if choice.top_p < 1.0:
            kept = min(kept, 1 + int(np.searchsorted(cumulative, choice.top_p * mass, side="left")))
        settled = whole or kept < len(ids)
        if settled:
            mass = float(cumulative[kept - 1])
        index = int(np.searchsorted(cumulative[:kept], choice.uniform * mass, side="right"))
        if settled or (index < kept and not cut):
            break
    return int(ids[min(index, kept - 1)])


def _weights(scores: Logits, highest: np.float32, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities as parts of the highest one."""
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: minus infinity is right
        return np.exp((scores.astype(np.float64) - np.float64(highest)) / temperature)


def _total(scores: Logits, ids: npt.NDArray[np.intp], weights: npt.NDArray[np.float64], temperature: float) -> float:
    """The sum of all weights. Those of `ids`, the likeliest, are known; for the others float32 is enough, in a tenth of the time."""
    with np.errstate(over="ignore", under="ignore"):
        light = scores - scores[ids[0]]
        light /= np.float32(max(temperature, 1e-30))
        np.exp(light, out=light)
    light[ids] = 0.0
    return float(weights.sum() + light.sum(dtype=np.float64))


def _likeliest(scores: Logits, count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` highest scores, highest first; at a tie the lower id first. None of minus infinity, so there may be fewer."""
    groups = max(4 * count, 1024)
    lowest = np.float32(-_LARGEST)
    if groups < scores.size:
        # The count-th highest of the maxima of disjoint groups is no higher than the count-th highest score, and far cheaper to find.
        maxima = scores[: scores.size // groups * groups].reshape(-1, groups).max(axis=0)
        lowest = max(lowest, np.partition(maxima, groups - count)[groups - count])
    ids = np.flatnonzero(scores >= lowest)
    return ids[np.argsort(-scores[ids], kind="stable")[:count]]


def _with_logprobs(raw: Logits, token: int, count: int) -> Chosen:
    total = _log_total(raw)
    top = tuple((int(number), float(raw[number]) - total) for number in _likeliest(raw, count)) if count else ()
    return Chosen(token, float(raw[token]) - total, top)


def _log_total(row: Logits) -> float:
    """The logarithm of the sum of the exponentials."""
    ids = _likeliest(row, 16)
    return float(row[ids[0]]) + math.log(_total(row, ids, _weights(row[ids], row[ids[0]], 1.0), 1.0))


def reference(logits: Logits, choice: Choice) -> Chosen:
    """What `choose` does, in plain Python: slow, and easy to see through. Tests compare the two."""
    raw = [float(logit) for logit in logits[: choice.limit]]
    likely = distribution(logits, choice)
    if not likely:
        return Chosen(-1)
    mark = choice.uniform * math.fsum(likely.values())
    below = np.cumsum(list(likely.values()))
    token = list(likely)[min(sum(1 for edge in below if edge <= mark), len(likely) - 1)]
    if choice.top_logprobs is None:
        return Chosen(token)
    total = max(raw) + math.log(math.fsum(math.exp(logit - max(raw)) for logit in raw))
    finite = (number for number in range(len(raw)) if raw[number] > -math.inf)
    likeliest = sorted(finite, key=lambda number: (-raw[number], number))[: choice.top_logprobs]
    return Chosen(token, raw[token] - total, tuple((number, raw[number] - total) for number in likeliest))


def distribution(logits: Logits, choice: Choice) -> dict[int, float]:
    """The probability of every id that can be chosen, likeliest first, of alike ones the lower id first; in plain Python, for `reference`.

    Empty where `choose` gives -1.
    """
    scores = [float(logit) for logit in logits[: choice.limit]]
    if any(math.isnan(score) or score == math.inf for score in scores):
        return {}

    def put(token: int, value: float) -> None:
        scores[token] = value if value == -math.inf else float(np.float32(max(-_LARGEST, min(_LARGEST, value))))

    for token, bias in choice.logit_bias.items():
        if token < len(scores):
            put(token, scores[token] + bias)
    for token in {int(token) for token in choice.penalized}:
        if token < len(scores) and choice.repetition_penalty != 1.0:
            above = scores[token] > 0
            put(token, scores[token] / choice.repetition_penalty if above else scores[token] * choice.repetition_penalty)
    for token, count in zip(choice.counted, choice.counts, strict=True):
        if token < len(scores):
            put(int(token), scores[token] - (choice.presence_penalty + choice.frequency_penalty * int(count)))
    allowed: Iterable[int] = range(len(scores))
    if choice.mask is not None:
        mask = choice.mask()
        allowed = [token for token in allowed if token // 32 < len(mask) and int(mask[token // 32]) >> token % 32 & 1]
    order = sorted((token for token in allowed if scores[token] > -math.inf), key=lambda token: (-scores[token], token))
    if choice.temperature == 0.0:
        return {token: 1.0 for token in order[:1]}
    if choice.top_k:
        order = order[: choice.top_k]
    weights = [math.exp((scores[token] - scores[order[0]]) / choice.temperature) for token in order]
    whole, kept, sum_so_far = math.fsum(weights), 0, 0.0
    while kept < len(order) and (kept == 0 or sum_so_far < choice.top_p * whole or choice.top_p == 1.0):
        sum_so_far += weights[kept]
        kept += 1
    likely = {token: weight for token, weight in zip(order[:kept], weights, strict=False) if weight > 0 and weight >= choice.min_p}
    total = math.fsum(likely.values())
    return {token: weight / total for token, weight in likely.items()}
