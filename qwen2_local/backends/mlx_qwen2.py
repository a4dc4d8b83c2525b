"""Qwen2's forward pass on MLX, dense and mixture of experts, over the flattened tokens of many sequences.

Activations are [tokens of all rows, hidden]; only attention looks at one sequence at a time, so rows of any length go together.
Written after transformers' `modeling_qwen2` and `modeling_qwen2_moe`; the tests hold it against both, and against mlx-lm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from qwen2_local.backends.mlx_adapter import Adapter
from qwen2_local.backends.mlx_kv import KvFormat, LayerKv, Offsets, PlainKv, QuantizedKv, Rope
from qwen2_local.errors import Cancelled
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import MlxQuantization, Moe, Qwen2Config

_SORT_EXPERTS_FROM = 64
"""Pairs of token and expert from which sorting them by expert is worth it: a matrix product then reads each expert once."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [out, in] with an optional bias [out], plain or quantized; or such matrices stacked, one for each expert [experts, out, in].

    adapter: [in, rank] and [rank, out], whose product is added to the transposed matrix (LoRA; Hu et al., 2021).
    """

    weight: mx.array
    bias: mx.array | None = None
    scales: mx.array | None = None
    zeros: mx.array | None = None
    quantization: MlxQuantization | None = None
    adapter: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """The product, [tokens, in] -> [tokens, out]."""
        y = self._product(x)
        return y if self.adapter is None else y + (x @ self.adapter[0]) @ self.adapter[1]

    def _product(self, x: mx.array) -> mx.array:
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
    offsets: Offsets | None


@dataclass(frozen=True, slots=True)
class Qwen2:
    """A loaded model. `dtype`: of its activations. Another `rope` makes another model of the same weights (`dataclasses.replace`)."""

    config: Qwen2Config
    dtype: mx.Dtype
    kv: KvFormat
    rope: Rope
    embedding: Matrix
    layers: Sequence[_Layer]
    norm: mx.array
    head: Matrix

    def hidden(self, tokens: mx.array, pieces: Sequence[Piece], after_layer: Callable[[mx.array], None] | None = None) -> mx.array:
        """Append `tokens` [tokens] to the KV of their sequences; the last layer's output [tokens, hidden], not normalized.

        Lazy, as MLX is. `after_layer` gets each layer's output, and may evaluate it or raise.
        """
        eps = self.config.rms_eps
        x = self.embedding.rows(tokens, self.dtype)
        positions = mx.array([position for p in pieces for position in range(p.start, p.start + p.end - p.begin)], mx.int32)
        for index, layer in enumerate(self.layers):
            x = x + layer.o(self._attention(layer, index, mx.fast.rms_norm(x, layer.input_norm, eps), positions, pieces))
            x = x + layer.mlp(mx.fast.rms_norm(x, layer.mlp_norm, eps))
            if after_layer is not None:
                after_layer(x)
        return x

    def logits(self, x: mx.array) -> mx.array:
        """Logits [rows, vocabulary] in float32, of rows [rows, hidden] of `hidden`'s output."""
        return self.head(mx.fast.rms_norm(x, self.norm, self.config.rms_eps)).astype(mx.float32)

    def _attention(self, layer: _Layer, index: int, x: mx.array, positions: mx.array, pieces: Sequence[Piece]) -> mx.array:
        c = self.config
        # [tokens, heads, 1, head_dim], and for a piece [1, heads, tokens, head_dim]
        parts = (
            self.rope(layer.q(x).reshape(-1, c.heads, 1, c.head_dim), positions),
            self.rope(layer.k(x).reshape(-1, c.kv_heads, 1, c.head_dim), positions),
            layer.v(x).reshape(-1, c.kv_heads, 1, c.head_dim),
        )
        outputs = []
        for piece in pieces:
            mine = parts if len(pieces) == 1 else (part[piece.begin : piece.end] for part in parts)
            queries, keys, values = mine if len(positions) == 1 else (part.transpose(2, 1, 0, 3) for part in mine)
            kept = piece.kv[index].write(piece.start, self.kv.encode(keys, values))
            y = self.kv.attend(queries, kept, self.rope, layer.offsets)
            outputs.append(y.swapaxes(1, 2).reshape(-1, c.hidden))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def load_model(
    checkpoint: Checkpoint,
    dtype: mx.Dtype | None,
    *,
    kv_bits: int = 16,
    adapter: Adapter | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Qwen2:
    """The model of a validated checkpoint, its experts stacked as MLX does. dtype: None is that of the file's floats.

    kv_bits: 8, or 16 for the KV in the type of the activations. YaRN is as the checkpoint's config has it.
    cancelled: asked before each tensor. Each array is in memory when this returns; packed weights stay as they are.
    Raises Cancelled, and RuntimeError or MemoryError, as MLX does.
    """
    config = checkpoint.config
    arrays: dict[str, mx.array] = {}
    for shard in checkpoint.shards:
        arrays.update(mx.load(str(shard)))  # type: ignore[arg-type]  # a dict, for safetensors
    own = dtype or arrays["model.norm.weight"].dtype
    kv = QuantizedKv(config.head_dim, own) if kv_bits == 8 else PlainKv(config.head_dim, own)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    adapted = {} if adapter is None else adapter.pairs(own)

    def tensor(name: str) -> mx.array:
        if cancelled is not None and cancelled():
            raise Cancelled("Stopped.")
        array = arrays.pop(name)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(own)
            if on_cpu and array.ndim > 1 and name.endswith(".weight"):
                # MLX's own matrix product on a CPU is twice as fast where a column's numbers lie together.
                array = mx.contiguous(array.swapaxes(-1, -2)).swapaxes(-1, -2)
        # One by one, so that no second copy of the model is ever in memory.
        mx.eval(array)
        return array

    def matrix(name: str, *, bias: bool = False) -> Matrix:
        weight = tensor(f"{name}.weight")
        own_bias = tensor(f"{name}.bias") if bias else None
        pair = adapted.get(name)
        if f"{name}.scales" not in arrays:
            return Matrix(weight, own_bias, adapter=pair)
        zeros = tensor(f"{name}.biases") if f"{name}.biases" in arrays else None
        return Matrix(weight, own_bias, tensor(f"{name}.scales"), zeros, config.quantized.get(name, config.quantization), pair)

    def mlp(at: str) -> _Mlp:
        return _Mlp(matrix(f"{at}.gate_proj"), matrix(f"{at}.up_proj"), matrix(f"{at}.down_proj"))

    def feed_forward(at: str) -> _Mlp | _Experts:
        if config.moe is None:
            return mlp(at)
        experts = mlp(f"{at}.switch_mlp")
        shared, shared_gate = mlp(f"{at}.shared_expert"), matrix(f"{at}.shared_expert_gate")
        return _Experts(config.moe, matrix(f"{at}.gate"), experts.gate, experts.up, experts.down, shared, shared_gate)

    def offsets(at: str) -> Offsets:
        biases = (tensor(f"{at}.{name}_proj.bias").astype(mx.float32).reshape(config.kv_heads, -1) for name in "kv")
        return Offsets(*biases)

    def layer(at: str) -> _Layer:
        attention = f"{at}.self_attn"
        return _Layer(
            input_norm=tensor(f"{at}.input_layernorm.weight"),
            q=matrix(f"{attention}.q_proj", bias=True),
            k=matrix(f"{attention}.k_proj", bias=not kv.without_biases),
            v=matrix(f"{attention}.v_proj", bias=not kv.without_biases),
            o=matrix(f"{attention}.o_proj"),
            mlp_norm=tensor(f"{at}.post_attention_layernorm.weight"),
            mlp=feed_forward(f"{at}.mlp"),
            offsets=offsets(attention) if kv.without_biases else None,
        )

    embedding = matrix("model.embed_tokens")
    return Qwen2(
        config,
        own,
        kv,
        Rope(config, config.yarn),
        embedding,
        [layer(f"model.layers.{index}") for index in range(config.layers)],
        tensor("model.norm.weight"),
        embedding if config.tied else matrix("lm_head"),
    )
