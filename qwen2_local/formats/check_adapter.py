"""Is a GGUF file a LoRA adapter of a certain model? llama.cpp takes shapes and types on trust, and aborts the process on most that are wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.check_gguf import GgufModel
from qwen2_local.formats.gguf import GgufTensor, read_gguf

_MAX_RANK = 1024
_NAME = re.compile(r"(blk\.\d{1,4}\.(?:attn_(?:q|k|v|output)|ffn_(?:gate|up|down)(?:_shexp)?)\.weight|output\.weight)\.lora_([ab])")
_FLOATS = ("F32", "F16", "BF16")
_HINT = "Fetch or convert the adapter again."


def check_gguf_adapter(path: Path, model: GgufModel) -> int:
    """The bytes of its tensors. Raises BadFile for a damaged one or one of another model, UnsupportedModel for what is no plain LoRA."""
    header = read_gguf(path)
    kind = header.text("general.type")
    if kind != "adapter":
        raise UnsupportedModel(f"{path} is no adapter, but a GGUF of type {str(kind)[:40]!r}.", hint="Give a LoRA adapter.")
    if header.text("adapter.type") != "lora":
        raise UnsupportedModel(f"{path} is an adapter of type {str(header.text('adapter.type'))[:40]!r}.", hint="Only LoRA is run here.")
    architecture = header.text("general.architecture")
    if architecture != model.architecture:
        raise BadFile(f"{path} is for {str(architecture)[:40]!r}, the model is {model.architecture!r}.", hint=_OTHER)
    alpha = header.keys.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or abs(alpha) > 1e6:
        raise BadFile(f"{path}: adapter.lora.alpha is {str(alpha)[:40]}, no number that it can be.", hint=_HINT)
    # An aLoRA works from certain tokens on; llama.cpp reads this key.
    if "adapter.alora.invocation_tokens" in header.keys:
        raise UnsupportedModel(f"{path} is an aLoRA.", hint="Only plain LoRA is run here.")
    halves: dict[str, dict[str, GgufTensor]] = {}
    for name, tensor in header.tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UnsupportedModel(f"{path} adapts {name[:60]!r}, which cannot be adapted while a model runs.", hint="Convert the model with --lora.")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise BadFile(f"{path} adapts nothing.", hint=_HINT)
    for name, pair in halves.items():
        adapted = model.tensors.get(name)
        if adapted is None:
            raise BadFile(f"{path} adapts {name}, which the model does not have.", hint=_OTHER)
        _check(path, name, pair, adapted)
    return sum(tensor.nbytes for tensor in header.tensors.values())


_OTHER = "Choose the model that the adapter was made for."


def _check(path: Path, name: str, pair: dict[str, GgufTensor], adapted: GgufTensor) -> None:
    if pair.keys() != {"a", "b"}:
        raise BadFile(f"{path} has only one half of {name}.", hint=_HINT)
    a, b = pair["a"], pair["b"]
    columns, rows = adapted.shape
    rank = a.shape[1] if len(a.shape) == 2 else 0
    if not 1 <= rank <= _MAX_RANK or a.shape != (columns, rank) or b.shape != (rank, rows):
        shapes = f"{list(a.shape)} and {list(b.shape)}, for a matrix of {list(adapted.shape)}"
        raise BadFile(f"{path}: {name} has the shapes {shapes}.", hint=_OTHER)
    if a.type.name not in _FLOATS or b.type.name not in _FLOATS:
        raise UnsupportedModel(f"{path}: {name} is quantized ({a.type.name}).", hint="Convert the adapter to f16.")
