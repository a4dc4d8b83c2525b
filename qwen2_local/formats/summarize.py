"""What a model holds without loading it: a GGUF or safetensors file, an MLX, Hugging Face or adapter folder, of any architecture.

Safe on hostile files: headers only, through the readers that check them, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.files import safe_name
from qwen2_local.formats.checkpoint import member, open_checkpoint
from qwen2_local.formats.magic import not_a, open_regular
from qwen2_local.formats.model_card import read_card
from qwen2_local.formats.safetensors import SafetensorsHeader, read_header
from qwen2_local.formats.strict_json import read_object
from qwen2_local.formats.summarize_gguf import summarize_gguf
from qwen2_local.formats.summary import MAX_TEMPLATE, Fact, Summary, TensorLine, abbreviated, abbreviated_table, histogram

_MAX_JSON = 4_000_000
_MAX_INDEX = 16_000_000
_MAX_SHARDS = 1000
_MAX_TENSORS = 200_000
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
_CONFIG = {
    "model_type": "architecture", "num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads", "intermediate_size": "intermediate", "num_experts": "experts", "num_experts_per_tok": "experts_used",
    "vocab_size": "vocabulary", "max_position_embeddings": "context",
}  # fmt: skip
_ADAPTER_FACTS = {
    "peft_type": "adapter", "fine_tune_type": "adapter", "base_model_name_or_path": "base_model", "model": "base_model", "r": "rank",
    "lora_alpha": "lora_alpha", "use_rslora": "rslora", "use_dora": "dora", "num_layers": "layers",
}  # fmt: skip
_PACKED = (".weight", ".qweight")
_BESIDE = (".scales", ".biases", ".qzeros", ".g_idx")


def summarize(path: Path) -> Summary:
    """What lies at `path`. Faults that leave something to show are in the summary.

    Raises BadFile where nothing can be shown: no such file, no model of any kind.
    """
    if path.is_dir():
        if (path / _ADAPTER).exists():
            return _adapter(path)
        found = sorted(islice((file for file in path.glob("*.gguf")), _MAX_SHARDS))
        if found and not (path / "config.json").exists():
            return summarize_gguf(found[0])
        return _folder(path)
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.", hint="Check the name and the folder.") from error
    if head.startswith(b"GGUF"):
        return summarize_gguf(path)
    if len(head) < 10 or head[8:9] != b"{":
        raise not_a("GGUF or safetensors file", path, head)
    return _one_file(path)


def _one_file(path: Path) -> Summary:
    shards = _Shards()
    keys = shards.add(read_header(path))
    return shards.summary("safetensors", {}, keys=keys)


def _folder(folder: Path) -> Summary:
    shards = _Shards()
    config: dict[str, Any] = {}
    try:
        config = read_object(member(folder, "config.json"), _MAX_JSON)
    except BadFile as error:
        shards.faults.append(error.what)
    names = _shard_names(folder, shards.faults)
    if not names and not config:
        hint = "Give a GGUF or safetensors file, or a folder with config.json and .safetensors files."
        raise BadFile(f"{folder} holds no model.", hint=hint)
    for name in names:
        if not shards.read(folder, name):
            break
    if not names:
        shards.faults.append(f"{folder} holds no .safetensors files.")
    facts = {name: abbreviated(config[field]) for field, name in _CONFIG.items() if config.get(field) is not None}
    quantization = _table(config, "quantization") or _table(config, "quantization_config")
    mlx = shards.mlx or ("quantization" in config and "quant_method" not in quantization)
    facts["dtype"] = abbreviated(config.get("dtype", config.get("torch_dtype")))
    facts |= _beside(folder, shards.faults)
    template = facts.pop("template", "")
    bits = _Bits(quantization)
    keys = abbreviated_table(config)
    config.clear()
    note = ""
    if not shards.faults:
        try:
            open_checkpoint(folder)
        except UnsupportedModel as error:
            note = error.what
        except BadFile as error:
            shards.faults.append(error.what)
    return shards.summary("MLX folder" if mlx else "Hugging Face folder", facts, keys=keys, bits=bits, template=str(template), note=note)


def _adapter(folder: Path) -> Summary:
    shards = _Shards()
    config: dict[str, Any] = {}
    try:
        config = read_object(member(folder, _ADAPTER), _MAX_JSON)
    except BadFile as error:
        shards.faults.append(error.what)
    weights = [name for name in _ADAPTER_WEIGHTS if (folder / name).exists()]
    for name in weights:
        shards.read(folder, name)
    if not weights:
        shards.faults.append(f"{folder} holds none of {' and '.join(_ADAPTER_WEIGHTS)}.")
    facts = {name: abbreviated(config[field]) for field, name in _ADAPTER_FACTS.items() if config.get(field) is not None}
    lora = _table(config, "lora_parameters")  # mlx_lm's
    facts |= {name: abbreviated(lora[name]) for name in ("rank", "scale", "alpha") if name in lora}
    kind = "MLX adapter" if "lora_parameters" in config or "adapters.safetensors" in weights else "PEFT adapter"
    return shards.summary(kind, facts, keys=abbreviated_table(config))


class _Bits:
    """How the packed matrices of a folder are packed, as its config.json says."""

    def __init__(self, quantization: Mapping[str, Any]) -> None:
        method = quantization.get("quant_method")
        self._prefix = f"{method[:20]} " if isinstance(method, str) else ""
        self._default = self._of(quantization)
        self._of_module = {name: self._of(value) for name, value in quantization.items() if isinstance(value, dict)}

    def of(self, module: str) -> tuple[str, int | None]:
        """What to call the packing of `module`, and bits a weight; None if the config does not say."""
        bits, group = self._of_module.get(module, self._default)
        if bits is None:
            return "packed", None
        return f"{self._prefix}{bits}-bit" + (f", groups of {group}" if group else ""), bits

    @staticmethod
    def _of(block: Mapping[str, Any]) -> tuple[int | None, int | None]:
        bits, group = block.get("bits"), block.get("group_size")
        return bits if type(bits) is int and 1 <= bits <= 32 else None, group if type(group) is int and 0 < group < 1 << 20 else None


class _Shards:
    """The tensors of some safetensors files."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorLine] = {}
        self.files: list[str] = []
        self.size = 0
        self.mlx = False
        self.faults: list[str] = []

    def read(self, folder: Path, name: str) -> bool:
        """Adds one more file, or the fault why not. Is there room for more?"""
        try:
            header = read_header(member(folder, name))
        except BadFile as error:
            self.faults.append(error.what)
            return True
        if len(self.tensors) + len(header.tensors) > _MAX_TENSORS:
            self.faults.append(f"{header.path} and what follows it is not shown: there are more than {_MAX_TENSORS:,} tensors in all.")
            return False
        self.add(header)
        return True

    def add(self, header: SafetensorsHeader) -> dict[str, Fact]:
        """Gives the file's metadata."""
        self.files.append(header.path.name)
        self.size += header.path.stat().st_size
        self.mlx = self.mlx or header.metadata.get("format") == "mlx"
        twice = header.tensors.keys() & self.tensors.keys()
        if twice:
            self.faults.append(f"{header.path} is damaged: the tensor {min(twice)[:100]!r} is in another file, too.")
        for name, entry in header.tensors.items():
            self.tensors[name] = TensorLine(name, entry.dtype, entry.shape, header.path.name, entry.begin, entry.end - entry.begin)
        return abbreviated_table(header.metadata)

    def summary(
        self, kind: str, facts: dict[str, Fact], *, keys: dict[str, Fact], bits: _Bits | None = None, template: str = "", note: str = ""
    ) -> Summary:
        bits = bits or _Bits({})
        sizes: dict[str, tuple[str, int]] = {}
        parameters: int | None = 0
        for name, tensor in self.tensors.items():
            module, ending = _module(name)
            packed = ending in _PACKED and f"{module}.scales" in self.tensors and tensor.type in ("U32", "I32")
            if ending in _BESIDE and any(f"{module}{other}" in self.tensors for other in _PACKED):
                continue
            label, width = bits.of(module) if packed else (tensor.type, None)
            nbytes = tensor.nbytes + sum(self.tensors[f"{module}{end}"].nbytes for end in _BESIDE if packed and f"{module}{end}" in self.tensors)
            sizes[name] = (label, nbytes)
            if packed and width is None:
                parameters = None
            elif parameters is not None:
                parameters += tensor.elements * 32 // width if width else tensor.elements
        return Summary(
            format=kind, files=tuple(self.files), size=self.size, parameters=parameters, kinds=histogram(sizes.values()), facts=facts,
            keys=keys, tensors=tuple(self.tensors.values()), template=template, faults=tuple(self.faults), note=note,
        )  # fmt: skip


