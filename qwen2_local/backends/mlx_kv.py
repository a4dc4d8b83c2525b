"""Keys and values on MLX: where a sequence keeps them, in 16 or 8 bits, and attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from qwen2_local.formats.config import Qwen2Config, Yarn

KV_STEP = 256
"""Tokens by which a KV cache grows."""

_SCORES = 1 << 24
"""Attention scores that are in memory at once, where they are written down at all: queries go in blocks."""


@dataclass(slots=True)
class LayerKv:
    """Keys and values of one sequence in one layer, as the arrays [1, kv_heads, room, channels] of a format.

    What lies past the sequence's length means nothing. The arrays are never changed for others that hold them: `fork` shares them.
    """

    arrays: list[mx.array] = field(default_factory=list)

    def write(self, start: int, new: Sequence[mx.array]) -> list[mx.array]:
        """Put arrays [1, kv_heads, tokens, channels] at position `start`; all of them from 0 on."""
        stop = start + new[0].shape[2]
        if not self.arrays or self.arrays[0].shape[2] < stop:
            old = self.arrays or [part[:, :, :0] for part in new]
            self.arrays = [_grown(part, start, stop) for part in old]
        for array, part in zip(self.arrays, new, strict=True):
            array[:, :, start:stop] = part
        return [array[:, :, :stop] for array in self.arrays]

    def fork(self, length: int) -> LayerKv:
        """The first `length` tokens for another sequence; no copy until either writes."""
        return LayerKv([array[:, :, :length] for array in self.arrays])


def _grown(old: mx.array, used: int, needed: int) -> mx.array:
    kept = min(used, old.shape[2])
    room = -(-needed // KV_STEP) * KV_STEP
    _, heads, _, channels = old.shape
    return mx.concatenate([old[:, :, :kept], mx.zeros((1, heads, room - kept, channels), old.dtype)], axis=2)


class Rope:
    """Rotary positions (Su et al., 2021), stretched by YaRN (Peng et al., 2023) if `yarn` is given."""

    def __init__(self, config: Qwen2Config, yarn: Yarn | None) -> None:
        self._theta, self._channels = config.rope_theta, config.head_dim
        self._periods = None if yarn is None else mx.array(yarn_periods(config, yarn), mx.float32)
        self._table = mx.zeros((0, config.head_dim))
        self.scale = _temperature(yarn) ** 2 / math.sqrt(config.head_dim)
        """What attention multiplies queries times keys by: YaRN's temperature is a factor on both."""

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        """Rotate x [tokens, heads, 1, head_dim] to its `positions` [tokens]."""
        # To MLX each token is a sequence of one, with an offset of its own.
        base = self._theta if self._periods is None else None
        return mx.fast.rope(x, self._channels, traditional=False, base=base, scale=1.0, offset=positions, freqs=self._periods)

    def table(self, count: int) -> mx.array:
        """Cosines, then sines, of all pairs of channels at the positions 0 to `count`, [count, head_dim]."""
        if self._table.shape[0] < count:
            room = 1 << max(10, (count - 1).bit_length())
            pairs = mx.arange(self._channels // 2)
            frequencies = mx.power(self._theta, -2 * pairs / self._channels) if self._periods is None else 1 / self._periods
            angles = mx.arange(room)[:, None] * frequencies
            self._table = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=1)
            mx.eval(self._table)
        return self._table[:count]


def _temperature(yarn: Yarn | None) -> float:
    """YaRN's factor on queries and on keys (Peng et al., 2023, equation 22)."""
    return 0.1 * math.log(yarn.factor) + 1 if yarn is not None and yarn.factor > 1 else 1.0


