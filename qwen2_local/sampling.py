"""The one meaning of sampling, in plain NumPy. Backends that sample on a device are tested against this.

Order: ids from `limit` on are out; repetition penalty; temperature; top_k; softmax; top_p; one uniform number through the inverse of the
cumulative distribution, candidates ordered by probability, then id. So (seed, position) decides a token alike on every backend.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qwen2_local.backends.base import Choice

_MASK = 2**64 - 1


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
    if 0 < choice.top_k < scores.size:
        # At a tie for the last place, the lower ids stay.
        threshold = np.partition(scores, scores.size - choice.top_k)[scores.size - choice.top_k]
        ids = np.flatnonzero(scores >= threshold)
    else:
        ids = np.arange(scores.size)
    kept = scores[ids].astype(np.float64)
    order = np.lexsort((ids, -kept))
    if choice.top_k > 0:
        order = order[: choice.top_k]
    ids, kept = ids[order], kept[order]
    with np.errstate(over="ignore"):  # a tiny temperature: minus infinity is right
        weights = np.exp((kept - kept[0]) / choice.temperature)
    cumulative = np.cumsum(weights)
    if choice.top_p < 1.0:
        last = int(np.searchsorted(cumulative, choice.top_p * cumulative[-1], side="left"))
        cumulative = cumulative[: last + 1]
    index = int(np.searchsorted(cumulative, choice.uniform * cumulative[-1], side="right"))
    return int(ids[min(index, len(cumulative) - 1)])
