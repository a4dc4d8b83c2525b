"""Targets and plans, decided before any weight is read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2_converters.convert import check, convert
from qwen2_converters.plan import make_plan
from qwen2_converters.plan_gguf import gguf_name
from qwen2_converters.planned import Rows
from qwen2_converters.target import VALID, Target
from qwen2_local.catalog import SIZES as CATALOG_SIZES
from qwen2_local.catalog import Size
from qwen2_local.errors import UnsupportedModel, UsageError
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import Moe, Qwen2Config, Yarn
from tests.support import tiny_checkpoint


def qwen2(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool, moe: Moe | None = None) -> Checkpoint:
    config = Qwen2Config(
        model_type="qwen2_moe" if moe else "qwen2", vocabulary=vocabulary, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
        intermediate=intermediate, context=32768, rms_eps=1e-6, rope_theta=1e6, tied=tied, dtype="bfloat16", moe=moe,
    )  # fmt: skip
    return Checkpoint(Path("nowhere"), "hf", config, {}, {}, ())


SIZES = {
    "0.5b": qwen2(896, 24, 14, 2, 4864, 151936, True),
    "1.5b": qwen2(1536, 28, 12, 2, 8960, 151936, True),
    "7b": qwen2(3584, 28, 28, 4, 18944, 152064, False),
    "57b": qwen2(3584, 28, 28, 4, 18944, 151936, False, Moe(64, 8, 2560, 20480, False)),
    "72b": qwen2(8192, 80, 64, 8, 29568, 152064, False),
}


@pytest.mark.parametrize("text", VALID)
def test_targets_come_back_as_they_were_typed(text: str) -> None:
    assert str(Target.parse(f" {text.upper()} ")) == text


@pytest.mark.parametrize(
    "text", ["", "gguf", "q4_0", "gguf:", "gguf:4bit", "gguf:q4_k", "gguf:iq2_xs", "mlx:q4_0", "mlx:7bit", "mlx:f16-g32", "gguf:q4_0:x", "gguf: q4_0"]
)
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="There is no target") as caught:
        Target.parse(text)
    assert all(target.partition(":")[2] in caught.value.hint for target in VALID)


def test_labels() -> None:
    assert [Target.parse(text).label for text in ("gguf:q4_0", "mlx:4bit", "mlx:bf16")] == ["q4_0", "mlx-4bit", "mlx-bf16"]


# What llama-quantize printed for the 0.5B (dry run), and counts of the published checkpoints.
@pytest.mark.parametrize(("size", "tensors"), [("0.5b", 290), ("1.5b", 338), ("7b", 339), ("57b", 479), ("72b", 963)])
def test_every_tensor_is_planned(size: str, tensors: int) -> None:
    for target in VALID:
        plan = make_plan(SIZES[size], Target.parse(target))
        assert len(plan.tensors) == tensors
        assert plan.nbytes == sum(part.nbytes for tensor in plan.tensors for part in tensor.parts)
        assert plan.disk > plan.nbytes
        names = [part.name for tensor in plan.tensors for part in tensor.parts]
        assert len(names) == len(set(names))
        for tensor in plan.tensors:
            assert sum(rows.count for rows in tensor.rows) == tensor.row_count
            assert all(part.nbytes % tensor.row_count == 0 for part in tensor.parts)


@pytest.mark.parametrize("size", CATALOG_SIZES, ids=lambda size: size.name)
def test_sizes_are_those_of_llama_quantize(size: Size) -> None:
    for level, nbytes in size.gguf_bytes.items():
        assert make_plan(SIZES[size.name], Target("gguf", level)).nbytes == pytest.approx(nbytes, rel=0.015), level


def types(size: str, target: str, **options: bool) -> dict[str, str]:
    return {tensor.parts[0].name: tensor.parts[0].type for tensor in make_plan(SIZES[size], Target.parse(target), **options).tensors}


def test_a_padded_ffn_gets_real_k_quants() -> None:
    """Rows of 29568 weights are no whole blocks of 256, rows of 29696 are."""
    plain, padded = types("72b", "gguf:q4_k_m"), types("72b", "gguf:q4_k_m", pad_ffn=True)
    assert {plain[f"blk.{layer}.ffn_down.weight"] for layer in range(80)} == {"Q5_0", "Q8_0"}
    assert {padded[f"blk.{layer}.ffn_down.weight"] for layer in range(80)} == {"Q4_K", "Q6_K"}
    changed = {name for name, kind in plain.items() if padded[name] != kind}
    assert changed == {f"blk.{layer}.ffn_down.weight" for layer in range(80)}
    target = Target("gguf", "q4_k_m")
    assert make_plan(SIZES["72b"], target).nbytes == pytest.approx(47.4e9, rel=0.002)
    assert make_plan(SIZES["72b"], target, pad_ffn=True).nbytes == pytest.approx(44.0e9, rel=0.002)


def test_a_padded_ffn_ends_in_zeros() -> None:
    plan = make_plan(SIZES["72b"], Target("gguf", "q4_k_m"), pad_ffn=True)
    assert plan.config == replace(SIZES["72b"].config, intermediate=29696)
    found = {tensor.parts[0].name: tensor for tensor in plan.tensors}
    for name in ("gate", "up"):
        tensor = found[f"blk.79.ffn_{name}.weight"]
        assert tensor.shape == tensor.parts[0].shape == (29696, 8192)
        assert tensor.rows == (Rows(f"model.layers.79.mlp.{name}_proj.weight", 0, 29568), Rows(None, 0, 128))
    down = found["blk.79.ffn_down.weight"]
    assert down.shape == down.parts[0].shape == (8192, 29696)
    assert down.rows == (Rows("model.layers.79.mlp.down_proj.weight", 0, 8192),)


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_what_needs_no_padding_is_left_as_it_is(size: str) -> None:
    target = Target("gguf", "q4_k_m")
    assert make_plan(SIZES[size], target, pad_ffn=True) == make_plan(SIZES[size], target)


@pytest.mark.parametrize(("size", "context", "factor"), [("7b", 131072, 4.0), ("57b", 65536, 2.0), ("72b", 131072, 4.0)])
def test_yarn_stretches_as_was_announced(size: str, context: int, factor: float) -> None:
    plan = make_plan(SIZES[size], Target("gguf", "q4_0"), yarn=True)
    assert plan.config == replace(SIZES[size].config, context=context, yarn=Yarn(factor, 32768))
    assert plan.tensors == make_plan(SIZES[size], Target("gguf", "q4_0")).tensors


def test_yarn_that_is_there_already_stays() -> None:
    source = replace(SIZES["7b"], config=replace(SIZES["7b"].config, context=65536, yarn=Yarn(2.0, 32768)))
    assert make_plan(source, Target("gguf", "q4_0"), yarn=True).config == source.config


def test_options_that_are_not_for_this_model_are_refused() -> None:
    base = replace(SIZES["7b"], config=replace(SIZES["7b"].config, context=131072))
    other = replace(SIZES["7b"], config=replace(SIZES["7b"].config, layers=29))
    for source, target, option, fault in (
        (SIZES["57b"], "gguf:q4_0", "pad_ffn", "mixture of experts"),
        (SIZES["0.5b"], "gguf:q4_0", "yarn", "not made for more than 32,768"),
        (base, "gguf:q4_0", "yarn", "131,072 tokens of context"),
        (other, "gguf:q4_0", "yarn", "another shape"),
        (SIZES["7b"], "mlx:4bit", "yarn", "for GGUF files only"),
        (SIZES["7b"], "mlx:4bit", "pad_ffn", "for GGUF files only"),
        (SIZES["7b"], "mlx:4bit", "imatrix", "for GGUF files only"),
    ):
        with pytest.raises(UsageError, match=fault) as caught:
            make_plan(source, Target.parse(target), **{option: True})
        assert caught.value.hint


def test_the_head_gets_more_bits() -> None:
    assert types("0.5b", "gguf:q4_0")["token_embd.weight"] == "Q8_0"  # rows of 896
    assert types("1.5b", "gguf:q4_0")["token_embd.weight"] == "Q6_K"
    seven = types("7b", "gguf:q4_0")
    assert (seven["token_embd.weight"], seven["output.weight"], seven["blk.3.ffn_down.weight"]) == ("Q4_0", "Q6_K", "Q4_0")
    assert (seven["blk.0.attn_norm.weight"], seven["blk.0.attn_q.bias"]) == ("F32", "F32")


def test_gates_stay_exact() -> None:
    kinds = types("57b", "gguf:q4_0")
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.ffn_gate_inp_shexp.weight"] == "F32"
    plain = [tensor.parts[0].name for tensor in make_plan(SIZES["57b"], Target.parse("mlx:4bit")).tensors if len(tensor.parts) == 1]
    assert "model.layers.0.mlp.gate.weight" in plain and "model.layers.0.mlp.shared_expert_gate.weight" in plain
    assert not [name for name in plain if "proj.weight" in name or "embed" in name or "lm_head" in name]


def test_mlx_bits_per_weight() -> None:
    plan = make_plan(SIZES["7b"], Target.parse("mlx:4bit"))
    matrices = [tensor for tensor in plan.tensors if len(tensor.parts) == 3]
    assert 8 * sum(tensor.nbytes for tensor in matrices) / sum(math.prod(tensor.shape) for tensor in matrices) == 4 + 32 / 64


def test_experts_are_gathered_in_order(tmp_path: Path) -> None:
    config = tiny_checkpoint.moe(num_experts=3)
    weights = tiny_checkpoint.weights(config)
    for layout, values in (("each", weights), ("fused", tiny_checkpoint.fused(weights))):
        _, plan = check(tiny_checkpoint.write(tmp_path / layout, config, values), Target("gguf", "f16"))
        found = {tensor.parts[0].name: tensor for tensor in plan.tensors}
        up, down = found["blk.1.ffn_up_exps.weight"], found["blk.1.ffn_down_exps.weight"]
        assert (up.shape, down.shape) == ((3, 64, 128), (3, 128, 64))
        at = "model.layers.1.mlp.experts"
        if layout == "each":
            assert up.rows == tuple(Rows(f"{at}.{expert}.up_proj.weight", 0, 64) for expert in range(3))
        else:
            assert up.rows == tuple(Rows(f"{at}.gate_up_proj", 128 * expert + 64, 64) for expert in range(3))
            assert down.rows == tuple(Rows(f"{at}.down_proj", 128 * expert, 128) for expert in range(3))


def test_a_tied_mixture_of_experts_gets_its_head_twice(tmp_path: Path) -> None:
    config = tiny_checkpoint.moe(num_experts=4, tie_word_embeddings=True)
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    _, plan = check(folder, Target("gguf", "q8_0"))
    assert plan.tensors[-1].parts[0].name == "output.weight" and plan.tensors[-1].rows[0].source == "model.embed_tokens.weight"
    assert "lm_head.weight" not in {part.name for tensor in check(folder, Target("mlx", "4bit"))[1].tensors for part in tensor.parts}


def test_a_kept_copy_of_a_tied_head_is_dropped(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    weights = tiny_checkpoint.weights(config)
    folder = tiny_checkpoint.write(tmp_path / "hf", config, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    for target in VALID:
        names = {part.name for tensor in check(folder, Target.parse(target))[1].tensors for part in tensor.parts}
        assert not names & {"lm_head.weight", "output.weight"}


def test_names() -> None:
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("model.layers.17.self_attn.v_proj.bias") == "blk.17.attn_v.bias"
    assert gguf_name("model.layers.0.mlp.shared_expert_gate.weight") == "blk.0.ffn_gate_inp_shexp.weight"


def test_what_is_converted_already_is_refused(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    gguf = convert(folder, Target("gguf", "q8_0"), tmp_path / "model.gguf")
    mlx = convert(folder, Target("mlx", "8bit"), tmp_path / "mlx")
    for source in (gguf, mlx):
        with pytest.raises(UnsupportedModel, match="original checkpoint"):
            convert(source, Target("gguf", "q4_0"), tmp_path / "again.gguf")


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    config = tiny_checkpoint.moe(norm_topk_prob=True)
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    with pytest.raises(UnsupportedModel, match="norm_topk_prob"):
        check(folder, Target("gguf", "q4_0"))
    check(folder, Target("mlx", "4bit"))
