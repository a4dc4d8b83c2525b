"""The keys of a GGUF file: what the model is, its shape, its tokenizer, how it likes to be sampled.

Names and types as llama.cpp's convert_hf_to_gguf.py writes them (gguf-py's constants.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from qwen2_converters.about import licence, lineage, names
from qwen2_converters.imatrix import Importance
from qwen2_converters.mix import FILE_TYPES
from qwen2_converters.planned import Plan
from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import Checkpoint, member, parameters
from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.strict_json import read_object
from qwen2_local.generation import GenerationDefaults, from_config
from qwen2_local.vocabulary import Vocabulary, read_tokenizer_json

Value: TypeAlias = "str | bool | int | float | np.int32 | list[str] | array[int]"
"""int is written as uint32, float as float32, an array as int32s."""

Keys: TypeAlias = dict[str, Value]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_MAX_JSON = 4_000_000
_MAX_TEXT = 1_000_000


def gguf_keys(checkpoint: Checkpoint, plan: Plan, name: str, importance: Importance | None = None, url: str = "") -> Keys:
    """All keys, in the order of the file. name: what to call the model. url: where it is from.

    Raises BadFile, or UnsupportedModel for a tokenizer that is not Qwen2's kind.
    """
    generation = optional_json(checkpoint, "generation_config.json")
    keys: Keys = {
        "general.architecture": "qwen2moe" if plan.config.moe else "qwen2",
        "general.type": "model",
        "general.name": name,
        **names(name, parameters(checkpoint.config)),
        **licence(checkpoint),
        **({"general.source.url": url} if url else {}),
        **lineage(checkpoint),
        "general.file_type": FILE_TYPES[plan.target.weights],
        "general.quantization_version": 2,
    }
    return keys | _sampling(checkpoint, generation) | _importance(importance) | _shape(plan.config) | _tokenizer(checkpoint, generation)


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The tokenizer's vocabulary. Raises BadFile also where it does not belong to the model, or its merges not to its tokens."""
    path = member(checkpoint.folder, "tokenizer.json")
    vocabulary = read_tokenizer_json(path)
    size = 1 + max(max(vocabulary.base.values()), max(vocabulary.added, default=0))
    if size > checkpoint.config.vocabulary:
        fault = f"{path} has {size:,} tokens, config.json allows {checkpoint.config.vocabulary:,} (vocab_size)."
        raise BadFile(fault, hint="They do not belong together: fetch the model again.")
    for left, right in vocabulary.merges:
        if left not in vocabulary.base or right not in vocabulary.base or left + right not in vocabulary.base:
            raise BadFile(f"{path}: the merge of {left[:40]!r} and {right[:40]!r} is of no tokens.", hint="Fetch the file again.")
    return vocabulary


def optional_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside the weights; empty without the file. Raises BadFile."""
    path = member(checkpoint.folder, name)
    return read_object(path, _MAX_JSON) if path.exists() else {}


def _importance(importance: Importance | None) -> Keys:
    if importance is None:
        return {}
    keys: Keys = {"quantize.imatrix.file": importance.path.name, "quantize.imatrix.entries_count": len(importance.columns)}
    if importance.dataset:
        keys["quantize.imatrix.dataset"] = importance.dataset
    if importance.chunks:
        keys["quantize.imatrix.chunks_count"] = importance.chunks
    return keys


def _sampling(checkpoint: Checkpoint, generation: Mapping[str, Any]) -> Keys:
    if not generation:
        return {}
    where = str(checkpoint.folder / "generation_config.json")
    sampling = from_config(generation, fallback=GenerationDefaults(), where=where).sampling
    return {
        "general.sampling.top_k": np.int32(sampling.top_k),
        "general.sampling.top_p": sampling.top_p,
        "general.sampling.temp": sampling.temperature,
        "general.sampling.penalty_repeat": sampling.repetition_penalty,
    }


def _shape(config: Qwen2Config) -> Keys:
    keys: Keys = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": config.intermediate,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.yarn:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.yarn.factor,
            "rope.scaling.original_context_length": config.yarn.original,
        }
    if config.moe:
        keys |= {
            "expert_count": config.moe.experts,
            "expert_used_count": config.moe.experts_per_token,
            "expert_feed_forward_length": config.moe.expert_size,
            "expert_shared_feed_forward_length": config.moe.shared_size,
        }
    prefix = "qwen2moe" if config.moe else "qwen2"
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def _tokenizer(checkpoint: Checkpoint, generation: Mapping[str, Any]) -> Keys:
    vocabulary = read_vocabulary(checkpoint)
    tokens, types = _tokens(vocabulary, checkpoint.config.vocabulary)
    keys: Keys = {
        "tokenizer.ggml.model": "gpt2",
        # llama.cpp's name for Qwen2's split without NFC before it.
        "tokenizer.ggml.pre": "qwen2" if vocabulary.nfc else "deepseek-r1-qwen",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in vocabulary.merges],
    }
    for key, field in (("eos", "eos_token_id"), ("padding", "pad_token_id"), ("bos", "bos_token_id")):
        number = _first_id(generation.get(field), len(tokens))
        if number is None:
            number = _first_id(checkpoint.raw.get(field), len(tokens))
        if number is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = number
    keys["tokenizer.ggml.add_bos_token"] = optional_json(checkpoint, "tokenizer_config.json").get("add_bos_token") is True
    template = _chat_template(checkpoint)
    return keys | {"tokenizer.chat_template": template} if template else keys


def _tokens(vocabulary: Vocabulary, count: int) -> tuple[list[str], array[int]]:
    """Text and type of each of the `count` rows of the embedding."""
    tokens = [f"[PAD{number}]" for number in range(count)]
    types = array("i", [_UNUSED]) * count
    for text, number in vocabulary.base.items():
        tokens[number], types[number] = text, _NORMAL
    for number, text in vocabulary.added.items():
        tokens[number], types[number] = text, _CONTROL if number in vocabulary.control else _USER_DEFINED
    return tokens, types


def _first_id(value: object, count: int) -> int | None:
    """A token id, or the first of a list of them; None for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    return first if type(first) is int and 0 <= first < count else None


def _chat_template(checkpoint: Checkpoint) -> str:
    template = optional_json(checkpoint, "tokenizer_config.json").get("chat_template")
    path = member(checkpoint.folder, "chat_template.jinja")
    if template is None and path.is_file():
        # Where transformers 5 keeps it.
        with path.open(encoding="utf-8", errors="replace") as file:
            template = file.read(_MAX_TEXT)
    return template if isinstance(template, str) else ""
