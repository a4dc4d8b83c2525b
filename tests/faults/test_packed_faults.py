"""GPTQ and AWQ checkpoints that say something else than their config, and targets that cannot say what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_converters import packed as reading
from qwen2_converters.convert import Options, check, convert
from qwen2_converters.target import Target
from qwen2_local.errors import BadFile, UnsupportedModel, UsageError
from qwen2_local.formats.checkpoint import open_checkpoint
from tests.support import packed, tiny_checkpoint
from tests.support.arriving import LocalArrivals
from tests.support.random_qwen2 import Weights

DENSE = tiny_checkpoint.dense(intermediate_size=256, torch_dtype="float16")
DOWN = "model.layers.1.mlp.down_proj"
METHODS = [("gptq", 4, "q4_0"), ("gptq", 8, "q8_0"), ("awq", 4, "q4_1")]


def write(folder: Path, tensors: Weights, quantization: dict[str, Any], config: dict[str, Any] = DENSE) -> Path:
    return tiny_checkpoint.write(folder, config | {"quantization_config": quantization}, tensors, dtype="F16")


@pytest.mark.parametrize(("method", "bits", "fitting"), METHODS)
def test_other_targets_are_refused_and_the_fitting_ones_named(method: Any, bits: int, fitting: str, tmp_path: Path) -> None:
    quantization = packed.settings(method, bits, 64)
    source = write(tmp_path / "source", packed.quantized(DENSE, quantization)[0], quantization)
    for target in ("gguf:f16", "gguf:q4_k_m", "gguf:iq4_nl", "mlx:bf16", "mlx:6bit", "mlx:mixed_4_6", f"mlx:{bits}bit-g128"):
        with pytest.raises(UnsupportedModel, match="quantized already") as caught:
            check(source, Target.parse(target))
        assert f"gguf:{fitting}, mlx:{bits}bit, mlx:{bits}bit-g32," in caught.value.hint
    for target in (f"gguf:{fitting}", f"mlx:{bits}bit", f"mlx:{bits}bit-g32"):
        check(source, Target.parse(target))
    with pytest.raises(UsageError, match="padded FFN"):
        check(source, Target("gguf", fitting), Options(pad_ffn=True))


def reordered(tensors: Weights) -> None:
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"][::-1].copy()


def negative_order(tensors: Weights) -> None:
    tensors[f"{DOWN}.g_idx"][3] = -1


def with_a_zero_point(tensors: Weights) -> None:
    tensors[f"{DOWN}.qzeros"][0, 0] ^= 1


def infinite_scale(tensors: Weights) -> None:
    tensors[f"{DOWN}.scales"][-1, -1] = np.inf


def no_number(tensors: Weights) -> None:
    tensors[f"{DOWN}.scales"][0, 77] = np.nan


def with_a_bias(tensors: Weights) -> None:
    tensors[f"{DOWN}.bias"] = np.full(128, 0.5, np.float16)


@pytest.mark.parametrize("target", ["gguf:q4_0", "mlx:4bit"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reordered, r"down_proj .*reordered"), (negative_order, "reordered"), (with_a_zero_point, "with a zero point"),
        (infinite_scale, "no finite numbers"), (no_number, "no finite numbers"), (with_a_bias, "a bias that is not 0"),
    ],
)  # fmt: skip
def test_what_only_the_weights_tell(change: Callable[[Weights], None], message: str, target: str, tmp_path: Path) -> None:
    quantization = packed.settings("gptq")
    tensors, _ = packed.quantized(DENSE, quantization)
    change(tensors)
    source = write(tmp_path / "source", tensors, quantization)
    with pytest.raises(BadFile, match=message):
        convert(source, Target.parse(target), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_act_order_in_name_only_is_converted(tmp_path: Path) -> None:
    quantization = packed.settings("gptq") | {"desc_act": True}
    source = write(tmp_path / "source", packed.quantized(DENSE, quantization)[0], quantization)
    assert convert(source, Target("gguf", "q4_0"), tmp_path / "out.gguf").exists()


def test_scales_that_no_minimum_can_hold(tmp_path: Path) -> None:
    quantization = packed.settings("awq")
    tensors, _ = packed.quantized(DENSE, quantization)
    tensors[f"{DOWN}.scales"][:] = 60000
    source = write(tmp_path / "source", tensors, quantization)
    with pytest.raises(BadFile, match="too large for Q4_1") as caught:
        convert(source, Target("gguf", "q4_1"), tmp_path / "out")
    assert "mlx:4bit" in caught.value.hint
    convert(source, Target("mlx", "4bit"), tmp_path / "mlx")


def test_experts_of_which_only_some_are_packed(tmp_path: Path) -> None:
    quantization = packed.settings("gptq", group=64)
    config = tiny_checkpoint.moe(torch_dtype="float16")
    tensors, weights = packed.quantized(config, quantization)
    name = "model.layers.0.mlp.experts.3.up_proj"
    for end in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{end}"]
    tensors[f"{name}.weight"] = weights[f"{name}.weight"]
    with pytest.raises(UnsupportedModel, match="only some of the experts"):
        check(write(tmp_path / "source", tensors, quantization, config), Target("gguf", "q4_0"))


def test_a_checkpoint_that_shrinks_meanwhile(tmp_path: Path) -> None:
    quantization = packed.settings("gptq")
    source = write(tmp_path / "source", packed.quantized(DENSE, quantization)[0], quantization)
    matrix = reading.PackedMatrix.of(open_checkpoint(source), f"{DOWN}.qweight")
    raw = matrix.fetch(8, 16)
    assert raw.size == 16 * (256 // 2 + 2 * 2)
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(matrix.parts["qweight"].entry.begin + 100)
    with pytest.raises(BadFile, match="became shorter"):
        matrix.fetch(8, 16)


@pytest.mark.parametrize("target", ["gguf:q4_0", "mlx:4bit"])
def test_shards_that_are_still_arriving(target: str, tmp_path: Path) -> None:
    """A matrix whose tensors lie in several shards needs them all: none is let go before the end."""
    source, _ = packed.checkpoint(tmp_path, DENSE, packed.settings("gptq"), shards=4)
    arrivals = LocalArrivals(source, tmp_path / "stubs")
    made = convert(tmp_path / "stubs", Target.parse(target), tmp_path / "made", name="x", options=Options(arrivals=arrivals))
    want = convert(source, Target.parse(target), tmp_path / "want", name="x")
    for path in [want] if want.is_file() else want.iterdir():
        assert (made / path.relative_to(want) if want.is_dir() else made).read_bytes() == path.read_bytes()
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert (arrivals.waited, arrivals.dropped) == (shards, shards)


@pytest.mark.parametrize("target", ["gguf:q4_0", "mlx:4bit"])
def test_a_stopped_conversion_goes_on(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = packed.checkpoint(tmp_path, DENSE, packed.settings("gptq"))
    want = convert(source, Target.parse(target), tmp_path / "want", name="x")
    fetch = reading.PackedMatrix.fetch
    seen: list[str] = []

    def stop(self: reading.PackedMatrix, first: int, rows: int) -> Any:
        seen.append(self.name)
        if len(set(seen)) == 8:
            raise KeyboardInterrupt
        return fetch(self, first, rows)

    with monkeypatch.context() as patch:
        patch.setattr(reading.PackedMatrix, "fetch", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, Target.parse(target), tmp_path / "made", name="x")
        done = set(seen)
        seen.clear()
        patch.setattr(reading.PackedMatrix, "fetch", lambda self, first, rows: seen.append(self.name) or fetch(self, first, rows))
        made = convert(source, Target.parse(target), tmp_path / "made", name="x")
    assert len(set(seen)) < 14
    assert done | set(seen) == {name.removesuffix(".qweight") for name in open_checkpoint(source).tensors if name.endswith(".qweight")}
    for path in [want] if want.is_file() else want.iterdir():
        assert (made / path.relative_to(want) if want.is_dir() else made).read_bytes() == path.read_bytes()