def _module(name: str) -> tuple[str, str]:
    module, dot, ending = name.rpartition(".")
    return module, dot + ending


def _shard_names(folder: Path, faults: list[str]) -> list[str]:
    """Those that are there; what the index names and is not there, or the reverse, is a fault."""
    present = {path.name for path in islice(folder.glob("*.safetensors"), _MAX_SHARDS)}
    try:
        index = read_object(member(folder, _INDEX), _MAX_INDEX).get("weight_map") if (folder / _INDEX).exists() else None
        if index is None:
            return sorted(present)
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise BadFile(f"{folder / _INDEX} has no weight_map.")
        named = {safe_name(name, str(folder / _INDEX)) for name in islice(set(index.values()), _MAX_SHARDS)}
    except BadFile as error:
        faults.append(error.what)
        return sorted(present)
    missing = sorted(named - present)
    if missing:
        faults.append(f"{folder} lacks {len(missing)} of {len(named)} shards: {', '.join(missing[:3])}.")
    return sorted(present)


def _beside(folder: Path, faults: list[str]) -> dict[str, Fact]:
    """What the small files beside the weights tell: tokenizer, template, licence."""
    facts: dict[str, Fact] = {}
    try:
        path = member(folder, "tokenizer_config.json")
        if path.exists():
            tokenizer = read_object(path, _MAX_JSON)
            names = {"tokenizer_class": "class", "bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
            facts["tokenizer"] = {name: abbreviated(tokenizer[key]) for key, name in names.items() if isinstance(tokenizer.get(key), str)}
            if isinstance(tokenizer.get("chat_template"), str):
                facts["template"] = tokenizer["chat_template"][:MAX_TEMPLATE]
        if not facts.get("template") and (folder / "chat_template.jinja").exists():
            facts["template"] = _text(member(folder, "chat_template.jinja"))
        licence = read_card(member(folder, "README.md")).get("license")
        if licence:
            facts["licence"] = licence
    except BadFile as error:
        faults.append(error.what)
    return facts


def _text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(MAX_TEMPLATE).decode("utf-8", "replace")
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.") from error


def _table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}
