"""A checkpoint in a folder, Hugging Face's or MLX's: its config, its shards, and the proof that they are exactly what the config demands.

Layout: transformers (`model.safetensors`, or `model.safetensors.index.json` and its shards) and mlx-lm (the same names; quantized
matrices as weight, scales, biases; experts as `switch_mlp`). GPTQ and AWQ write the first with matrices as qweight, qzeros, scales.
No *.py, *.bin or *.pt is looked at, ever.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qwen2_local.errors import BadFile
from qwen2_local.files import inside, safe_name
from qwen2_local.formats.config import MlxQuantization, PackedQuantization, Qwen2Config, parse_config, read_config
from qwen2_local.formats.safetensors import TensorEntry, read_header
from qwen2_local.formats.strict_json import read_object

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_INDEX = 16_000_000
_MAX_TENSORS = 50_000  # 57B-A14B has 5,600, packed by GPTQ 21,000
_FLOATS = ("BF16", "F16", "F32")
_HINT = "Fetch the model again from its original source."

_Wanted: TypeAlias = tuple[str, tuple[int, ...], tuple[str, ...]]
"""Name, shape and possible dtypes of a tensor."""


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor and the file that holds it."""

    file: Path
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint. raw: config.json as it is. shards: the safetensors files, in the order of their names. No tensor is in memory."""

    folder: Path
    layout: Literal["hf", "mlx"]
    config: Qwen2Config
    raw: Mapping[str, Any]
    tensors: Mapping[str, Located]
    shards: tuple[Path, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.entry.end - t.entry.begin for t in self.tensors.values())

    @property
    def float32_bytes(self) -> int:
        """Bytes of all tensors once 16-bit floats are widened to 32."""
        entries = [t.entry for t in self.tensors.values()]
        return sum((entry.end - entry.begin) * (2 if entry.dtype in ("BF16", "F16") else 1) for entry in entries)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks the checkpoint in `folder`. Raises BadFile naming the file, field or tensor; UnsupportedModel for what is no Qwen2.

    After it, every tensor that the config demands is there, once, in its shape and in a dtype that we read, and no other.
    """
    if not folder.is_dir():
        raise BadFile(f"{folder} is no folder.", hint="Give the folder that holds config.json and the .safetensors files.")
    folder = folder.resolve()
    raw = read_object(member(folder, "config.json"), 4_000_000)
    config = parse_config(raw, folder / "config.json")
    tensors: dict[str, Located] = {}
    mlx = config.quantization is not None
    shards, weight_map = _shards(folder)
    for shard in shards:
        header = read_header(member(folder, shard))
        mlx = mlx or header.metadata.get("format") == "mlx"
        if len(tensors) + len(header.tensors) > _MAX_TENSORS:
            raise BadFile(f"{folder} holds more than {_MAX_TENSORS:,} tensors.", hint=_HINT)
        for name, entry in header.tensors.items():
            if name in tensors:
                raise BadFile(f"{folder}: the tensor {name[:100]!r} is both in {tensors[name].file.name} and in {shard}.", hint=_HINT)
            if weight_map is not None and weight_map.get(name) != shard:
                raise BadFile(f"{folder / shard} holds the tensor {name[:100]!r}, which {_INDEX} does not place there.", hint=_HINT)
            tensors[name] = Located(header.path, entry)
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise BadFile(f"{folder / shard} lacks the tensor {name[:100]!r}, which {_INDEX} places there.", hint=_HINT)
    _check_tensors(folder, config, tensors)
    return Checkpoint(folder, "mlx" if mlx else "hf", config, raw, tensors, tuple(folder / shard for shard in shards))


def is_mlx(folder: Path) -> bool:
    """Is the layout MLX's (quantized, or written by it)? Reads config.json and one shard's header; raises as `open_checkpoint` does."""
    if read_config(member(folder, "config.json")).quantization is not None:
        return True
    return read_header(member(folder, _shards(folder)[0][0])).metadata.get("format") == "mlx"


