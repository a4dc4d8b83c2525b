"""A LoRA adapter in MLX's format, as the converters write it and mlx_lm.lora does: adapter_config.json and adapters.safetensors, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.checkpoint import expected_tensors, member
from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.safetensors import TensorEntry, read_header
from qwen2_local.formats.strict_json import read_object

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"
_MAX_CONFIG = 1_000_000
_MAX_RANK = 1024
_FLOATS = ("BF16", "F16", "F32")
_NAME = re.compile(r"(lm_head|model\.layers\.\d{1,4}\.(?:self_attn\.[qkvo]|mlp\.(?:shared_expert\.)?(?:gate|up|down))_proj)\.lora_([ab])")
_HINT = "Fetch or convert the adapter again."


@dataclass(frozen=True, slots=True)
class Adapter:
    """A validated adapter: matrices W of `modules` become W + (A @ B)^T * scale."""

    file: Path
    modules: tuple[str, ...]
    scale: float

    def pairs(self, dtype: mx.Dtype) -> Mapping[str, tuple[mx.array, mx.array]]:
        """A [in, rank] and scale * B [rank, out] by module, in memory. Raises BadFile for values that are no finite numbers."""
        arrays: dict[str, mx.array] = mx.load(str(self.file))  # type: ignore[assignment]  # a dict, for safetensors
        made = {}
        for module in self.modules:
            a, b = (arrays.pop(f"{module}.lora_{half}").astype(mx.float32) for half in "ab")
            pair = a.astype(dtype), (b * self.scale).astype(dtype)
            if not all(mx.isfinite(part).all().item() for part in pair):
                raise BadFile(f"{self.file}: {module} holds values that are no finite numbers.", hint=_HINT)
            made[module] = pair
        return made


def open_adapter(folder: Path, config: Qwen2Config) -> Adapter:
    """Reads and checks the adapter in `folder`, for the model of `config`; of its tensors only the headers.

    Raises BadFile, UnsupportedModel for what is no plain LoRA adapter of that model.
    """
    path = member(folder, _CONFIG)
    said = read_object(path, _MAX_CONFIG)
    if said.get("fine_tune_type", "lora") != "lora":
        raise UnsupportedModel(f"{path}: the kind {str(said['fine_tune_type'])[:40]!r} is not run here.", hint="Only LoRA adapters are.")
    parameters = said.get("lora_parameters")
    scale: object = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not abs(scale) < 1e6:
        raise BadFile(f"{path}: lora_parameters.scale: {str(scale)[:60]} is no number that a scale can be.", hint=_HINT)
    file = member(folder, _WEIGHTS)
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_header(file).tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UnsupportedModel(
                f"{file} adapts {name[:100]!r}, which cannot be adapted while a model runs.", hint="Convert the model with --lora."
            )
        halves.setdefault(match[1], {})[match[2]] = entry
    if not halves:
        raise BadFile(f"{file} adapts nothing.", hint=_HINT)
    shapes = {name.removesuffix(".weight"): shape for name, shape in expected_tensors(config, "switch") if name.removesuffix(".weight") in halves}
    for module, pair in halves.items():
        _check(file, module, pair, shapes.get(module))
    return Adapter(file, tuple(halves), float(scale))


def _check(file: Path, module: str, pair: Mapping[str, TensorEntry], shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise BadFile(f"{file} adapts {module}, which the model does not have.", hint="Choose the model that the adapter was made for.")
    if pair.keys() != {"a", "b"}:
        raise BadFile(f"{file}: of {module} only one half is there.", hint=_HINT)
    a, b = pair["a"], pair["b"]
    rank = a.shape[-1] if a.shape else 0
    if not 1 <= rank <= _MAX_RANK or a.shape != (shape[1], rank) or b.shape != (rank, shape[0]):
        fault = f"lora_a {list(a.shape)} and lora_b {list(b.shape)} do not adapt a matrix of {list(shape)}"
        raise BadFile(f"{file}: {module}: {fault}.", hint="Choose the model that the adapter was made for.")
    if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
        raise BadFile(f"{file}: {module} is of {a.dtype} and {b.dtype}, not of floats.", hint=_HINT)
