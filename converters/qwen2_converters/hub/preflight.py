"""What a way means for this machine, before the first byte: what it is, what is written, what memory it takes. Nothing here is fetched or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen2_converters.hub.choose import Way
from qwen2_converters.hub.repository import Repository
from qwen2_converters.plan_gguf import planned_gguf
from qwen2_converters.plan_mlx import planned_mlx
from qwen2_converters.target import Target
from qwen2_local import fit
from qwen2_local.catalog import CatalogModel
from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.checkpoint import expected_tensors, parameters

_FREE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "unlicense", "isc"}
"""Licences that ask nothing of who runs a model."""

_SLACK = 16 << 20  # a header with a vocabulary of 152 k tokens, and config files


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a model's size. parameters, context (tokens), kv_values_per_token: 0 where unknown."""

    parameters: int = 0
    context: int = 0
    kv_values_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence: id ("" if the hub says none), address, and whether it must be accepted by a person."""

    id: str
    name: str
    url: str
    to_accept: bool


def shape_of(repository: Repository, model: CatalogModel | None, keys: Mapping[str, object] | None = None) -> Shape:
    """From config.json, else the keys of a GGUF, else the catalog."""
    config = repository.config
    if config is not None:
        return Shape(parameters(config), config.context, config.kv_values_per_token)
    if keys is not None:
        at = f"{keys.get('general.architecture')}."
        names = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "context_length")
        layers, hidden, heads, kv_heads, context = (_count(keys.get(at + name)) for name in names)
        return Shape(0, context, 2 * layers * (kv_heads or heads) * (hidden // heads) if heads else 0)
    if model is not None:
        return Shape(model.size.weights, model.context, model.size.kv_values_per_token)
    return Shape()


def check_keys(keys: Mapping[str, object], where: str) -> None:
    """Raises UnsupportedModel for the GGUF of another architecture, so that nobody waits for one that cannot be run."""
    architecture = keys.get("general.architecture")
    if architecture is not None and architecture not in ("qwen2", "qwen2moe"):
        raise UnsupportedModel(f"{where} is of the architecture {str(architecture)[:60]!r}.", hint="Only qwen2 and qwen2moe are run here.")


def licence_of(repository: Repository, model: CatalogModel | None) -> Licence:
    """The licence: the catalog's for its models, else the hub's word."""
    if model is not None:
        known = model.size.licence
        return Licence(known.id, known.name, known.url, known.id not in _FREE)
    id = repository.licence
    page = {"huggingface": "https://huggingface.co/", "modelscope": "https://www.modelscope.cn/models/"}.get(repository.source, "")
    return Licence(id, id or "not stated", f"{page}{repository.id}", bool(id) and id not in _FREE)


def converted_bytes(repository: Repository, target: Target) -> int:
    """Bytes that a conversion of the checkpoint writes, from its config alone; of GPTQ and AWQ at most so many."""
    config = repository.config
    assert config is not None
    if config.packed:  # codes stay as they are; scales may grow to float32
        return sum(file.size for file in repository.files if file.path.endswith(".safetensors")) * 9 // 8
    total = 0
    for name, shape in expected_tensors(config, "switch"):
        planned = planned_gguf(name, shape, (), target, config) if target.format == "gguf" else planned_mlx(name, shape, (), target, config)
        total += planned.nbytes
    return total + _vocabulary_bytes(repository)


def _vocabulary_bytes(repository: Repository) -> int:
    return sum(file.size for file in repository.files if file.path == "tokenizer.json")


def memory_at(way: Way, shape: Shape, context: int) -> int:
    """Bytes of memory that running what comes of `way` takes."""
    widened = fit.MLX_WIDENS and "mlx" in way.labels[-1]
    return fit.memory_needed(way.weights, shape.kv_values_per_token, context, 32 if widened else 16)


def fits(way: Way, shape: Shape, memory: fit.Memory, context: int = 8192) -> bool:
    """Does it leave this machine some room, at a context of so many tokens?"""
    return memory_at(way, shape, min(context, shape.context or context)) <= memory.total * fit.SHARE


def disk_needed(fetch: int, written: int) -> int:
    """Bytes to have free: for what is still to be fetched, and for what is made of it."""
    return fetch + written + _SLACK


def _count(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 24 else 0
