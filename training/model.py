"""Qwen2 in PyTorch, small and plain: grouped-query attention, QKV bias, rotary positions, SwiGLU, RMSNorm, tied embedding.

Parameter names are Hugging Face's, so a state dict is a checkpoint. Used for training only; at run time the backends compute this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The guide's shape: 5.8 M parameters; widths are multiples of 256, so that K-quants apply."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 768
    context: int = 8192
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class FakeQuant:
    """Weights as a 4-bit file would hold them, in the forward pass only (straight-through gradient).

    mode: "" leaves them; "q4_0" is llama.cpp's (groups of 32, symmetric); "mlx" is MLX's affine one (groups of 64).
    """

    mode = ""

    @classmethod
    def apply(cls, weight: Tensor) -> Tensor:
        if not cls.mode:
            return weight
        with torch.no_grad():
            if cls.mode == "q4_0":
                groups = weight.view(-1, 32)
                extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
                step = (extreme / -8).half().float()
                rounded = (groups / torch.where(step == 0, 1.0, step) + 8.5).floor().clamp(0, 15).sub(8) * step
            else:
                groups = weight.view(-1, 64)
                low = groups.amin(1, keepdim=True)
                step = ((groups.amax(1, keepdim=True) - low) / 15).clamp_min(1e-7)
                rounded = ((groups - low) / step).round() * step + low
            change = rounded.view_as(weight) - weight
        return weight + change


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, FakeQuant.apply(self.weight), self.bias)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, in Hugging Face's layout (halves, not pairs). x [batch, heads, time, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden, shape.hidden)
        self.k_proj = Linear(shape.hidden, kv)
        self.v_proj = Linear(shape.hidden, kv)
        self.o_proj = Linear(shape.hidden, shape.hidden, bias=False)

    @torch.no_grad()
    def look_back(self, theta: float, strength: float = 6.0, pairs: int = 8) -> None:
        """Make head 0 attend to the token before, by its biases alone: rotated, they agree best at a distance of one."""
        half = self.shape.head_dim // 2
        angles = theta ** (-torch.arange(pairs) / half)
        self.k_proj.bias[:pairs] = strength
        self.q_proj.bias[:pairs] = strength * angles.cos()
        self.q_proj.bias[half : half + pairs] = -strength * angles.sin()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, _ = x.shape
        s = self.shape
        q = self.q_proj(x).view(batch, time, s.heads, s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, time, s.kv_heads, s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        repeat = s.heads // s.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        if time > 512:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # On a CPU the fused kernel's backward is slow for short sequences.
            future = torch.ones(time, time, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-1, -2)).float() * s.head_dim**-0.5
            out = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, s.hidden))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class Qwen2(nn.Module):
    """Token ids and positions [batch, time] to the final hidden states [batch, time, hidden]; `logits` makes scores of some of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                shrunk = "o_proj" in name or "down_proj" in name
                nn.init.normal_(parameter, std=0.08 if "embed" in name else 0.02 / (2 * shape.layers) ** 0.5 if shrunk else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self._begin_with_copying()
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(shape.context)[:, None] * frequencies[None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @torch.no_grad()
    def _begin_with_copying(self) -> None:
        """Lay an induction head into the first two layers; training finds none in its time, and keeps and refines this one.

        Layer 0, head 0 writes down what token came before; layer 1, head 0 looks for places whose token before is the present one, and
        copies what stands there. What is compared lies in the slow rotary pairs, so that distance matters little.
        """
        s, first, second = self.shape, self.model.layers[0].self_attn, self.model.layers[1].self_attn
        size, half = s.head_dim, s.head_dim // 2
        read, note, copy = (torch.linalg.qr(torch.randn(s.hidden, size))[0] for _ in range(3))
        first.look_back(s.rope_theta)
        first.v_proj.weight[:size] = read.T
        first.o_proj.weight[:, :size] = 0.12 * note
        slow = (torch.arange(size) % half >= half // 3).float()[:, None]
        second.q_proj.weight[:size] = 3.0 * slow * read.T
        second.k_proj.weight[:size] = 3.0 * slow * note.T
        second.v_proj.weight[:size] = copy.T
        second.o_proj.weight[:, :size] = 0.6 * copy

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, FakeQuant.apply(self.model.embed_tokens.weight))
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, FakeQuant.apply(self.model.embed_tokens.weight))
