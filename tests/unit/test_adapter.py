"""Adapters as loading finds, converts and checks them. No backend runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen2_local.backends import Plan
from qwen2_local.errors import BadFile, UnsupportedModel, UsageError
from qwen2_local.loading import open_model
from tests.support import gguf_bytes, lora, tiny_checkpoint
from tests.support.gguf_bytes import F32, STRING, key
from tests.unit.test_loading import write_gguf

CONFIG = tiny_checkpoint.dense(torch_dtype="float32")
WEIGHTS = tiny_checkpoint.weights(CONFIG, "F32")


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    settings = lora.settings()
    return lora.write(tmp_path / "Poet", settings, lora.tensors(WEIGHTS, settings))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint.write(tmp_path / "base", CONFIG, WEIGHTS, dtype="F32")


def plan(model: Path, adapter: Path | None, **options: Any) -> Plan:
    return open_model(str(model), adapter=adapter, **options).plan


@pytest.mark.parametrize("backend", ["llama.cpp", "mlx"])
def test_peft_s_is_converted_once(base: Path, peft: Path, backend: str) -> None:
    first = plan(base, peft, backend=backend)
    made = first.options.adapter
    assert made is not None
    assert made != peft
    assert {stamp.path for stamp in first.files} >= {made if made.is_file() else made / "adapters.safetensors"}
    age = made.stat().st_mtime_ns
    again = plan(base, peft, backend=backend)
    assert again == first
    assert made.stat().st_mtime_ns == age
    os.utime(peft / "adapter_model.safetensors", ns=(1, 1))
    other = plan(base, peft, backend=backend)
    assert other.options.adapter_identity != first.options.adapter_identity


def test_without_one_and_with_one_are_told_apart(base: Path, peft: Path) -> None:
    assert plan(base, None, backend="llama.cpp").options.adapter_identity == ""
    assert len(plan(base, peft, backend="llama.cpp").options.adapter_identity) == 64


def test_it_takes_memory(base: Path, peft: Path) -> None:
    plain = open_model(str(base), backend="llama.cpp").memory
    assert open_model(str(base), backend="llama.cpp", adapter=peft).memory > plain


def test_one_of_another_model(tmp_path: Path, peft: Path) -> None:
    with pytest.raises(BadFile, match=r"of \[32, "):
        open_model(str(write_gguf(tmp_path / "m.gguf")), adapter=peft)


def test_what_is_no_adapter(tmp_path: Path, base: Path) -> None:
    for path in (base, tmp_path / "nothing"):
        with pytest.raises(UsageError, match="is no adapter"):
            plan(base, path, backend="llama.cpp")


def test_one_of_the_other_backend(tmp_path: Path, base: Path, peft: Path) -> None:
    mlx = plan(base, peft, backend="mlx").options.adapter
    gguf = plan(base, peft, backend="llama.cpp").options.adapter
    with pytest.raises(UsageError, match="for MLX"):
        plan(base, mlx, backend="llama.cpp")
    with pytest.raises(UsageError, match="are folders"):
        plan(base, gguf, backend="mlx")
    assert plan(base, mlx, backend="mlx").options.adapter == mlx
    assert plan(base, gguf, backend="llama.cpp").options.adapter == gguf


def hostile(path: Path, *, keys: dict[str, bytes] | None = None, tensors: dict[str, tuple[int, ...]] | None = None, kind: int = 0) -> Path:
    """An adapter of one matrix for `write_gguf`'s model, but for these changes; a tensor of no shape is left out."""
    made = gguf_bytes.Model(kind=kind)
    made.keys = {
        "architecture": key("general.architecture", STRING, "qwen2"),
        "type": key("general.type", STRING, "adapter"),
        "adapter": key("adapter.type", STRING, "lora"),
        "alpha": key("adapter.lora.alpha", F32, 8.0),
    } | (keys or {})
    shapes: dict[str, tuple[int, ...]] = {"blk.0.attn_k.weight.lora_a": (gguf_bytes.HIDDEN, 4), "blk.0.attn_k.weight.lora_b": (4, gguf_bytes.KV)}
    made.tensors = {name: shape for name, shape in (shapes | (tensors or {})).items() if shape}
    path.write_bytes(made.build())
    return path


def test_a_sound_gguf_adapter(tmp_path: Path) -> None:
    model, adapter = write_gguf(tmp_path / "m.gguf"), hostile(tmp_path / "a.gguf")
    assert plan(model, adapter).options.adapter == adapter


A, B = "blk.0.attn_k.weight.lora_a", "blk.0.attn_k.weight.lora_b"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"keys": {"type": key("general.type", STRING, "model")}}, UnsupportedModel, "no adapter"),
        ({"keys": {"adapter": key("adapter.type", STRING, "control")}}, UnsupportedModel, "control"),
        ({"keys": {"architecture": key("general.architecture", STRING, "llama")}}, BadFile, "'llama'"),
        ({"keys": {"alpha": key("adapter.lora.alpha", F32, float("nan"))}}, BadFile, "alpha"),
        ({"keys": {"alpha": key("adapter.lora.alpha", F32, float("inf"))}}, BadFile, "alpha"),
        ({"keys": {"alpha": key("adapter.lora.alpha", STRING, "8")}}, BadFile, "alpha"),
        ({"keys": {"alora": key("adapter.alora.invocation_tokens", STRING, "8")}}, UnsupportedModel, "aLoRA"),
        ({"tensors": {B: ()}}, BadFile, "one half"),
        ({"tensors": {A: (), B: ()}}, BadFile, "adapts nothing"),
        ({"tensors": {A: (16, 4)}}, BadFile, "shapes"),
        ({"tensors": {A: (32, 8)}}, BadFile, "shapes"),
        ({"tensors": {A: (32,)}}, BadFile, "shapes"),
        ({"tensors": {A: (32, 4, 2)}}, BadFile, "shapes"),
        ({"tensors": {A: (32, 2000), B: (2000, 16)}}, BadFile, "shapes"),
        ({"tensors": {"blk.7.attn_k.weight.lora_a": (32, 4), "blk.7.attn_k.weight.lora_b": (4, 16)}}, BadFile, "does not have"),
        ({"tensors": {"token_embd.weight.lora_a": (32, 4)}}, UnsupportedModel, "cannot be adapted"),
        ({"tensors": {"blk.0.attn_k.weight": (32, 16)}}, UnsupportedModel, "cannot be adapted"),
    ],
)
def test_hostile_gguf_adapters(tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str) -> None:
    model, adapter = write_gguf(tmp_path / "m.gguf"), hostile(tmp_path / "a.gguf", **changes)
    with pytest.raises(error, match=says):
        open_model(str(model), adapter=adapter)


def test_a_damaged_config_is_a_bad_file(base: Path, peft: Path) -> None:
    (peft / "adapter_config.json").write_text("{")
    with pytest.raises(BadFile):
        plan(base, peft, backend="llama.cpp")
    (peft / "adapter_config.json").write_text(json.dumps(lora.settings(use_dora=True)))
    with pytest.raises(UnsupportedModel):
        plan(base, peft, backend="llama.cpp")
