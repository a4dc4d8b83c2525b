"""The keys of a GGUF file: what the model is, its shape, its tokenizer, how it likes to be sampled.

Names and types as llama.cpp's convert_hf_to_gguf.py writes them (gguf-py's constants.py).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from qwen2_converters.imatrix import Importance
from qwen2_converters.mix import FILE_TYPES
from qwen2_converters.planned import Plan
from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import Checkpoint, member, parameters
from qwen2_local.formats.config import Qwen2Config
from qwen2_local.formats.model_card import read_card, read_card_lists
from qwen2_local.formats.strict_json import read_object
from qwen2_local.generation import GenerationDefaults, from_config
from qwen2_local.vocabulary import Vocabulary, read_tokenizer_json

Value: TypeAlias = "str | bool | int | float | np.int32 | list[str] | array[int]"
"""int is written as uint32, float as float32, an array as int32s."""

Keys: TypeAlias = dict[str, Value]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_MAX_JSON = 4_000_000
_MAX_TEXT = 1_000_000

_SIZE = re.compile(r"(?P<active>[aA])?(?P<number>[0-9]{1,4}(\.[0-9]{1,3})?)(?P<unit>[kmbtKMBT])")
_FINETUNE = re.compile(r"chat|instruct", re.IGNORECASE)
_VERSION = re.compile(r"v?[0-9]+(\.[0-9]+)*", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


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
        **_card(checkpoint),
        "general.file_type": FILE_TYPES[plan.target.weights],
        "general.quantization_version": 2,
    }
    return keys | _sampling(checkpoint, generation) | _importance(importance) | _shape(plan.config) | _tokenizer(checkpoint, generation)


def names(name: str, count: int) -> dict[str, str]:
    """The keys that take a model's name apart: "Qwen2-7B-Instruct" has a basename, a size and a finetune. count: of its weights.

    As gguf-py does it, for names that hold a size; else only the size is there, counted.
    """
    words = [word for word in name.split("-") if word]
    sizes = [word.upper() for word in words[1:] if _is_size(word, count)] if " " not in name else []
    if not sizes:
        return {"general.size_label": size_label(count)}
    after = [bool(_SIZE.fullmatch(word) or _FINETUNE.fullmatch(word)) for word in words]
    start = after.index(True, 1)
    tuned = [_context(word) for word in words[start:] if not _is_size(word, count) and not _VERSION.fullmatch(word)]
    versions = [word for word in words[start:] if _VERSION.fullmatch(word)]
    found = {"basename": words[:start], "finetune": tuned, "version": versions, "size_label": list(dict.fromkeys(sizes))}
    return {f"general.{key}": "-".join(parts) for key, parts in found.items() if parts}


def _context(word: str) -> str:
    """Lengths of context in small letters: "32k". Other words as they are."""
    return word.lower() if _SIZE.fullmatch(word) else word


def _is_size(word: str, count: int) -> bool:
    """Is it "7B", "0.5B" or "A14B", and no length of context such as "32K"?"""
    match = _SIZE.fullmatch(word)
    if not match:
        return False
    if match["active"]:
        return True
    claimed = float(match["number"]) * 10.0 ** (3 * " KMBT".index(match["unit"].upper()))
    return abs(claimed - count) <= 7 * count / 8


def size_label(count: int) -> str:
    """A count of weights as GGUF files spell it, two digits or more: "494M", "7.6B"."""
    size, letter = next((unit for unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if count > unit[0]), (1e3, "K"))
    return f"{count / size:.{1 if round(count / size) < 10 else 0}f}{letter}"


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


def licence(checkpoint: Checkpoint) -> dict[str, str]:
    """The keys general.license, .name and .link, as far as the head of README.md, where Hugging Face keeps them, has them."""
    found = read_card(member(checkpoint.folder, "README.md"))
    return {f"general.{name.replace('_', '.')}": value for name, value in found.items()}


def _card(checkpoint: Checkpoint) -> Keys:
    """What the model was made from, its tags and languages, as far as its README.md says so."""
    card = read_card_lists(member(checkpoint.folder, "README.md"))
    keys: Keys = {}
    bases = [base for base in card.get("base_model", ()) if _HUB_ID.fullmatch(base)]
    if bases:
        keys["general.base_model.count"] = len(bases)
    for number, base in enumerate(bases):
        organization, _, model = base.partition("/")
        keys[f"general.base_model.{number}.name"] = _title(model)
        keys[f"general.base_model.{number}.organization"] = _title(organization)
        keys[f"general.base_model.{number}.repo_url"] = f"https://huggingface.co/{base}"
    for key, fields in (("tags", ("tags", "pipeline_tag")), ("languages", ("language", "languages"))):
        values = [value for field in fields for value in card.get(field, ())]
        if values:
            keys[f"general.{key}"] = values
    return keys


def _title(text: str) -> str:
    """A hub's id for people: "my-model-7B" is "My Model 7B"."""
    return " ".join(word.title() if word.islower() and not word[0].isdecimal() else word for word in text.replace("-", " ").split())


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
