"""A LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors, checked as what a stranger claims.

An adapted matrix W becomes W + scale * B @ A. Read only where that is all that the adapter says; what it says beyond is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen2_converters.floats import finite, widen
from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.checkpoint import expected_tensors, member
from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.safetensors import TensorEntry, read_header, read_tensor
from qwen2_local.formats.strict_json import read_object

Floats = npt.NDArray[np.float32]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 1024
_MAX_CONFIG = 1_000_000
_HINT = "Fetch the adapter again from its original source."

_PROJECTION = r"(?:gate|up|down)_proj"
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?"
    rf"(lm_head|model\.layers\.\d{{1,4}}\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|shared_expert_gate|(?:shared_expert\.|experts\.\d{{1,4}}\.)?{_PROJECTION})))"
    r"\.lora_([AB])(?:\.default)?\.weight"
)
_FOREIGN = (
    (".lora_magnitude_vector", "DoRA"),
    (".lora_embedding_", "an adapted embedding"),
    (".modules_to_save.", "modules_to_save"),
    (".bias", "biases"),
)

_UNLIKE = (
    "use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip
"""Fields of adapter_config.json that, if set, make it something else than W + scale * B @ A of plain matrices."""

_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model as it was. PiSSA and its like change it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What is added to one matrix: scale * B @ A. a: [rank, columns]; b: [rows, rank]."""

    a: TensorEntry
    b: TensorEntry
    scale: float

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix: rows, columns."""
        return self.b.shape[0], self.a.shape[1]


class _Patterns:
    """A table by patterns of modules' names, looked up as PEFT does: the first key that is the name or its end; or with "^", its beginning."""

    def __init__(self, table: Mapping[str, float]) -> None:
        self._table = {key: (number, value) for number, (key, value) in enumerate(table.items())}

    def of(self, module: str, default: float) -> float:
        # A stranger's table may be long, a name is not.
        keys = [module[match.end() :] for match in re.finditer(r"^|\.", module)] + [f"^{module[:end]}" for end in range(1, len(module) + 1)]
        return min((self._table[key] for key in keys if key in self._table), default=(0, default))[1]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A validated adapter. file: of the weights. pairs: by the module of Hugging Face ("model.layers.0.self_attn.q_proj"), at least one."""

    folder: Path
    file: Path
    pairs: Mapping[str, Pair]

    def read(self, entry: TensorEntry) -> Floats:
        """An A or a B. Raises BadFile for values that are no finite numbers."""
        bits = read_tensor(self.file, entry)
        bits = bits.view(np.uint32 if entry.dtype == "F32" else np.uint16)
        if not finite(bits, entry.dtype):
            raise BadFile(f"{self.file} holds values that are no finite numbers.", hint=_HINT)
        return widen(bits, entry.dtype)


def is_adapter(folder: Path) -> bool:
    """Does `folder` look like a PEFT adapter's, or an MLX one's?"""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def open_adapter(folder: Path, base: Qwen2Config | None = None) -> Adapter:
    """Reads and checks the adapter in `folder`; of its tensors only the headers. base: of the model that it is for, if that is known.

    Raises BadFile, UnsupportedModel for what is no plain LoRA adapter of a Qwen2.
    """
    path = member(folder, CONFIG)
    config = read_object(path, _MAX_CONFIG)
    _refuse_foreign(folder, path, config)
    rank, alpha = config.get("r"), _number(config.get("lora_alpha"), path, "lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise BadFile(f"{path}: r: {str(rank)[:60]} is no whole number from 1 to {MAX_RANK}.", hint=_HINT)
    alphas = _Patterns({key: _number(value, path, f"alpha_pattern.{key[:60]}") for key, value in _pattern(config, "alpha_pattern", path).items()})
    ranks = {rank, *_pattern(config, "rank_pattern", path).values()}
    if max(ranks) > MAX_RANK:
        raise BadFile(f"{path}: rank_pattern: {str(max(ranks))[:60]} is above {MAX_RANK}.", hint=_HINT)
    rooted = config.get("use_rslora")
    if rooted not in (None, True, False):
        raise BadFile(f"{path}: use_rslora is neither true nor false.", hint=_HINT)
    file = member(folder, WEIGHTS)
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise UnsupportedModel(f"{folder} holds its weights as a pickle, which can run code.", hint="Save it with PEFT as safetensors.")
    pairs: dict[str, Pair] = {}
    for module, (a, b) in _found(file).items():
        if a.shape[0] not in ranks:
            raise BadFile(f"{file}: {module} has the rank {a.shape[0]}, which {CONFIG} does not name.", hint=_HINT)
        scale = alphas.of(module, alpha) / (math.sqrt(a.shape[0]) if rooted else a.shape[0])
        pairs[module] = Pair(a, b, scale)
    if not pairs:
        raise BadFile(f"{file} adapts nothing.", hint=_HINT)
    if base is not None:
        _check_shapes(file, pairs, base)
    return Adapter(folder, file, pairs)


def _refuse_foreign(folder: Path, path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind is None and "lora_parameters" in config:
        raise UnsupportedModel(f"{folder} is an MLX adapter already.", hint="Give the adapter that PEFT wrote.")
    if kind != "LORA":
        raise UnsupportedModel(f"{path}: this is no LoRA adapter, but of the kind {str(kind)[:40]!r} (peft_type).", hint="Only LoRA is known here.")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModel(f"{path}: the adapter is for another task, {str(task)[:40]!r}.", hint="Only those of language models are known here.")
    merge = "Merge it into its base model with PEFT (merge_and_unload), and convert that."
    for name in _UNLIKE:
        if config.get(name):
            raise UnsupportedModel(f"{path}: the adapter is more than plain LoRA ({name}).", hint=merge)
    if config.get("bias") not in (None, "none"):
        raise UnsupportedModel(f"{path}: the adapter also changes biases (bias).", hint=merge)
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise UnsupportedModel(f"{path}: the adapter is for a base model that was changed ({str(start)[:40]}).", hint=merge)


def _found(file: Path) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """A and B of each module, their shapes checked against each other."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_header(file).tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            fault = next((f"{what} ({name[:100]})" for sign, what in _FOREIGN if sign in name), f"the tensor {name[:100]!r}")
            raise UnsupportedModel(f"{file} holds {fault}, which is no plain LoRA adapter of a Qwen2.", hint="Only W + B @ A is known here.")
        module, half = match.groups()
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise BadFile(f"{file}: the tensor {name!r} is {entry.dtype}, not one of F32, F16, BF16.", hint=_HINT)
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise BadFile(f"{file}: the tensor {name!r} of shape {list(entry.shape)} is no matrix.", hint=_HINT)
        if half in halves.setdefault(module, {}):
            raise BadFile(f"{file} holds {module}.lora_{half} twice.", hint=_HINT)
        halves[module][half] = entry
    for module, pair in halves.items():
        if len(pair) < 2:
            raise BadFile(f"{file} holds only one of lora_A and lora_B of {module}.", hint=_HINT)
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise BadFile(f"{file}: lora_A and lora_B of {module} have different ranks.", hint=_HINT)
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _check_shapes(file: Path, pairs: Mapping[str, Pair], base: Qwen2Config) -> None:
    if base.tied and "lm_head" in pairs:
        fault = f"{file} adapts lm_head, which its base model shares with the embedding."
        raise UnsupportedModel(fault, hint="No format can say that: train it without lm_head.")
    left = dict(pairs)
    for name, shape in expected_tensors(base):
        pair = left.pop(name.removesuffix(".weight"), None)
        if pair is not None and pair.shape != shape:
            fault = f"{file}: {name.removesuffix('.weight')} is adapted as {list(pair.shape)}, the base model has {list(shape)}."
            raise BadFile(fault, hint="Give the base model that the adapter was trained on.")
        if not left:
            return
    raise BadFile(f"{file} adapts {min(left)}, which the base model does not have.", hint="Give the base model that the adapter was trained on.")


def _number(value: object, path: Path, name: str) -> float:
    # Where alpha is 0, llama.cpp takes the scale for 1.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 1e-6 <= value <= 1e6:
        raise BadFile(f"{path}: {name}: {str(value)[:60]} is no number from 1e-6 to 1e6.", hint=_HINT)
    return float(value)


def _pattern(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A table by modules' names. PEFT's are regular expressions, but it writes plain names; a stranger's could run forever."""
    table = config.get(name) or {}
    if not isinstance(table, dict) or not all(type(value) in (int, float) for value in table.values()):
        raise BadFile(f"{path}: {name} is no table of numbers.", hint=_HINT)
    for key in table:
        if not re.fullmatch(r"\^?[\w.]{1,200}", key):
            raise UnsupportedModel(f"{path}: {name} holds the pattern {key[:60]!r}.", hint="Only plain names of modules are known here.")
    return table