def yarn_periods(config: Qwen2Config, yarn: Yarn) -> list[float]:
    """Tokens per radian of each pair of channels [head_dim / 2]: as they were where a pair turns 32 times or more within the original
    context, `factor` times longer where it turns once or less, and a ramp between. As transformers defines it.
    """
    dim = config.head_dim

    def pair_that_turns(times: float) -> float:
        return dim * math.log(yarn.original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), dim - 1)
    width = high - low or 0.001
    periods = []
    for pair in range(dim // 2):
        stretched = min(max((pair - low) / width, 0.0), 1.0)
        frequency = config.rope_theta ** (-2 * pair / dim)
        periods.append(1 / (frequency / yarn.factor * stretched + frequency * (1 - stretched)))
    return periods


@dataclass(frozen=True, slots=True)
class Offsets:
    """The biases of keys (before they are rotated) and of values, float32 [kv_heads, head_dim]."""

    keys: mx.array
    values: mx.array


class KvFormat(Protocol):
    """How keys and values are kept."""

    @property
    def parts(self) -> tuple[tuple[int, mx.Dtype], ...]:
        """Channels and type of each array of a `LayerKv`."""
        ...

    @property
    def without_biases(self) -> bool:
        """Are keys and values given without their biases, and these to `attend`?"""
        ...

    def encode(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """The arrays to keep for keys and values [1, kv_heads, tokens, head_dim]."""
        ...

    def attend(self, queries: mx.array, kept: Sequence[mx.array], rope: Rope, offsets: Offsets | None) -> mx.array:
        """Causal attention of the last tokens of a sequence, queries [1, heads, tokens, head_dim], over all that is kept of it."""
        ...


@dataclass(frozen=True, slots=True)
class PlainKv:
    """Keys and values in the type of the activations."""

    head_dim: int
    dtype: mx.Dtype
    without_biases = False

    @property
    def parts(self) -> tuple[tuple[int, mx.Dtype], ...]:
        """Keys, values."""
        return ((self.head_dim, self.dtype),) * 2

    def encode(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """As they are."""
        return keys, values

    def attend(self, queries: mx.array, kept: Sequence[mx.array], rope: Rope, offsets: Offsets | None) -> mx.array:
        """MLX's own attention."""
        mask = "causal" if queries.shape[2] > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, kept[0], kept[1], scale=rope.scale, mask=mask)


@dataclass(frozen=True, slots=True)
class QuantizedKv:
    """Keys and values in 8 bits, a scale and a zero for each `group` of channels; without their biases.

    Qwen2's biases of keys reach hundreds in single channels of the first and last layers, and would leave the other channels of their group
    no bits. As RoPE is linear, a key is R(p)(Wx + b) = R(p)Wx + R(p)b: the first part is kept, and the second, which depends on the position
    alone, enters the scores exactly. Values' biases pass through attention unchanged, as its weights add up to 1.
    """

    head_dim: int
    dtype: mx.Dtype
    without_biases = True
    bits = 8

    @property
    def group(self) -> int:
        """Channels that share a scale."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def parts(self) -> tuple[tuple[int, mx.Dtype], ...]:
        """Codes, scales and zeros of the keys, then of the values."""
        groups = self.head_dim // self.group
        return ((self.head_dim * self.bits // 32, mx.uint32), (groups, self.dtype), (groups, self.dtype)) * 2

    def encode(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """Quantized."""
        return (*mx.quantize(keys, self.group, self.bits), *mx.quantize(values, self.group, self.bits))

    def attend(self, queries: mx.array, kept: Sequence[mx.array], rope: Rope, offsets: Offsets | None) -> mx.array:
        """On the codes, without ever making the keys and values of a layer."""
        assert offsets is not None
        _, heads, count, _ = queries.shape
        total = kept[0].shape[2]
        block = max(1, _SCORES // (heads * total))
        blocks = [self._block(queries[:, :, at : at + block], kept, rope, offsets, total - count + at) for at in range(0, count, block)]
        return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)

    def _block(self, queries: mx.array, kept: Sequence[mx.array], rope: Rope, offsets: Offsets, first: int) -> mx.array:
        """Of queries at the positions from `first` on."""
        _, _, count, dim = queries.shape
        groups, total = kept[0].shape[1], kept[0].shape[2]
        # Heads that share keys, and their tokens, are the rows of one matrix product.
        q = queries.reshape(1, groups, -1, dim)
        scores = self._product(q, kept[:3], transpose=True).astype(mx.float32)
        q1, q2 = mx.split(q.astype(mx.float32), 2, axis=-1)
        b1, b2 = mx.split(offsets.keys[:, None], 2, axis=-1)
        # q . R(p)b for all positions p: pairs of channels as complex numbers, q times the conjugate of b, times e^(-i p / period).
        turned = mx.concatenate([q1 * b1 + q2 * b2, q2 * b1 - q1 * b2], axis=-1)
        scores = (scores + turned @ rope.table(total).T) * rope.scale
        if count > 1:
            allowed = mx.arange(total) <= mx.arange(first, first + count)[:, None]
            scores = mx.where(allowed, scores.reshape(1, groups, -1, count, total), -mx.inf).reshape(scores.shape)
        weights = mx.softmax(scores, axis=-1).astype(queries.dtype)
        y = self._product(weights, kept[3:], transpose=False)
        return (y + offsets.values[:, None].astype(y.dtype)).reshape(queries.shape)

    def _product(self, x: mx.array, kept: Sequence[mx.array], *, transpose: bool) -> mx.array:
        codes, scales, zeros = kept
        return mx.quantized_matmul(x, codes, scales, zeros, transpose=transpose, group_size=self.group, bits=self.bits)
