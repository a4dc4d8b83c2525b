"""From a PEFT adapter to one that llama.cpp (a GGUF file) or mlx_lm (a folder) puts on top of a model while it runs.

Neither format has as many scales as PEFT: llama.cpp computes alpha / rank * B @ A with one alpha, MLX scale * B @ A with one scale and one
rank. Where matrices differ, their own factor goes into B, and smaller ranks are filled up with zeros: the products stay the same.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters.destination import check_place
from qwen2_converters.floats import finite, narrow
from qwen2_converters.gguf import lay_out
from qwen2_converters.keys import Keys
from qwen2_converters.lora import CONFIG, Adapter, Pair, open_adapter
from qwen2_converters.mix import FILE_TYPES
from qwen2_converters.mlx import safetensors_header
from qwen2_converters.plan import padded_ffn
from qwen2_converters.plan_gguf import gguf_name
from qwen2_converters.planned import Part
from qwen2_converters.target import Target
from qwen2_local import files
from qwen2_local.errors import BadFile, UnsupportedModel, UsageError
from qwen2_local.formats.config import Qwen2Config

Bits: TypeAlias = "npt.NDArray[Any]"

MLX_WEIGHTS = "adapters.safetensors"

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LAYER = re.compile(r"model\.layers\.\d+\.")
_FFN = re.compile(rf"{_LAYER.pattern}mlp\.(gate|up|down)_proj")
_SLACK = 1 << 20  # the header, or config and header


@dataclass(frozen=True, slots=True)
class _Fitted:
    """One matrix's pair as an output has it. factor: what goes into B. rows, columns, rank: larger than the pair's where zeros are added."""

    module: str
    pair: Pair
    factor: float
    rows: int
    columns: int
    rank: int

    def read(self, adapter: Adapter, dtype: str) -> tuple[Bits, Bits]:
        """A [rank, columns] and B [rows, rank] in `dtype`. Raises BadFile for values that are no numbers, or too large for it."""
        a = np.zeros((self.rank, self.columns), np.float32)
        b = np.zeros((self.rows, self.rank), np.float32)
        a[: self.pair.rank, : self.pair.shape[1]] = adapter.read(self.pair.a)
        b[: self.pair.shape[0], : self.pair.rank] = adapter.read(self.pair.b)
        b *= np.float32(self.factor)
        made = narrow(a, dtype), narrow(b, dtype)
        if not all(finite(bits, dtype) for bits in made):
            raise BadFile(f"{adapter.file}: {self.module} holds values that are too large for {dtype}.", hint="Convert to f32 or bf16.")
        return made


def convert_adapter(
    folder: Path,
    base: Qwen2Config | None,
    target: Target,
    output: Path,
    *,
    pad_ffn: bool = False,
    overwrite: bool = False,
    name: str | None = None,
) -> Path:
    """Converts the PEFT adapter in `folder` and gives `output`: a GGUF file or an MLX folder, whose parent exists.

    base: the config of the model that it is for, against which it is checked if it is given. target: of 16 or 32 bits. pad_ffn: it will run on
    a GGUF model that was converted so. name: what to call it in a GGUF file, by default as the folder.

    Raises BadFile and UnsupportedModel for the adapter, UsageError for a target or an `output` that is not for it, DoesNotFit for a full disk.
    """
    if target.weights not in ("f32", "f16", "bf16"):
        raise UsageError(
            f"An adapter is not quantized, so it cannot become {target}.", hint=f"Take {target.format}:f16, {target.format}:f32 or bf16."
        )
    if pad_ffn and target.format != "gguf":
        raise UsageError("A padded FFN is for GGUF files only.", hint=f"Leave the option out for {target}.")
    files.sweep(output.parent)
    check_adapter_destination(folder, target, output, overwrite=overwrite)
    adapter = open_adapter(folder, base)
    _refuse_experts(adapter)
    files.require_free(output.parent, _disk(adapter, target))
    if target.format == "gguf":
        with files.staging_file(output, overwrite=overwrite) as made:
            _write_gguf(adapter, base, target, made, pad_ffn=pad_ffn, name=name or folder.resolve().name)
    else:
        with files.staging(output, overwrite=overwrite) as made:
            _write_mlx(adapter, base, target, made)
    return output


def check_adapter_destination(folder: Path, target: Target, output: Path, *, overwrite: bool) -> None:
    """Raises UsageError unless the adapter in `folder` may become `output`. With `overwrite`, an adapter replaces one of its format."""
    check_place(folder, output)
    if not overwrite:
        files.refuse_existing(output)
    elif output.exists():
        ours = output.is_file() if target.format == "gguf" else output.is_dir() and {f.name for f in output.iterdir()} <= {CONFIG, MLX_WEIGHTS}
        if not ours:
            what = "a file" if target.format == "gguf" else "an MLX adapter's folder and nothing else"
            raise UsageError(f"{output} is not replaced: it is not {what}.", hint="Delete it yourself, or choose another name with -o.")


def _refuse_experts(adapter: Adapter) -> None:
    for module in adapter.pairs:
        if ".experts." in module or module.endswith((".mlp.gate", ".shared_expert_gate")):
            fault = f"{adapter.file} adapts {module}: experts and their gates are not adapted while a model runs."
            raise UnsupportedModel(fault, hint="Merge it instead: convert the base model with --lora.")


def _disk(adapter: Adapter, target: Target) -> int:
    rank = max(pair.rank for pair in adapter.pairs.values())
    most = sum(sum(map(padded_ffn, pair.shape)) * rank for pair in adapter.pairs.values())
    return most * _BYTES[target.weights.upper()] + _SLACK


def _write_gguf(adapter: Adapter, base: Qwen2Config | None, target: Target, path: Path, *, pad_ffn: bool, name: str) -> None:
    dtype = target.weights.upper()
    alpha = mode(pair.scale * pair.rank for pair in adapter.pairs.values())
    keys: Keys = {
        "general.architecture": _architecture(adapter, base),
        "general.type": "adapter",
        "general.name": name,
        "general.file_type": FILE_TYPES[target.weights],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    fitted: list[_Fitted] = []
    parts: list[Part] = []
    for module, pair in adapter.pairs.items():
        rows, columns = (padded_ffn(size) if pad_ffn and ffn else size for size, ffn in zip(pair.shape, _of_ffn(module), strict=True))
        fitted.append(_Fitted(module, pair, pair.scale * pair.rank / alpha, rows, columns, pair.rank))
        stem = gguf_name(f"{module}.weight")
        parts += _part(f"{stem}.lora_a", dtype, (pair.rank, columns)), _part(f"{stem}.lora_b", dtype, (rows, pair.rank))
    header, offsets, size = lay_out(keys, parts)
    with path.open("r+b") as file:
        file.write(header)
        os.ftruncate(file.fileno(), size)
        for number, one in enumerate(fitted):
            for part, bits in zip(parts[2 * number :], one.read(adapter, dtype), strict=False):
                file.seek(offsets[part.name])
                file.write(bits.data)


def _architecture(adapter: Adapter, base: Qwen2Config | None) -> str:
    moe = base.moe is not None if base else any(".shared_expert." in module for module in adapter.pairs)
    return "qwen2moe" if moe else "qwen2"


def _of_ffn(module: str) -> tuple[bool, bool]:
    """Is it the dense FFN's inner size that the rows and the columns of `module` count?"""
    match = _FFN.fullmatch(module)
    return (False, False) if match is None else (match[1] != "down", match[1] == "down")


