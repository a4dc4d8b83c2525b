"""What a GGUF file holds, of any architecture; all parts of a split one. Damaged ones as far as they can be read."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.check_gguf import FILE_TYPES, open_gguf, split_parts
from qwen2_local.formats.gguf import GgufHeader, GgufValue, salvage_gguf
from qwen2_local.formats.summary import MAX_TEMPLATE, Fact, Summary, TensorLine, abbreviated, abbreviated_table, cut, histogram

_MAX_TENSORS = 65_536
_SHAPE = {
    "block_count": "layers", "embedding_length": "hidden", "attention.head_count": "heads", "attention.head_count_kv": "kv_heads",
    "feed_forward_length": "intermediate", "expert_count": "experts", "expert_used_count": "experts_used", "context_length": "context",
}  # fmt: skip
_GENERAL = {
    "general.name": "name", "general.type": "type", "general.license": "licence", "general.source.url": "source",
    "general.base_model.0.repo_url": "base_model", "adapter.type": "adapter", "adapter.lora.alpha": "lora_alpha",
}  # fmt: skip


@dataclass(slots=True)
class _Found:
    """What has been read so far."""

    facts: dict[str, Fact] = field(default_factory=dict)
    keys: dict[str, Fact] = field(default_factory=dict)
    template: str = ""
    tensors: dict[str, TensorLine] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    size: int = 0


def summarize_gguf(path: Path) -> Summary:
    """What `path` holds, and the other parts if its name is that of a part. Raises BadFile where nothing at all can be read."""
    found = _Found()
    parts = split_parts(path)
    for number, part in enumerate(parts):
        if len(parts) > 1 and not part.exists():
            found.faults.append(f"{part.name} is missing: part {number + 1} of {len(parts)}.")
            continue
        try:
            _read_part(part, found, first=not found.keys)
        except BadFile as error:
            if len(parts) == 1:
                raise
            found.faults.append(error.what)
        if len(found.tensors) > _MAX_TENSORS:
            found.faults.append(f"Its parts hold more than {_MAX_TENSORS:,} tensors; what follows {part.name} was not read.")
            break
    note = ""
    # Only now: nothing that takes memory is kept of the headers.
    if not found.faults:
        try:
            open_gguf(path)
        except UnsupportedModel as error:
            note = error.what
        except BadFile as error:
            found.faults.append(error.what)
    tensors = tuple(found.tensors.values())
    return Summary(
        format="GGUF", files=tuple(part.name for part in parts), size=found.size, parameters=sum(tensor.elements for tensor in tensors),
        kinds=histogram((tensor.type, tensor.nbytes) for tensor in tensors), facts=found.facts, keys=found.keys, tensors=tensors,
        template=found.template, faults=tuple(found.faults), note=note,
    )  # fmt: skip


def _read_part(path: Path, found: _Found, *, first: bool) -> None:
    header, fault = salvage_gguf(path)
    found.size += path.stat().st_size
    if fault:
        found.faults.append(fault.what)
    if first:
        found.facts = _facts(header)
        found.keys = abbreviated_table(header.keys)
        template = header.keys.get("tokenizer.chat_template")
        found.template = template[:MAX_TEMPLATE] if isinstance(template, str) else ""
    twice = header.tensors.keys() & found.tensors.keys()
    if twice:
        found.faults.append(f"{path} is damaged: the tensor {min(twice)!r} is in another part, too.")
    for name, tensor in header.tensors.items():
        found.tensors[name] = TensorLine(name, tensor.type.name, tensor.shape[::-1], path.name, tensor.offset, tensor.nbytes)


def _facts(header: GgufHeader) -> dict[str, Fact]:
    keys = header.keys
    facts: dict[str, Fact] = {"version": header.version}
    architecture = keys.get("general.architecture")
    if isinstance(architecture, str):
        facts["architecture"] = cut(architecture)
    file_type = keys.get("general.file_type")
    if isinstance(file_type, int) and file_type in FILE_TYPES:
        facts["quantization"] = FILE_TYPES[file_type]
    facts |= {name: abbreviated(keys[key]) for key, name in _GENERAL.items() if key in keys}
    facts |= {name: abbreviated(keys[f"{architecture}.{key}"]) for key, name in _SHAPE.items() if f"{architecture}.{key}" in keys}
    return facts | _tokenizer(keys)


def _tokenizer(keys: dict[str, GgufValue]) -> dict[str, Fact]:
    tokens, merges = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.merges")
    if "tokenizer.ggml.model" not in keys and tokens is None:
        return {}
    facts: dict[str, Fact] = {"model": abbreviated(keys.get("tokenizer.ggml.model")), "split": abbreviated(keys.get("tokenizer.ggml.pre"))}
    facts |= {name: len(values) for name, values in (("tokens", tokens), ("merges", merges)) if isinstance(values, (list, array))}
    for name in ("bos", "eos", "padding"):
        number = keys.get(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int:
            known = isinstance(tokens, list) and 0 <= number < len(tokens)
            facts[name] = f"{number} {cut(tokens[number])!r}" if known and isinstance(tokens, list) else number
    return {"tokenizer": facts}