def member(folder: Path, name: str) -> Path:
    """The path of the file `name` of a checkpoint, there or not. Raises BadFile if it is a link out of the folder."""
    folder = folder.resolve()  # from inside, or by a link, its parents do not show in the path
    path = folder / name
    # huggingface_hub's cache keeps snapshots/REVISION/NAME as links to blobs/HASH beside snapshots.
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name != "snapshots" or not blobs.is_dir() or not path.resolve().is_relative_to(blobs.resolve()):
        inside(folder, path)
    return path


def expected_tensors(config: Qwen2Config, experts: Literal["each", "fused", "switch"] = "each") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a plain checkpoint. `experts`: one by one (transformers 4), stacked (5), or as in MLX."""
    hidden, kv = config.hidden, config.kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocabulary, hidden)
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{at}self_attn.{name}_proj.bias", (rows,)
        yield f"{at}self_attn.o_proj.weight", (hidden, hidden)
        if config.moe is None:
            yield from _mlp(f"{at}mlp.", hidden, config.intermediate)
            continue
        moe = config.moe
        yield f"{at}mlp.gate.weight", (moe.experts, hidden)
        yield f"{at}mlp.shared_expert_gate.weight", (1, hidden)
        yield from _mlp(f"{at}mlp.shared_expert.", hidden, moe.shared_size)
        if experts == "each":
            for expert in range(moe.experts):
                yield from _mlp(f"{at}mlp.experts.{expert}.", hidden, moe.expert_size)
        elif experts == "fused":
            yield f"{at}mlp.experts.gate_up_proj", (moe.experts, 2 * moe.expert_size, hidden)
            yield f"{at}mlp.experts.down_proj", (moe.experts, hidden, moe.expert_size)
        else:
            for name, shape in _mlp(f"{at}mlp.switch_mlp.", hidden, moe.expert_size):
                yield name, (moe.experts, *shape)
    yield "model.norm.weight", (hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocabulary, hidden)


def _mlp(at: str, hidden: int, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}gate_proj.weight", (size, hidden)
    yield f"{at}up_proj.weight", (size, hidden)
    yield f"{at}down_proj.weight", (hidden, size)


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shards' names, sorted, and the index's weight_map (None without an index)."""
    weight_map: dict[str, str] | None = None
    expected = [_SINGLE]
    if (folder / _INDEX).exists():
        index = read_object(member(folder, _INDEX), _MAX_INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise BadFile(f"{folder / _INDEX} has no weight_map.", hint=_HINT)
        weight_map = index
        expected = sorted(set(index.values()))
        for shard in expected:
            if not safe_name(shard, str(folder / _INDEX)).endswith(".safetensors"):
                raise BadFile(f"{folder / _INDEX} names {shard[:100]!r}, which is no .safetensors file.", hint=_HINT)
    # mlx-lm loads whatever matches this pattern: a stray shard would silently replace tensors.
    present = {path.name for path in folder.glob("model*.safetensors")}
    if not present and not any((folder / shard).exists() for shard in expected):
        raise BadFile(f"{folder} holds no {_SINGLE}.", hint="Give the folder that holds config.json and the .safetensors files.")
    missing = [shard for shard in expected if not (folder / shard).exists()]
    if missing:
        raise BadFile(f"{folder} lacks {len(missing)} of {len(expected)} shards: {', '.join(missing[:3])}.", hint="Fetch the missing files.")
    extra = sorted(present - set(expected))
    if extra:
        raise BadFile(f"{folder} holds {extra[0][:100]!r}, which does not belong to this checkpoint.", hint="Move that file away.")
    return expected, weight_map


def _check_tensors(folder: Path, config: Qwen2Config, tensors: Mapping[str, Located]) -> None:
    left = {name for name in tensors if not name.endswith(".rotary_emb.inv_freq")}
    # Never a list: a lying config may demand millions.
    wanted = expected_tensors(config, _expert_layout(tensors))
    if config.tied and any(name.startswith("lm_head.") for name in left):
        # Some writers keep the tied head. It is a copy of the embedding.
        wanted = chain(wanted, [("lm_head.weight", (config.vocabulary, config.hidden))])
    for name, shape in wanted:
        module = name.removesuffix(".weight")
        parts: Iterable[_Wanted] = ((name, shape, _FLOATS),)
        if {f"{module}.scales", f"{module}.qweight"} & left:
            quantization = config.packed or config.quantized.get(module, config.quantization)
            if quantization is None:
                raise BadFile(f"{folder}: {module} is quantized, but config.json does not say how.", hint=_HINT)
            if isinstance(quantization, PackedQuantization):
                parts = _packed_parts(folder, module, shape, quantization, left)
            else:
                parts = _quantized_parts(folder, module, shape, quantization)
        for part, part_shape, dtypes in parts:
            _check(folder, part, part_shape, dtypes, tensors)
            left.discard(part)
    if left:
        raise BadFile(f"{folder}: the tensor {min(left)[:100]!r} does not belong to this model ({len(left)} such).", hint=_HINT)


def _expert_layout(tensors: Mapping[str, Located]) -> Literal["each", "fused", "switch"]:
    if "model.layers.0.mlp.experts.gate_up_proj" in tensors:
        return "fused"
    return "switch" if "model.layers.0.mlp.switch_mlp.gate_proj.weight" in tensors else "each"


def _quantized_parts(folder: Path, module: str, shape: tuple[int, ...], quantization: MlxQuantization) -> Iterator[_Wanted]:
    *rows, columns = shape
    if len(shape) < 2 or columns % quantization.group:
        raise BadFile(f"{folder}: {module} of shape {list(shape)} cannot be quantized in groups of {quantization.group}.", hint=_HINT)
    affine = quantization.mode == "affine"
    yield f"{module}.weight", (*rows, columns * quantization.bits // 32), ("U32",)
    yield f"{module}.scales", (*rows, columns // quantization.group), _FLOATS if affine else ("U8",)
    if affine:
        yield f"{module}.biases", (*rows, columns // quantization.group), _FLOATS


def _packed_parts(folder: Path, module: str, shape: tuple[int, ...], packed: PackedQuantization, there: Container[str]) -> Iterator[_Wanted]:
    words = 32 // packed.bits
    if len(shape) != 2 or shape[1] % packed.group or shape[0] % words:
        raise BadFile(f"{folder}: {module} of shape {list(shape)} cannot be packed as {packed}.", hint=_HINT)
    rows, columns = shape
    groups = columns // packed.group
    yield f"{module}.qweight", (columns // words, rows) if packed.method == "gptq" else (columns, rows // words), ("I32",)
    yield f"{module}.qzeros", (groups, rows // words), ("I32",)
    yield f"{module}.scales", (groups, rows), ("F16",)
    if packed.method == "gptq" and (f"{module}.g_idx" in there or not packed.ordered):
        yield f"{module}.g_idx", (columns,), ("I32",)
    if f"{module}.bias" in there and not module.endswith((".q_proj", ".k_proj", ".v_proj")):
        # AutoGPTQ gives every matrix a bias; those that the model does not have are zero.
        yield f"{module}.bias", (rows,), _FLOATS


def _check(folder: Path, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], tensors: Mapping[str, Located]) -> None:
    located = tensors.get(name)
    if located is None:
        raise BadFile(f"{folder}: the tensor {name!r} is missing.", hint=_HINT)
    entry = located.entry
    if entry.shape != shape:
        raise BadFile(f"{located.file}: the tensor {name!r} has the shape {list(entry.shape)}, config.json demands {list(shape)}.", hint=_HINT)
    if entry.dtype not in dtypes:
        raise BadFile(f"{located.file}: the tensor {name!r} is {entry.dtype}, not one of {', '.join(dtypes)}.", hint=_HINT)


def parameters(config: Qwen2Config) -> int:
    """How many weights the model has."""
    return sum(math.prod(shape) for _, shape in expected_tensors(config, "fused"))
