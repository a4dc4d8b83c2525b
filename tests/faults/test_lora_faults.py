"""Adapters that are more than plain LoRA, damaged, hostile, or for another model: refused by name before anything is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_converters import adapters
from qwen2_converters.adapters import convert_adapter
from qwen2_converters.convert import Options, check, convert
from qwen2_converters.lora import is_adapter, open_adapter
from qwen2_converters.target import Target
from qwen2_local import files
from qwen2_local.errors import BadFile, DoesNotFit, UnsupportedModel, UsageError
from qwen2_local.formats.config import read_config
from tests.support import lora, packed, tiny_checkpoint
from tests.support.random_qwen2 import Weights

CONFIG = tiny_checkpoint.dense(torch_dtype="float32")
WEIGHTS = tiny_checkpoint.weights(CONFIG, "F32")
TENSORS = lora.tensors(WEIGHTS, lora.settings())
AT = "base_model.model.model.layers.0.self_attn.q_proj"
F32 = Target("gguf", "f32")


def adapter(folder: Path, tensors: Weights = TENSORS, **changes: Any) -> Path:
    return lora.write(folder / "adapter", lora.settings(**changes), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"), ({"peft_type": None}, "no LoRA adapter"), ({"task_type": "SEQ_CLS"}, "another task"),
        ({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"), ({"bias": "all"}, "biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"), ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora"), ({"init_lora_weights": "pissa"}, "pissa"), ({"init_lora_weights": {"a": 1}}, "was changed"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "pattern"),
    ],
)  # fmt: skip
def test_more_than_plain_lora(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_adapter(adapter(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: 0"), ({"r": True}, "r: True"), ({"r": 4.0}, "r: 4.0"), ({"r": 10**9}, "from 1 to 1024"), ({"r": 8}, "has the rank 4"),
        ({"lora_alpha": 0}, "lora_alpha"), ({"lora_alpha": -1}, "lora_alpha"), ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"), ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1025}}, "rank_pattern: 1025"), ({"use_rslora": "yes"}, "use_rslora"),
    ],
)  # fmt: skip
def test_impossible_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=message):
        open_adapter(adapter(tmp_path, **changes))


SQUARE = np.zeros((4, 128), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{AT}.lora_magnitude_vector": SQUARE[0]}, "DoRA"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": SQUARE}, "embedding"),
        ({"base_model.model.lm_head.modules_to_save.weight": SQUARE}, "modules_to_save"),
        ({f"{AT}.lora_B.bias": SQUARE[0]}, "biases"),
        ({"base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight": SQUARE}, "qkv_proj"),
        ({"base_model.model.model.layers.00000.self_attn.q_proj.lora_A.weight": SQUARE}, "00000"),
        ({"../../evil.lora_A.weight": SQUARE}, "evil"),
        ({f"{AT}.lora_B.weight": None}, "only one of"),
        ({f"{AT}.lora_A.default.weight": SQUARE}, "twice"),
        ({f"{AT}.lora_A.weight": SQUARE.astype(np.int32)}, "is I32"),
        ({f"{AT}.lora_A.weight": SQUARE[0]}, "no matrix"),
        ({f"{AT}.lora_A.weight": SQUARE[:, :0]}, "no matrix"),
        ({f"{AT}.lora_A.weight": SQUARE[:2]}, "different ranks"),
        (dict.fromkeys(TENSORS), "adapts nothing"),
    ],
)
def test_tensors_that_are_no_adapter(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in (TENSORS | changes).items() if value is not None}
    with pytest.raises(BadFile, match=message):
        open_adapter(adapter(tmp_path, tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"num_hidden_layers": 1}, r"layers\.1\..*does not have"),
        (CONFIG | {"intermediate_size": 256}, r"is adapted as \[192, 128\], the base model has \[256, 128\]"),
        (tiny_checkpoint.moe(), "does not have"),
    ],
)
def test_another_base_model(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint.write(tmp_path / "base", config, tiny_checkpoint.weights(config))
    with pytest.raises(BadFile, match=message) as caught:
        convert_adapter(adapter(tmp_path), read_config(folder / "config.json"), F32, tmp_path / "out.gguf")
    assert "trained on" in caught.value.hint
    with pytest.raises(BadFile, match=message):
        convert(folder, F32, tmp_path / "out.gguf", options=Options(lora=tmp_path / "adapter"))


def test_a_tied_head(tmp_path: Path) -> None:
    head = {f"base_model.model.lm_head.lora_{half}.weight": np.ones(shape, np.float32) for half, shape in (("A", (4, 128)), ("B", (320, 4)))}
    folder = tiny_checkpoint.write(tmp_path / "base", CONFIG, WEIGHTS)
    with pytest.raises(UnsupportedModel, match="shares with the embedding"):
        open_adapter(adapter(tmp_path, head), read_config(folder / "config.json"))


@pytest.mark.parametrize("target", ["gguf:f16", "mlx:f32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float, target: str, tmp_path: Path) -> None:
    broken = TENSORS[f"{AT}.lora_B.weight"].copy()
    broken[-1, -1] = value
    source = adapter(tmp_path, TENSORS | {f"{AT}.lora_B.weight": broken})
    with pytest.raises(BadFile, match="no finite numbers"):
        convert_adapter(source, None, Target.parse(target), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    base = tiny_checkpoint.write(tmp_path / "base", CONFIG, WEIGHTS)
    with pytest.raises(BadFile, match="no finite numbers"):
        convert(base, F32, tmp_path / "out", options=Options(lora=source))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_values_too_large_for_16_bits(tmp_path: Path) -> None:
    source = adapter(tmp_path, TENSORS | {f"{AT}.lora_A.weight": np.full((4, 128), 1e6, np.float32)})
    with pytest.raises(BadFile, match="q_proj holds values that are too large for F16"):
        convert_adapter(source, None, Target("gguf", "f16"), tmp_path / "out")
    convert_adapter(source, None, Target("gguf", "bf16"), tmp_path / "out")


def test_experts_are_merged_only(tmp_path: Path) -> None:
    config = tiny_checkpoint.moe()
    weights = tiny_checkpoint.weights(config)
    source = adapter(tmp_path, lora.tensors(weights, lora.settings()))
    with pytest.raises(UnsupportedModel, match="experts") as caught:
        convert_adapter(source, None, F32, tmp_path / "out")
    assert "--lora" in caught.value.hint
    stacked = tiny_checkpoint.write(tmp_path / "fused", config, tiny_checkpoint.fused(weights))
    with pytest.raises(UnsupportedModel, match="experts are stacked"):
        convert(stacked, F32, tmp_path / "out", options=Options(lora=source))


def test_nothing_is_merged_into_quantized_weights(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(intermediate_size=256)
    source, _ = packed.checkpoint(tmp_path, config, packed.settings("gptq"))
    tensors = lora.tensors(tiny_checkpoint.weights(config), lora.settings())
    with pytest.raises(UnsupportedModel, match="nothing can be merged"):
        convert(source, Target("gguf", "q4_0"), tmp_path / "out", options=Options(lora=adapter(tmp_path, tensors)))


@pytest.mark.parametrize("target", ["gguf:q8_0", "mlx:4bit"])
def test_adapters_are_not_quantized(target: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not quantized"):
        convert_adapter(adapter(tmp_path), None, Target.parse(target), tmp_path / "out")


def test_what_is_an_adapter(tmp_path: Path) -> None:
    source = adapter(tmp_path)
    assert is_adapter(source)
    assert not is_adapter(tmp_path)
    assert not is_adapter(tiny_checkpoint.write(tmp_path / "base", CONFIG, WEIGHTS))
    made = convert_adapter(source, None, Target("mlx", "f32"), tmp_path / "mlx")
    assert is_adapter(made)
    with pytest.raises(UnsupportedModel, match="an MLX adapter already"):
        convert_adapter(made, None, F32, tmp_path / "out")
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        open_adapter(source)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    source = adapter(tmp_path)
    (source / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (source / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadFile, match="link out of its folder"):
        open_adapter(source)


def test_what_may_be_replaced(tmp_path: Path) -> None:
    source, mlx = adapter(tmp_path), Target("mlx", "f32")
    for target, output in ((F32, tmp_path / "a.gguf"), (mlx, tmp_path / "a")):
        convert_adapter(source, None, target, output)
        with pytest.raises(UsageError, match="exists"):
            convert_adapter(source, None, target, output)
        convert_adapter(source, None, target, output, overwrite=True)
    (tmp_path / "a" / "diary.txt").write_text("mine")
    for target, output in (
        (mlx, tmp_path / "a"),
        (mlx, tmp_path / "a.gguf"),
        (F32, tmp_path / "a"),
        (mlx, source),
        (F32, source / "x"),
        (mlx, tmp_path),
    ):
        with pytest.raises(UsageError):
            convert_adapter(source, None, target, output, overwrite=True)
    assert (tmp_path / "a" / "diary.txt").read_text() == "mine"


def test_what_a_crash_left_beside_the_output_is_swept(tmp_path: Path) -> None:
    source = adapter(tmp_path)
    (tmp_path / ".qwen2-0123456789abcdef").write_text("half")
    convert_adapter(source, None, F32, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.gguf"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_into_the_source_is_no_place(tmp_path: Path, overwrite: bool) -> None:
    source = adapter(tmp_path)
    (tmp_path / "link").symlink_to("adapter")
    for output in (tmp_path / "link", tmp_path / "link" / "x.gguf"):
        with pytest.raises(UsageError, match="lies in the source"):
            convert_adapter(source, None, F32, output, overwrite=overwrite)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = adapter(tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(DoesNotFit):
        convert_adapter(source, None, F32, tmp_path / "out")
    monkeypatch.undo()

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "safetensors_header", full)
    with pytest.raises(DoesNotFit):
        convert_adapter(source, None, Target("mlx", "f32"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_pattern_cannot_keep_it_busy(tmp_path: Path) -> None:
    """30,000 patterns for 7,000 matrices."""
    layer = {name.partition(".layers.0.")[2]: value for name, value in TENSORS.items() if ".layers.0." in name}
    tiny = {name: value[:, :1] if "lora_A" in name else value[:1] for name, value in layer.items()}
    tensors = {f"base_model.model.model.layers.{number}.{name}": value for number in range(1000) for name, value in tiny.items()}
    source = adapter(tmp_path, tensors, alpha_pattern={f"{number}.x": 4 for number in range(30_000)} | {"q_proj": 32})
    started = time.process_time()
    pairs = open_adapter(source).pairs
    assert time.process_time() - started < 5
    assert (pairs["model.layers.999.self_attn.q_proj"].scale, pairs["model.layers.0.self_attn.k_proj"].scale) == (8, 4)


def test_patterns_are_looked_up_in_their_order(tmp_path: Path) -> None:
    q0, q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    for pattern, wanted in (
        ({"q_proj": 8, q0: 12}, (2, 2)), ({q0: 12, "q_proj": 8}, (3, 2)), ({"^model.layers.1": 20, "q_proj": 8}, (2, 5)), ({"proj": 8}, (4, 4)),
    ):  # fmt: skip
        pairs = open_adapter(adapter(tmp_path, alpha_pattern=pattern)).pairs
        assert (pairs[q0].scale, pairs[q1].scale) == wanted, pattern


def test_options_of_the_model_are_checked_with_the_merge(tmp_path: Path) -> None:
    base = tiny_checkpoint.write(tmp_path / "base", CONFIG, WEIGHTS)
    checkpoint, plan = check(base, F32, Options(lora=adapter(tmp_path)))
    assert plan.nbytes == 4 * sum(value.size for value in WEIGHTS.values())
    assert checkpoint.layout == "hf"
