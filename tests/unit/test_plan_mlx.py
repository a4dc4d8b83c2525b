"""What the tensors of an MLX folder become: bits, groups, which matrices get more, and what config.json says of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_converters.convert import check, convert
from qwen2_converters.plan_mlx import planned_mlx, quantization
from qwen2_converters.planned import Plan, PlannedTensor
from qwen2_converters.target import MLX, Target
from qwen2_local.errors import UnsupportedModel, UsageError
from qwen2_local.formats.checkpoint import expected_tensors
from qwen2_local.formats.config import MlxQuantization, Qwen2Config, parse_config
from tests.support import random_qwen2, tiny_checkpoint

QUANTIZED = [f"{kind}{group}" for kind in MLX if "bit" in kind or "mixed" in kind for group in ("", "-g32", "-g128")]


def config_of(**changes: object) -> Qwen2Config:
    return parse_config(random_qwen2.config(**changes), Path("config.json"))


def plan_of(target: str, config: Qwen2Config) -> Plan:
    made = Target("mlx", target)
    tensors = tuple(planned_mlx(name, shape, (), made, config) for name, shape in expected_tensors(config, "switch"))
    return Plan(made, config, tensors, nbytes=0, disk=0)


def bits_of(tensor: PlannedTensor) -> int | None:
    return 32 * tensor.parts[0].shape[-1] // tensor.shape[-1] if len(tensor.parts) == 3 else None


@pytest.mark.parametrize(
    ("text", "bits", "more", "group"),
    [
        ("f16", None, None, 64),
        ("3bit", 3, None, 64),
        ("8bit-g128", 8, None, 128),
        ("mixed_2_6", 2, 6, 64),
        ("mixed_3_4-g32", 3, 4, 32),
        ("mixed_4_6-g128", 4, 6, 128),
    ],
)
def test_what_a_target_asks_for(text: str, bits: int | None, more: int | None, group: int) -> None:
    target = Target.parse(f"mlx:{text}")
    assert (target.bits, target.more_bits, target.group) == (bits, more, group)
    assert str(target) == f"mlx:{text}"


def test_the_usual_group_need_not_be_said() -> None:
    assert Target.parse("mlx:mixed_3_6-g64") == Target.parse("mlx:mixed_3_6")


@pytest.mark.parametrize("text", ["mlx:4bit-g16", "mlx:4bit-g", "mlx:bf16-g64", "mlx:mixed_2_4", "mlx:mixed_4_6-g256", "mlx:4-bit", "gguf:mixed_4_6"])
def test_what_mlx_does_not_have_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="There is no target"):
        Target.parse(text)


@pytest.mark.parametrize("target", QUANTIZED)
def test_bits_and_groups_of_every_matrix(target: str) -> None:
    """Of `bits` a weight in whole 32-bit words, with one scale and one bias a group."""
    config, asked = config_of(tie_word_embeddings=False), Target("mlx", target)
    for tensor in plan_of(target, config).tensors:
        name = tensor.parts[0].name
        if len(tensor.shape) < 2 or tensor.shape[-1] % asked.group:
            assert [part.shape for part in tensor.parts] == [tensor.shape], name
            continue
        weight, scales, biases = tensor.parts
        assert 8 * weight.nbytes in [bits * math.prod(tensor.shape) for bits in (asked.bits, asked.more_bits) if bits], name
        assert scales.shape == biases.shape == (*tensor.shape[:-1], tensor.shape[-1] // asked.group), name


def layers_with_more(layers: int) -> set[int]:
    plan = plan_of("mixed_2_6", config_of(num_hidden_layers=layers))
    return {int(t.parts[0].name.split(".")[2]) for t in plan.tensors if bits_of(t) == 6 and t.parts[0].name.startswith("model.layers.")}


def test_which_layers_get_more_bits() -> None:
    """Those of Qwen2-0.5B and of Qwen2-7B, from mlx_lm."""
    assert layers_with_more(24) == {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    assert layers_with_more(28) == {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}


@given(st.integers(1, 100))
def test_the_first_and_last_eighth_are_among_them_and_a_third_of_the_rest(layers: int) -> None:
    more, eighth = layers_with_more(layers), layers // 8
    assert more >= set(range(eighth)) | set(range(7 * layers // 8, layers))
    assert all(len(more & {layer, layer + 1, layer + 2}) == 1 for layer in range(eighth, 7 * layers // 8 - 2))


@pytest.mark.parametrize(("tied", "head"), [(True, "model.embed_tokens"), (False, "lm_head")])
@pytest.mark.parametrize("target", ["mixed_2_6", "mixed_3_4", "mixed_3_6-g32", "mixed_4_6-g128"])
def test_the_head_gets_more_bits(target: str, tied: bool, head: str) -> None:
    plan = plan_of(target, config_of(tie_word_embeddings=tied))
    bits = {tensor.parts[0].name: bits_of(tensor) for tensor in plan.tensors}
    assert bits.pop(f"{head}.weight") == plan.target.more_bits
    assert bits.get("model.embed_tokens.weight", plan.target.bits) == plan.target.bits, "an embedding that is no head does not"


@pytest.mark.parametrize("target", QUANTIZED)
def test_config_says_what_is_done(target: str) -> None:
    """Read back as any MLX folder's is, it gives each quantized matrix the bits it has."""
    raw = random_qwen2.moe_config()
    plan = plan_of(target, parse_config(raw, Path("config.json")))
    read = parse_config(raw | {"quantization": quantization(plan)}, Path("config.json"))
    assert read.quantization == MlxQuantization(plan.target.bits or 0, plan.target.group)
    for tensor in plan.tensors:
        if bits := bits_of(tensor):
            module = tensor.parts[0].name.removesuffix(".weight")
            assert read.quantized.get(module, read.quantization) == MlxQuantization(bits, plan.target.group), module
    # The default is not said again.
    assert read.quantization not in read.quantized.values()


@pytest.mark.parametrize("target", ["4bit", "bf16", "mixed_3_6"])
def test_an_mlx_folder_is_taken_as_it_is(target: str, tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    for made in ("8bit", "f32"):
        source = convert(folder, Target("mlx", made), tmp_path / made)
        with pytest.raises(UnsupportedModel, match=f"{made} is an MLX folder already") as caught:
            check(source, Target("mlx", target))
        assert "Run it as it is, or convert the original checkpoint" in caught.value.hint
