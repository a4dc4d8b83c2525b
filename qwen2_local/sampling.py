"""The one meaning of sampling, in plain NumPy. Backends that sample on a device are tested against this.

Order: ids from `limit` on are out; repetition penalty; temperature; top_k; softmax; top_p; one uniform number through the inverse of the
cumulative distribution, candidates ordered by probability, then id. So (seed, position) decides a token alike on every backend.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwen2_local.backends.base import Choice

_MASK = 2**64 - 1
_SHORTLIST = 1024


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for the token at `position`: SplitMix64 of both (Steele et al., 2014), its top 53 bits."""
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def choose(logits: npt.NDArray[np.float32], choice: Choice) -> int:
    """The next token for one row of logits [vocabulary]. Does not change `logits`. -1 if they hold a NaN or +inf."""
    scores = logits[: choice.limit]
    if choice.repetition_penalty != 1.0 and len(choice.penalized):
        scores = scores.copy()
        ids = np.asarray(choice.penalized, dtype=np.intp)
        ids = ids[ids < scores.size]
        seen = scores[ids]
        scores[ids] = np.where(seen > 0, seen / choice.repetition_penalty, seen * choice.repetition_penalty)
    best = int(scores.argmax())
    # argmax finds a NaN first, so this one look covers all of them.
    if not np.isfinite(scores[best]):
        return -1
    if choice.temperature == 0.0:
        return best
    return _draw(scores, best, choice)


def _draw(scores: npt.NDArray[np.float32], best: int, choice: Choice) -> int:
    """A draw at a temperature. Sorting a whole vocabulary takes 50 ms, so first the likeliest thousand are tried: they nearly always decide."""
    limited = 0 < choice.top_k < scores.size
    total = 0.0 if limited else float(_weights(scores, scores[best], choice.temperature).sum())
    for count in (choice.top_k,) if limited else (_SHORTLIST, scores.size):
        ids = _likeliest(scores, count)
        cumulative = np.cumsum(_weights(scores[ids], scores[best], choice.temperature))
        whole = limited or count >= scores.size  # no other id can be drawn
        mass = float(cumulative[-1]) if whole else total
        if choice.top_p < 1.0:
            last = int(np.searchsorted(cumulative, choice.top_p * mass, side="left"))
            if last == len(cumulative) and not whole:
                continue
            cumulative, whole = cumulative[: last + 1], True
            mass = float(cumulative[-1])
        index = int(np.searchsorted(cumulative, choice.uniform * mass, side="right"))
        if whole or index < len(cumulative):
            break
    return int(ids[min(index, len(cumulative) - 1)])


def _weights(scores: npt.NDArray[np.float32], highest: np.float32, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities but for a factor."""
    with np.errstate(over="ignore"):  # a tiny temperature: minus infinity is right
        return np.exp((scores.astype(np.float64) - np.float64(highest)) / temperature)


def _likeliest(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Ids of the `count` highest scores, highest first; at a tie the lower id first."""
    if count >= scores.size:
        return np.lexsort((np.arange(scores.size), -scores))
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    ids = np.flatnonzero(scores >= threshold)
    return ids[np.lexsort((ids, -scores[ids]))][:count]
