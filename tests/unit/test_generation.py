from __future__ import annotations

from typing import Any

import pytest

from qwen2_local.errors import BadFile
from qwen2_local.generation import GenerationDefaults, from_config, from_gguf
from qwen2_local.types import Sampling

FALLBACK = GenerationDefaults(Sampling(temperature=0.7, top_k=20), (5, 3))
SPECIAL = {"<|endoftext|>": 3, "<|im_start|>": 4, "<|im_end|>": 5}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, FALLBACK),
        ({"bos_token_id": 3, "max_new_tokens": 2048}, FALLBACK),
        ({"temperature": None, "do_sample": None, "eos_token_id": None}, FALLBACK),
        ({"do_sample": False, "eos_token_id": 3}, GenerationDefaults(Sampling(), (3, 5))),
        ({"eos_token_id": [9, 5]}, GenerationDefaults(FALLBACK.sampling, (9, 5, 3))),
        ({"do_sample": False, "repetition_penalty": 1.1, "temperature": 0.7}, GenerationDefaults(Sampling(repetition_penalty=1.1), (5, 3))),
        ({"temperature": 0.7}, GenerationDefaults(Sampling(), (5, 3))),
        ({"do_sample": True, "min_p": 0.1, "top_k": 0}, GenerationDefaults(Sampling(temperature=1.0, min_p=0.1), (5, 3))),
        ({"do_sample": True}, GenerationDefaults(Sampling(temperature=1.0, top_k=50), (5, 3))),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [5, 3, 5]},
            GenerationDefaults(Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05), (5, 3)),
        ),
    ],
)
def test_configs_mean_what_hugging_face_means(config: dict[str, Any], expected: GenerationDefaults) -> None:
    assert from_config(config, fallback=FALLBACK) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_sample", "yes"),
        ("do_sample", 1),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 2.0),
        ("top_p", []),
        ("min_p", "0.1"),
        ("min_p", 1.5),
        ("top_k", 2.5),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", {}),
        ("eos_token_id", "5"),
        ("eos_token_id", -1),
        ("eos_token_id", True),
        ("eos_token_id", 2**31),
        ("eos_token_id", [5, None]),
        ("eos_token_id", [[5]]),
        ("eos_token_id", list(range(65))),
    ],
)
def test_hostile_values_are_refused_by_field(name: str, value: object) -> None:
    with pytest.raises(BadFile, match=r"x\.json"):
        from_config({"do_sample": True, name: value}, fallback=FALLBACK, where="x.json")


def test_a_gguf_with_sampling_keys() -> None:
    keys = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "general.sampling.top_p": 0.8, "general.sampling.penalty_repeat": 1.1}
    defaults = from_gguf(keys | {"tokenizer.ggml.eos_token_id": 5}, SPECIAL, fallback=Sampling(temperature=0.1))
    assert defaults == GenerationDefaults(Sampling(0.7, 0.8, 20, 1.1), (5, 3))
    assert from_gguf({"general.sampling.min_p": 0.05}, SPECIAL).sampling == Sampling(1.0, min_p=0.05)


def test_a_gguf_without_them_takes_the_fallback_or_is_greedy() -> None:
    keys = {"tokenizer.ggml.eos_token_id": 3}
    assert from_gguf(keys, SPECIAL, fallback=FALLBACK.sampling) == GenerationDefaults(FALLBACK.sampling, (3, 5))
    assert from_gguf(keys, SPECIAL) == GenerationDefaults(Sampling(), (3, 5))


@pytest.mark.parametrize("key", ["tokenizer.ggml.eos_token_id", "general.sampling.temp", "general.sampling.top_k"])
def test_hostile_gguf_keys_are_refused(key: str) -> None:
    with pytest.raises(BadFile, match=r"m\.gguf"):
        from_gguf({key: "x"}, SPECIAL, where="m.gguf")
