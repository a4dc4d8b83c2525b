"""Is a GGUF file a Qwen2 that we run? Its keys, its tensors and whether they belong together; all parts of a split file.

After `open_gguf`, llama.cpp finds what its loaders of qwen2 and qwen2moe ask for, in the shapes they ask for (src/models/qwen2.cpp,
qwen2moe.cpp), and arrays of the types it takes on trust.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.gguf import GgufHeader, GgufTensor, read_gguf

_HINT = "Fetch it again from its original source."
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 1000
_MAX_TENSORS = 65_536

FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
    14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
    36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
"""Names of general.file_type: LLAMA_FTYPE_* of llama.h."""

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
_MAX_EXPERTS = 256  # LLAMA_MAX_EXPERTS of older builds; it is 1024 now, and Qwen2 has 64 at most

# Numbers that llama.cpp reads where a file has them.
_NUMBERS = {
    "rope.freq_base": (1.0, 1e12), "rope.scaling.factor": (0.0, 1e6), "rope.scale_linear": (0.0, 1e6),
    "rope.scaling.attn_factor": (0.0, 1e6), "rope.scaling.alpha": (0.0, 1e6),
}  # fmt: skip
_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A validated model of one GGUF file or all parts of a split one.

    paths: the parts in order; a backend is given the first. header: the first part's, with all keys. quantization: as llama.cpp names it
    ("Q4_K_M"). context: tokens, as the file claims. weight_bytes: of all tensors.
    """

    paths: tuple[Path, ...]
    header: GgufHeader
    tensors: Mapping[str, GgufTensor]
    architecture: str
    quantization: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    weight_bytes: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden // self.heads

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache holds for a token of one sequence: keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def open_gguf(path: Path) -> GgufModel:
    """Reads and checks the GGUF at `path`; of a split file, any part.

    Raises BadFile that names the file and the fault, UnsupportedModel for what is no Qwen2.
    """
    headers = _parts(path)
    header = headers[0]
    keys = _Keys(header)
    architecture = header.text("general.architecture")
    if header.text("general.type") not in (None, "model"):
        raise _unsupported(path, f"is a GGUF of type {header.text('general.type')!r}", "Give it a whole model.")
    if architecture not in ("qwen2", "qwen2moe"):
        raise _unsupported(path, f"is of the architecture {str(architecture)[:60]!r}", "Only qwen2 and qwen2moe are run here.")
    tensors: dict[str, GgufTensor] = {}
    for part in headers:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise _bad(part.path, f"the tensor {name!r} is in another part, too")
            tensors[name] = tensor
    total = header.keys.get("split.tensors.count")
    if len(headers) > 1 and total != len(tensors):
        raise _bad(path, f"its parts hold {len(tensors)} tensors, {str(total)[:40]} are expected")
    vocabulary = _check_tokenizer(header, keys)
    at = f"{architecture}."
    hidden = keys.count(f"{at}embedding_length", 1 << 16)
    heads = keys.count(f"{at}attention.head_count", 1 << 10)
    kv_heads = keys.count(f"{at}attention.head_count_kv", 1 << 10, default=heads)
    if hidden % heads or hidden // heads % 2 or heads % kv_heads:
        raise _bad(path, f"{heads} heads and {kv_heads} KV heads do not divide {hidden} channels")
    layers = keys.count(f"{at}block_count", _MAX_LAYERS)
    keys.number(f"{at}attention.layer_norm_rms_epsilon", 1e-12, 1e-2)
    _check_options(keys, at, hidden, hidden // heads)
    _check_tensors(path, tensors, _expected(keys, at, vocabulary, hidden, layers, hidden // heads * kv_heads))
    return GgufModel(
        paths=tuple(part.path for part in headers),
        header=header,
        tensors=tensors,
        architecture=architecture,
        quantization=_quantization(header, tensors),
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        context=keys.count(f"{at}context_length", 1 << 24),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def split_parts(path: Path) -> tuple[Path, ...]:
    """The names of all parts that the name of `path` speaks of ("x-00001-of-00003.gguf"); itself alone if it is no such name."""
    match = _PART.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if not match or not 1 < count <= _MAX_PARTS:
        return (path,)
    return tuple(path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


def _parts(path: Path) -> list[GgufHeader]:
    header = read_gguf(path)
    count = _split_key(header, "split.count", 1)
    if count <= 1:
        return [header]
    names = split_parts(path)
    if len(names) != count:
        hint = f"Name the parts NAME-00001-of-{count:05d}.gguf and so on."
        raise BadFile(f"{path} is a part of a model in {count} parts, but its name does not say so.", hint=hint)
    missing = [name.name for name in names if not name.is_file()]
    if missing:
        raise BadFile(f"{path.parent} lacks {len(missing)} of {count} parts: {', '.join(missing[:3])}.", hint="Fetch the missing parts.")
    del header
    headers: list[GgufHeader] = []
    # The first, whose keys are the model's, comes last: those of two hostile parts would not fit into memory.
    for number, name in reversed(list(enumerate(names))):
        part = read_gguf(name)
        if _split_key(part, "split.count", 1) != count or _split_key(part, "split.no", -1) != number:
            raise _bad(part.path, f"it is not part {number + 1} of {count}, as its name says")
        headers.insert(0, replace(part, keys={}) if number else part)
        if sum(len(part.tensors) for part in headers) > _MAX_TENSORS:
            raise _bad(path, f"its parts hold more than {_MAX_TENSORS} tensors")
    return headers


def _split_key(header: GgufHeader, key: str, default: int) -> int:
    value = header.keys.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value > _MAX_PARTS:
        raise _bad(header.path, f"the key {key} is {str(value)[:40]}")
    return value


def _check_tokenizer(header: GgufHeader, keys: _Keys) -> int:
    model = header.text("tokenizer.ggml.model")
    if model != "gpt2":
        raise _unsupported(header.path, f"has the tokenizer {str(model)[:40]!r}", "Qwen2's is a byte-level BPE, called gpt2 in GGUF files.")
    tokens = header.strings("tokenizer.ggml.tokens")
    if not tokens or not header.strings("tokenizer.ggml.merges"):
        raise _bad(header.path, "it has no tokens or no merges")
    # llama.cpp aborts the process on a token that occurs twice, and gives empty ones this name.
    if len({token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)}) != len(tokens):
        raise _bad(header.path, "tokenizer.ggml.tokens holds a token twice")
    for name, code in (("token_type", "i"), ("scores", "f")):
        # llama.cpp reads these arrays up to the number of tokens.
        values = header.keys.get(f"tokenizer.ggml.{name}")
        if values is not None and not (isinstance(values, array) and values.typecode == code and len(values) == len(tokens)):
            raise _bad(header.path, f"tokenizer.ggml.{name} is not one number a token")
    for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in header.keys:
            keys.count(key, len(tokens) - 1, least=0)
    return len(tokens)


def _check_options(keys: _Keys, at: str, hidden: int, head_dim: int) -> None:
    """The keys that a file may lack, but may not have with any value: llama.cpp aborts the process on most others."""
    path, header = keys.header.path, keys.header
    alone: dict[str, int | bool] = {
        "embedding_length_out": hidden, "attention.causal": True, "nextn_predict_layers": 0, "expert_group_count": 0,
        "attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim,
        "attention.key_length_swa": head_dim, "attention.value_length_swa": head_dim, "rope.dimension_count_swa": head_dim,
    }  # fmt: skip
    if at == "qwen2.":
        alone |= {"expert_count": 0, "expert_used_count": 0}
    for name, only in alone.items():
        value = header.keys.get(f"{at}{name}", only)
        if type(value) is not type(only) or value != only:
            raise _unsupported(path, f"has a {at}{name} of {_shown(value)}, not {only}", "No Qwen2 that writes text has that.")
    for name, (least, most) in _NUMBERS.items():
        if f"{at}{name}" in header.keys:
            keys.number(f"{at}{name}", least, most)
    keys.count(f"{at}rope.scaling.original_context_length", 1 << 24, least=0, default=0)
    scaling = header.text(f"{at}rope.scaling.type")
    if scaling not in (None, *_SCALINGS):
        raise _unsupported(path, f"has the rope scaling {scaling[:40]!r}", f"Known are {', '.join(_SCALINGS)}.")


def _expected(keys: _Keys, at: str, vocabulary: int, hidden: int, layers: int, kv: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape, and whether the tensor has to be there."""
    intermediate = keys.count(f"{at}feed_forward_length", 1 << 20)
    moe = at == "qwen2moe."
    yield "token_embd.weight", (hidden, vocabulary), True
    yield "output_norm.weight", (hidden,), True
    yield "output.weight", (hidden, vocabulary), moe
    if not moe:
        yield "output.bias", (vocabulary,), False
    else:
        experts = keys.count(f"{at}expert_count", _MAX_EXPERTS)
        used = keys.count(f"{at}expert_used_count", experts)
        # The first files of 57B-A14B lack these two; llama.cpp derives them like this.
        size = keys.count(f"{at}expert_feed_forward_length", 1 << 20, default=max(1, intermediate // used))
        shared = keys.count(f"{at}expert_shared_feed_forward_length", 1 << 20, default=intermediate)
    for layer in range(layers):
        block = f"blk.{layer}."
        yield f"{block}attn_norm.weight", (hidden,), True
        yield f"{block}ffn_norm.weight", (hidden,), True
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{block}attn_{name}.weight", (hidden, rows), True
            yield f"{block}attn_{name}.bias", (rows,), True
        yield f"{block}attn_output.weight", (hidden, hidden), True
        if not moe:
            yield from _mlp(block, "", hidden, intermediate)
            continue
        yield f"{block}ffn_gate_inp.weight", (hidden, experts), True
        yield f"{block}ffn_gate_inp_shexp.weight", (hidden,), True
        yield from _mlp(block, "_exps", hidden, size, experts)
        yield from _mlp(block, "_shexp", hidden, shared)


def _mlp(block: str, suffix: str, hidden: int, size: int, *stacked: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    yield f"{block}ffn_gate{suffix}.weight", (hidden, size, *stacked), True
    yield f"{block}ffn_up{suffix}.weight", (hidden, size, *stacked), True
    yield f"{block}ffn_down{suffix}.weight", (size, hidden, *stacked), True


def _check_tensors(path: Path, tensors: Mapping[str, GgufTensor], expected: Iterator[tuple[str, tuple[int, ...], bool]]) -> None:
    left = set(tensors)
    for name, shape, required in expected:
        tensor = tensors.get(name)
        if tensor is None:
            if required:
                raise _bad(path, f"the tensor {name!r} is missing")
            continue
        # A trailing 1 is no dimension: the gate of the shared expert is written both ways.
        if _squeezed(tensor.shape) != _squeezed(shape):
            raise _bad(path, f"the tensor {name!r} has the shape {list(tensor.shape)}, its keys demand {list(shape)}")
        kind = tensor.type.name
        # On norms and biases of half precision llama.cpp aborts the process; the gate of the shared expert it multiplies as a matrix.
        allowed = ("F32", "F16", "BF16") if name.endswith("shexp.weight") else ("F32",)
        if len(shape) == 1 and kind not in allowed:
            raise _bad(path, f"the tensor {name!r} is {kind}, but vectors are {' or '.join(allowed)}")
        if kind in ("I8", "I16", "I32", "I64", "F64", "Q8_K"):
            raise _bad(path, f"the tensor {name!r} is {kind}, which no weight is")
        left.discard(name)
    if left:
        raise _bad(path, f"the tensor {min(left)!r} does not belong to this model ({len(left)} such)")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _quantization(header: GgufHeader, tensors: Mapping[str, GgufTensor]) -> str:
    number = header.keys.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name])


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of a header, asked for by type and range."""

    header: GgufHeader

    def count(self, key: str, most: int, *, least: int = 1, default: int | None = None) -> int:
        value = self.header.keys.get(key, default)
        if value is None:
            raise _bad(self.header.path, f"the key {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _bad(self.header.path, f"the key {key} is {_shown(value)}, no whole number from {least} to {most}")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        value = self.header.keys.get(key)
        if value is None:
            raise _bad(self.header.path, f"the key {key} is missing")
        if not isinstance(value, float) or not least <= value <= most:
            raise _bad(self.header.path, f"the key {key} is {_shown(value)}, no number from {least:g} to {most:g}")
        return value


def _shown(value: object) -> str:
    return str(value)[:40] if isinstance(value, (int, float, str)) else "a list"


def _bad(path: Path, fault: str) -> BadFile:
    return BadFile(f"{path} is damaged: {fault}.", hint=_HINT)


def _unsupported(path: Path, fault: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"{path} {fault}.", hint=hint)