def _write_mlx(adapter: Adapter, base: Qwen2Config | None, target: Target, folder: Path) -> None:
    dtype = target.weights.upper()
    scale, rank = mode(pair.scale for pair in adapter.pairs.values()), max(pair.rank for pair in adapter.pairs.values())
    parts: list[Part] = []
    for module, pair in adapter.pairs.items():
        parts += _part(f"{module}.lora_a", dtype, (pair.shape[1], rank)), _part(f"{module}.lora_b", dtype, (rank, pair.shape[0]))
    with (folder / MLX_WEIGHTS).open("xb") as file:
        file.write(safetensors_header(parts))
        for module, pair in adapter.pairs.items():
            for bits in _Fitted(module, pair, pair.scale / scale, *pair.shape, rank).read(adapter, dtype):
                file.write(np.ascontiguousarray(bits.T).data)
    # mlx_lm looks for modules by their names within a layer or by their whole names; -1: in all layers.
    modules = sorted({_LAYER.sub("", module) for module in adapter.pairs})
    config = {
        "fine_tune_type": "lora",
        "num_layers": base.layers if base else -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": modules},
    }
    files.write_file(folder / CONFIG, json.dumps(config, indent=4) + "\n")


def _part(name: str, dtype: str, shape: tuple[int, int]) -> Part:
    return Part(name, dtype, shape, shape[0] * shape[1] * _BYTES[dtype])
