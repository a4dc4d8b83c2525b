"""Our GGUF files against llama.cpp's own quantizer, byte by byte, and against gguf-py's reader and names."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen2_converters import lanes
from qwen2_converters.convert import convert
from qwen2_converters.keys import gguf_keys
from qwen2_converters.plan import make_plan
from qwen2_converters.target import GGUF, Target
from qwen2_local import backends
from qwen2_local.backends.base import Layout, LoadOptions
from qwen2_local.errors import BadFile
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import parse_config
from qwen2_local.generation import from_gguf
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Sampling
from tests.support import qwen2_vocabulary, small_tokenizer, tiny_checkpoint
from tests.support.llama_quantize import quantize, tensors, write_plain
from tests.support.random_qwen2 import Weights

CASES: dict[str, tuple[dict[str, Any], str, Callable[[Weights], Weights]]] = {
    "tied, 256 wide": (tiny_checkpoint.dense(hidden_size=256, intermediate_size=512), "BF16", dict),
    "untied, 256 wide": (tiny_checkpoint.dense(hidden_size=256, tie_word_embeddings=False), "BF16", dict),
    "tied, 128 wide": (tiny_checkpoint.dense(), "BF16", dict),
    "untied, 128 wide": (tiny_checkpoint.dense(tie_word_embeddings=False), "F16", dict),
    "odd rows": (tiny_checkpoint.dense(hidden_size=72, intermediate_size=200, tie_word_embeddings=False), "F32", dict),
    "odd rows, tied": (tiny_checkpoint.dense(hidden_size=72, intermediate_size=200), "BF16", dict),
    "8 experts": (tiny_checkpoint.moe(hidden_size=256), "BF16", dict),
    "8 experts, fused": (tiny_checkpoint.moe(), "BF16", tiny_checkpoint.fused),
    "4 experts, 256 wide": (tiny_checkpoint.moe(num_experts=4, hidden_size=256, moe_intermediate_size=256), "F32", dict),
    "4 experts, fused, F16": (tiny_checkpoint.moe(num_experts=4), "F16", tiny_checkpoint.fused),
    "64 experts": (tiny_checkpoint.moe(num_experts=64, hidden_size=256, moe_intermediate_size=32, num_hidden_layers=1), "BF16", dict),
}

REAL_WIDTHS = tiny_checkpoint.dense(
    hidden_size=896, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, num_hidden_layers=1, vocab_size=320
)
"""A layer of the 0.5B. benchmarks/gguf_bytes.py compares the whole."""


@pytest.fixture(autouse=True)
def with_fast_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models are too small to build them for."""
    monkeypatch.setattr(lanes, "WORTH_IT", 0)


def float32(value: float) -> float:
    return float(np.float32(value))


def assert_same(ours: Path, theirs: Path, what: str) -> None:
    have, want = tensors(ours), tensors(theirs)
    assert {name: value[:2] for name, value in have.items()} == {name: value[:2] for name, value in want.items()}, what
    assert [name for name in want if have[name] != want[name]] == [], what


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_llama_cpp_makes(case: str, tmp_path: Path) -> None:
    config, dtype, layout = CASES[case]
    weights = tiny_checkpoint.weights(config, dtype)
    folder = tiny_checkpoint.write(tmp_path / "hf", config, layout(weights), dtype=dtype, shards=2)
    plain = write_plain(tmp_path / "plain.gguf", config, weights, dtype)
    for kind in GGUF:
        ours = convert(folder, Target("gguf", kind), tmp_path / f"{kind}.gguf")
        assert_same(ours, quantize(plain, tmp_path / f"{kind}-reference.gguf", kind), kind)
        model = open_gguf(ours)
        assert model.quantization == kind.upper()
        assert (model.vocabulary, model.context, model.layers) == (
            config["vocab_size"],
            config["max_position_embeddings"],
            config["num_hidden_layers"],
        )


def test_a_real_layer_is_what_llama_cpp_makes(tmp_path: Path) -> None:
    weights = tiny_checkpoint.weights(REAL_WIDTHS)
    folder = tiny_checkpoint.write(tmp_path / "hf", REAL_WIDTHS, weights)
    plain = write_plain(tmp_path / "plain.gguf", REAL_WIDTHS, weights, "BF16")
    for kind in ("q4_k_m", "q3_k_m", "q4_0"):
        ours = convert(folder, Target("gguf", kind), tmp_path / f"{kind}.gguf")
        assert_same(ours, quantize(plain, tmp_path / f"{kind}-reference.gguf", kind), kind)


def test_weights_that_only_wide_floats_hold(tmp_path: Path) -> None:
    """BF16 reaches as far as F32, F16 and what is built on it does not."""
    config = tiny_checkpoint.dense(torch_dtype="float32")
    weights = tiny_checkpoint.weights(config, "F32")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e9
    folder = tiny_checkpoint.write(tmp_path / "hf", config, weights, dtype="F32")
    plain = write_plain(tmp_path / "plain.gguf", config, weights)
    for kind in ("f32", "bf16"):
        assert_same(
            convert(folder, Target("gguf", kind), tmp_path / f"{kind}.gguf"), quantize(plain, tmp_path / f"{kind}-reference.gguf", kind), kind
        )
    for kind in ("f16", "q8_0"):
        with pytest.raises(BadFile, match=r"blk\.0\.ffn_up\.weight holds a weight of 1e\+09"):
            convert(folder, Target("gguf", kind), tmp_path / f"{kind}.gguf")


