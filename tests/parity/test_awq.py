"""AWQ checkpoints become MLX with the same weights, bit for bit, and GGUF Q4_1 within the rounding of its minima."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_converters import awq, repack
from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from tests.support import packed, tiny_checkpoint
from tests.support.packed_parity import apart, gguf_weights, logits, mlx_weights, same

pytestmark = pytest.mark.usefixtures("on_processor")

GROUP = st.sampled_from([32, 64, 128])
SHAPE = {"group": GROUP, "rows": st.integers(1, 5), "groups": st.integers(1, 3), "seed": st.integers(0, 1000)}


def unpacked(matrix: packed.Matrix) -> repack.Codes:
    return awq.unpack(**packed.awq(matrix))


@settings(deadline=None, max_examples=30)
@given(**SHAPE)
def test_llama_cpp_reads_them_within_the_rounding_of_the_minimum(group: int, rows: int, groups: int, seed: int) -> None:
    matrix = packed.random_matrix(rows * 8, groups * group, group=group, symmetric=False, seed=seed)
    have = gguf.quants.dequantize(repack.q4_1(unpacked(matrix)), gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(have, matrix.with_minima)
    assert (np.abs(have - matrix.weights) <= 0.0074 * np.repeat(matrix.scales.astype(np.float32), group, axis=1)).all()


@settings(deadline=None, max_examples=30)
@given(smaller=GROUP, **SHAPE)
def test_mlx_reads_the_same_weights(group: int, smaller: int, rows: int, groups: int, seed: int) -> None:
    smaller = min(group, smaller)
    matrix = packed.random_matrix(rows * 8, groups * group, group=group, symmetric=False, seed=seed)
    weight, scales, biases = map(mx.array, repack.mlx_affine(unpacked(matrix), 4, smaller))
    have = mx.dequantize(weight, scales, biases, group_size=smaller, bits=4)
    assert have.dtype == mx.float32
    assert np.array_equal(np.array(have), matrix.weights)


def test_minima_beyond_16_bits_are_seen() -> None:
    codes = np.zeros((1, 32), np.uint8)
    fits, not_ = (repack.Codes(codes, np.array([[scale]], np.float16), np.array([[15]], np.uint8)) for scale in (4000, 5000))
    assert repack.fits_q4_1(fits)
    assert not repack.fits_q4_1(not_)


@pytest.mark.parametrize(
    "config", [tiny_checkpoint.dense(torch_dtype="float16"), tiny_checkpoint.moe(torch_dtype="float16")], ids=["dense", "experts"]
)
def test_a_checkpoint_to_gguf_and_mlx(config: dict[str, Any], tmp_path: Path) -> None:
    """MLX has the weights that the checkpoint stands for, GGUF those with rounded minima."""
    source, plain = packed.checkpoint(tmp_path, config, packed.settings("awq", group=64), shards=3)
    same(mlx_weights(convert(source, Target("mlx", "4bit"), tmp_path / "ours")), mlx_weights(convert(plain, Target("mlx", "f32"), tmp_path / "mlx")))
    _, rounded = packed.checkpoint(tmp_path / "rounded", config, packed.settings("awq", group=64), minima=True)
    ours = convert(source, Target("gguf", "q4_1"), tmp_path / "ours.gguf")
    same(gguf_weights(ours), gguf_weights(convert(rounded, Target("gguf", "f32"), tmp_path / "rounded.gguf")))


def test_both_backends_compute_what_the_weights_say(tmp_path: Path) -> None:
    source, plain = packed.checkpoint(tmp_path, tiny_checkpoint.dense(torch_dtype="float16"), packed.settings("awq", group=64))
    for target, tolerance in (("gguf:q4_1", 0.12), ("mlx:4bit", 1e-5)):
        format = Target.parse(target).format
        want = logits(convert(plain, Target(format, "f32"), tmp_path / f"plain.{format}"))
        have = logits(convert(source, Target.parse(target), tmp_path / f"ours.{format}"))
        assert want.std() > 0.5
        assert apart(have, want) < tolerance, target
