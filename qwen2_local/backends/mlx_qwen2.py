"""Qwen2's forward pass on MLX, dense and mixture of experts, over the flattened tokens of many sequences.

Activations are [tokens of all rows, hidden]; only attention looks at one sequence at a time, so rows of any length go together.
Written after transformers' `modeling_qwen2` and `modeling_qwen2_moe`; the tests hold it against both, and against mlx-lm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import MlxQuantization, Moe, Qwen2Config, Yarn

KV_STEP = 256
"""Tokens by which a KV cache grows."""

_SORT_EXPERTS_FROM = 64
"""Pairs of token and expert from which sorting them by expert is worth it: a matrix product then reads each expert once."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [out, in] with an optional bias [out], plain or quantized; or such matrices stacked, one for each expert [experts, out, in]."""

    weight: mx.array
    bias: mx.array | None = None
    scales: mx.array | None = None
    zeros: mx.array | None = None
    quantization: MlxQuantization | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """The product, [tokens, in] -> [tokens, out]."""
        if self.quantization is None:
            return x @ self.weight.T if self.bias is None else mx.addmm(self.bias, x, self.weight.T)
        q = self.quantization
        assert self.scales is not None
        y = mx.quantized_matmul(x, self.weight, self.scales, self.zeros, transpose=True, group_size=q.group, bits=q.bits, mode=q.mode)
        return y if self.bias is None else y + self.bias

    def rows(self, ids: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows [len(ids), in]: the embedding of tokens."""
        if self.quantization is None:
            return self.weight[ids]
        q = self.quantization
        assert self.scales is not None
        zeros = None if self.zeros is None else self.zeros[ids]
        return mx.dequantize(self.weight[ids], self.scales[ids], zeros, group_size=q.group, bits=q.bits, mode=q.mode, dtype=dtype)

    def of_experts(self, x: mx.array, experts: mx.array, *, ordered: bool) -> mx.array:
        """The product with one expert's matrix for each of `experts`: [..., 1, in] -> [*experts.shape, 1, out]. ordered: experts ascend."""
        if self.quantization is None:
            return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=ordered)
        q = self.quantization
        assert self.scales is not None
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.zeros,
            rhs_indices=experts,
            transpose=True,
            group_size=q.group,
            bits=q.bits,
            mode=q.mode,
            sorted_indices=ordered,
        )