@pytest.mark.parametrize("case", ["tied, 128 wide", "8 experts", "8 experts, fused"])
def test_llama_cpp_loads_it(case: str, tmp_path: Path) -> None:
    config, dtype, layout = CASES[case]
    folder = tiny_checkpoint.write(tmp_path / "hf", config, layout(tiny_checkpoint.weights(config, dtype)), dtype=dtype)
    path = convert(folder, Target("gguf", "q4_0"), tmp_path / "model.gguf")
    backend = backends.load("llama.cpp", path, layout=Layout(1, 64), options=LoadOptions("", 64))
    try:
        assert backend.info.vocabulary == config["vocab_size"]
    finally:
        backend.close()


def test_keys(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    weights = tiny_checkpoint.weights(config)
    folder = tiny_checkpoint.write(tmp_path / "Tiny-Qwen2", config, weights)
    (folder / "README.md").write_text(
        "---\nlanguage:\n- en\nlicense: apache-2.0\nlicense_link: https://example.org/x\nbase_model: Qwen/Qwen2-0.5B\ntags: [chat]\n---\nlicense: x\n"
    )
    reader = gguf.GGUFReader(convert(folder, Target("gguf", "q8_0"), tmp_path / "model.gguf"))
    assert not [name for name in reader.fields if reader.fields[name].contents() is None]
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(("tokenizer", "GGUF"))}
    assert values == {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "Tiny-Qwen2",
        "general.size_label": gguf.size_label(sum(value.size for value in weights.values()), 0, 0, 0),
        "general.license": "apache-2.0",
        "general.license.link": "https://example.org/x",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Qwen2 0.5B",
        "general.base_model.0.organization": "Qwen",
        "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen2-0.5B",
        "general.tags": ["chat"],
        "general.languages": ["en"],
        "general.file_type": 7,
        "general.quantization_version": 2,
        "general.sampling.temp": float32(0.7),
        "general.sampling.top_p": float32(0.8),
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": float32(1.05),
        "qwen2.block_count": 2,
        "qwen2.context_length": 131072,
        "qwen2.embedding_length": 128,
        "qwen2.feed_forward_length": 192,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": float32(1e-6),
        "qwen2.rope.freq_base": 1e6,
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
    }
    typed = {"top_k": gguf.GGUFValueType.INT32, "temp": gguf.GGUFValueType.FLOAT32}
    assert all(reader.fields[f"general.sampling.{name}"].types == [kind] for name, kind in typed.items())


def test_tokenizer_keys(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    keys = open_gguf(convert(folder, Target("gguf", "q4_0"), tmp_path / "model.gguf")).header.keys
    size, count = small_tokenizer.SIZE, config["vocab_size"]
    base, control = len(small_tokenizer.BASE), len(small_tokenizer.CONTROL)
    assert keys["tokenizer.ggml.tokens"] == [
        *small_tokenizer.BASE, *small_tokenizer.CONTROL, small_tokenizer.TOOL, *(f"[PAD{number}]" for number in range(size, count)),
    ]  # fmt: skip
    assert keys["tokenizer.ggml.token_type"] == array("i", [1] * base + [3] * control + [4] + [5] * (count - size))
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in small_tokenizer.MERGES]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert keys["tokenizer.ggml.eos_token_id"] == tiny_checkpoint.END
    assert keys["tokenizer.ggml.padding_token_id"] == keys["tokenizer.ggml.bos_token_id"] == tiny_checkpoint.START
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == tiny_checkpoint.TEMPLATE
    ours, theirs = Tokenizer.from_gguf(keys), Tokenizer.from_json(folder / "tokenizer.json")
    text = "hello, héllo \n 你好<|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.size, ours.special) == (theirs.size, theirs.special)
    sampling = from_gguf(keys, ours.special).sampling
    assert sampling == Sampling(float32(0.7), float32(0.8), 20, float32(1.05))


@pytest.mark.skipif(qwen2_vocabulary.vocabulary_file() is None, reason="the package dashscope, which carries the vocabulary, is missing")
def test_the_real_tokenizer(tmp_path: Path) -> None:
    """The keys of the official 0.5B file, as llama.cpp's script makes them; no weights are needed."""
    qwen2_vocabulary.write_real_tokenizer(tmp_path)
    raw = tiny_checkpoint.dense(vocab_size=qwen2_vocabulary.EMBEDDINGS, bos_token_id=151643, eos_token_id=151645)
    checkpoint = Checkpoint(tmp_path, "hf", parse_config(raw, tmp_path), raw, {}, ())
    ours = gguf_keys(checkpoint, make_plan(checkpoint, Target("gguf", "q4_0")), "Qwen2-0.5B-Instruct")
    # The files of 2024 call padding user-defined; llama.cpp's script has called it unused since.
    types = array("i", [1] * 151643 + [3] * 3 + [5] * (qwen2_vocabulary.EMBEDDINGS - qwen2_vocabulary.TOKENS))
    for key, value in (qwen2_vocabulary.gguf_keys() | {"tokenizer.ggml.token_type": types}).items():
        assert ours[key] == value, key
    assert ours["tokenizer.chat_template"] == qwen2_vocabulary.TEMPLATE
    assert ours["general.sampling.penalty_repeat"] == 1.1