@dataclass(slots=True)
class LayerKv:
    """Keys and values of one sequence in one layer, [1, kv_heads, room, head_dim]. What lies past the sequence's length means nothing."""

    keys: mx.array | None = None
    values: mx.array | None = None

    def write(self, start: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put `keys` and `values` [1, kv_heads, tokens, head_dim] at position `start`; all of them from 0 on."""
        stop = start + keys.shape[2]
        if self.keys is None or self.values is None or self.keys.shape[2] < stop:
            self.keys, self.values = _grown(self.keys, start, stop, keys), _grown(self.values, start, stop, values)
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]


def _grown(old: mx.array | None, used: int, needed: int, like: mx.array) -> mx.array:
    room = -(-needed // KV_STEP) * KV_STEP
    _, heads, _, channels = like.shape
    kept = 0 if old is None else min(used, old.shape[2])
    empty = mx.zeros((1, heads, room - kept, channels), like.dtype)
    return empty if old is None else mx.concatenate([old[:, :, :kept], empty], axis=2)


@dataclass(frozen=True, slots=True)
class Piece:
    """A row within a batch: the tokens `begin` to `end` of it belong to one sequence, from its position `start` on; `kv` by layer."""

    kv: Sequence[LayerKv]
    start: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Mlp:
    gate: Matrix
    up: Matrix
    down: Matrix

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(_silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True, slots=True)
class _Experts:
    shape: Moe
    router: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    shared: _Mlp
    shared_gate: Matrix

    def __call__(self, x: mx.array) -> mx.array:
        count = self.shape.experts_per_token
        chances = mx.softmax(self.router(x), axis=-1, precise=True)
        chosen = mx.argpartition(-chances, kth=count - 1, axis=-1)[:, :count]
        weights = mx.take_along_axis(chances, chosen, axis=-1)
        if self.shape.normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        y = (self._chosen(x, chosen) * weights[..., None]).sum(axis=1)
        return y + mx.sigmoid(self.shared_gate(x)) * self.shared(x)

    def _chosen(self, x: mx.array, chosen: mx.array) -> mx.array:
        """The outputs of the chosen experts, [tokens, experts_per_token, hidden]."""
        tokens, count = chosen.shape
        pairs = chosen.reshape(-1)
        ordered = pairs.size >= _SORT_EXPERTS_FROM
        order = mx.argsort(pairs) if ordered else mx.arange(pairs.size)
        inputs, experts = x[order // count][:, None], pairs[order]
        inner = _silu(self.gate.of_experts(inputs, experts, ordered=ordered)) * self.up.of_experts(inputs, experts, ordered=ordered)
        y = self.down.of_experts(inner, experts, ordered=ordered)[:, 0]
        if ordered:
            y = y[mx.argsort(order)]
        return y.reshape(tokens, count, -1)


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: mx.array
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    mlp_norm: mx.array
    mlp: _Mlp | _Experts


@dataclass(frozen=True, slots=True)
class Qwen2:
    """A loaded model. `dtype`: of its activations and KV."""

    config: Qwen2Config
    dtype: mx.Dtype
    embedding: Matrix
    layers: Sequence[_Layer]
    norm: mx.array
    head: Matrix
    yarn_periods: mx.array | None = field(default=None)

    def hidden(self, tokens: mx.array, pieces: Sequence[Piece], after_layer: Callable[[mx.array], None]) -> mx.array:
        """Append `tokens` [tokens] to the KV of their sequences; the last layer's output [tokens, hidden], not normalized.

        Lazy, as MLX is. `after_layer` gets each layer's output, and may evaluate it or raise.
        """
        x = self.embedding.rows(tokens, self.dtype)
        positions = mx.concatenate([mx.arange(p.start, p.start + p.end - p.begin, dtype=mx.int32) for p in pieces])
        for index, layer in enumerate(self.layers):
            normal = mx.fast.rms_norm(x, layer.input_norm, self.config.rms_eps)
            x = x + layer.o(self._attention(layer, index, normal, positions, pieces))
            x = x + layer.mlp(mx.fast.rms_norm(x, layer.mlp_norm, self.config.rms_eps))
            after_layer(x)
        return x

    def logits(self, x: mx.array) -> mx.array:
        """Logits [rows, vocabulary] in float32, of rows [rows, hidden] of `hidden`'s output."""
        return self.head(mx.fast.rms_norm(x, self.norm, self.config.rms_eps)).astype(mx.float32)

    def _attention(self, layer: _Layer, index: int, x: mx.array, positions: mx.array, pieces: Sequence[Piece]) -> mx.array:
        c = self.config
        # [tokens, heads, 1, head_dim]: to RoPE each token is a sequence of one, with an offset of its own.
        q = self._rope(layer.q(x).reshape(-1, c.heads, 1, c.head_dim), positions)
        k = self._rope(layer.k(x).reshape(-1, c.kv_heads, 1, c.head_dim), positions)
        v = layer.v(x).reshape(-1, c.kv_heads, 1, c.head_dim)
        # YaRN scales queries and keys by its temperature; here their product by its square.
        scale = _temperature(c.yarn) ** 2 / math.sqrt(c.head_dim)
        outputs = []
        for piece in pieces:
            # [1, heads, tokens of the piece, head_dim]
            mine, new_keys, new_values = (part[piece.begin : piece.end].transpose(2, 1, 0, 3) for part in (q, k, v))
            keys, values = piece.kv[index].write(piece.start, new_keys, new_values)
            mask = "causal" if piece.end - piece.begin > 1 else None
            y = mx.fast.scaled_dot_product_attention(mine, keys, values, scale=scale, mask=mask)
            outputs.append(y[0].swapaxes(0, 1).reshape(-1, c.hidden))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _rope(self, x: mx.array, positions: mx.array) -> mx.array:
        c = self.config
        base = c.rope_theta if self.yarn_periods is None else None
        return mx.fast.rope(x, c.head_dim, traditional=False, base=base, scale=1.0, offset=positions, freqs=self.yarn_periods)


def load_model(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> Qwen2:
    """The model of a validated checkpoint, its experts stacked as MLX does. dtype: None is that of the file's floats.

    Each array is in memory when this returns; packed weights stay as they are. Raises RuntimeError or MemoryError, as MLX does.
    """
    config = checkpoint.config
    arrays: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        arrays.update(mx.load(str(shard)))  # type: ignore[arg-type]  # a dict, for safetensors
    own = dtype or arrays["model.norm.weight"].dtype

    def tensor(name: str) -> mx.array:
        array = arrays.pop(name)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(own)
        # One by one, so that no second copy of the model is ever in memory.
        mx.eval(array)
        return array

    def matrix(name: str, *, bias: bool = False) -> Matrix:
        weight = tensor(f"{name}.weight")
        own_bias = tensor(f"{name}.bias") if bias else None
        if f"{name}.scales" not in arrays:
            return Matrix(weight, own_bias)
        zeros = tensor(f"{name}.biases") if f"{name}.biases" in arrays else None
        return Matrix(weight, own_bias, tensor(f"{name}.scales"), zeros, config.quantized.get(name, config.quantization))

    def mlp(at: str) -> _Mlp:
        return _Mlp(matrix(f"{at}.gate_proj"), matrix(f"{at}.up_proj"), matrix(f"{at}.down_proj"))

    def feed_forward(at: str) -> _Mlp | _Experts:
        if config.moe is None:
            return mlp(at)
        experts = mlp(f"{at}.switch_mlp")
        shared, shared_gate = mlp(f"{at}.shared_expert"), matrix(f"{at}.shared_expert_gate")
        return _Experts(config.moe, matrix(f"{at}.gate"), experts.gate, experts.up, experts.down, shared, shared_gate)

    def layer(at: str) -> _Layer:
        return _Layer(
            tensor(f"{at}.input_layernorm.weight"),
            matrix(f"{at}.self_attn.q_proj", bias=True),
            matrix(f"{at}.self_attn.k_proj", bias=True),
            matrix(f"{at}.self_attn.v_proj", bias=True),
            matrix(f"{at}.self_attn.o_proj"),
            tensor(f"{at}.post_attention_layernorm.weight"),
            feed_forward(f"{at}.mlp"),
        )

    embedding = matrix("model.embed_tokens")
    return Qwen2(
        config,
        own,
        embedding,
        [layer(f"model.layers.{index}") for index in range(config.layers)],
        tensor("model.norm.weight"),
        embedding if config.tied else matrix("lm_head"),
        None if config.yarn is None else _yarn_periods(config, config.yarn),
    )


def _temperature(yarn: Yarn | None) -> float:
    """YaRN's factor on queries and on keys (Peng et al., 2023, equation 22)."""
    return 0.1 * math.log(yarn.factor) + 1 if yarn is not None and yarn.factor > 1 else 1.0


def _yarn_periods(config: Qwen2Config, yarn: Yarn) -> mx.array:
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
    return mx.array(periods, mx.float32)
