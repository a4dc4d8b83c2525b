"""What `verify` finds in whole, rotten and wrongly converted models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_converters.compare import TensorError
from qwen2_converters.convert import convert
from qwen2_converters.dequantize import affine, checkpoint_weights, gguf_weights, microscaled, unpack
from qwen2_converters.install import install
from qwen2_converters.making import Options
from qwen2_converters.target import Target
from qwen2_converters.verify import Report, verify
from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.gguf import read_gguf
from qwen2_local.formats.safetensors import read_header
from qwen2_local.store import Store
from tests.support import lora, packed, random_qwen2, tiny_checkpoint
from tests.support.program import run

WIDE = tiny_checkpoint.dense(hidden_size=256, intermediate_size=512)
"""Rows of whole k-quant blocks."""


def made(tmp_path: Path, target: str, config: dict[str, Any] = WIDE, **options: Any) -> tuple[Path, Path]:
    """A random checkpoint, and what it was converted to."""
    source = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    output = tmp_path / ("model.gguf" if target.startswith("gguf") else "mlx")
    return source, convert(source, Target.parse(target), output, **options)


def by_name(report: Report) -> dict[str, TensorError]:
    return {error.name: error for error in report.errors}


# Dequantizing


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "F16", "BF16"])
def test_gguf_types_are_read_as_the_gguf_package_reads_them(kind):
    from gguf import GGMLQuantizationType, quants

    from qwen2_converters import ggml
    from qwen2_local.formats.ggml_types import BY_NAME

    weights = np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32)
    ggml.prepare(BY_NAME[kind])
    raw = ggml.quantize(weights.reshape(-1), 512, BY_NAME[kind])
    theirs = quants.dequantize(raw.reshape(4, -1), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(ggml.dequantize(raw, BY_NAME[kind]).reshape(4, 512), theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_affine_codes_mean_what_mlx_says(bits, group):
    mx = pytest.importorskip("mlx.core")
    weights = mx.array(np.random.default_rng(2).standard_normal((8, 256)).astype(np.float32))
    codes, scales, biases = mx.quantize(weights, group, bits)
    ours = affine(np.array(codes).view(np.uint8), np.array(scales), np.array(biases), bits)
    np.testing.assert_array_equal(ours, np.array(mx.dequantize(codes, scales, biases, group, bits)))


@pytest.mark.parametrize(("mode", "group", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_tiny_floats_mean_what_mlx_says(mode, group, bits):
    mx = pytest.importorskip("mlx.core")
    weights = mx.array(np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32))
    codes, scales = mx.quantize(weights, group, bits, mode=mode)
    ours = microscaled(np.array(codes).view(np.uint8), np.array(scales), mode)
    np.testing.assert_array_equal(ours, np.array(mx.dequantize(codes, scales, None, group, bits, mode=mode).astype(mx.float32)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_code_is_unpacked(bits):
    codes = np.arange(64, dtype=np.uint64) % (1 << bits)
    stream = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    packed_codes = np.frombuffer(stream.to_bytes(8 * bits, "little"), np.uint8)
    np.testing.assert_array_equal(unpack(packed_codes.reshape(1, -1), bits)[0], codes)


@pytest.mark.parametrize("target", ["gguf:q4_k_m", "mlx:4bit"])
def test_any_rows_of_stacked_experts_are_read(tmp_path, target):
    _, output = made(tmp_path, target, tiny_checkpoint.moe(hidden_size=256, moe_intermediate_size=256))
    model = gguf_weights(open_gguf(output)) if output.is_file() else checkpoint_weights(open_checkpoint(output))
    weights = model["blk.0.ffn_down_exps.weight" if output.is_file() else "model.layers.0.mlp.switch_mlp.down_proj.weight"]
    assert weights.shape == (8, 256, 256)
    np.testing.assert_array_equal(weights.read(0, 2048)[700:900], weights.read(700, 200))


# The error against the source


@pytest.mark.parametrize(("target", "kind", "most"), [
    ("gguf:f32", "F32", 0), ("gguf:f16", "F16", 1e-8), ("gguf:bf16", "BF16", 0), ("gguf:q8_0", "Q8_0", 0.006), ("gguf:q4_k_m", "Q4_K", 0.08),
    ("gguf:q2_k", "Q2_K", 0.35), ("mlx:bf16", "BF16", 0), ("mlx:8bit", "8-bit", 0.01), ("mlx:3bit-g32", "3-bit", 0.2), ("mlx:4bit", "4-bit", 0.1),
])  # fmt: skip
def test_the_error_is_that_of_the_type(tmp_path, target, kind, most):
    source, output = made(tmp_path, target)
    report = verify(output, source=source)
    assert report.ok
    assert report.source == source
    errors = [error for error in report.errors if error.type == kind and error.weights > 1000]
    assert errors
    assert all(error.relative <= most for error in errors)
    assert most == 0 or max(error.relative for error in errors) > most / 40


def test_figures_are_those_of_a_plain_computation(tmp_path):
    from gguf import GGUFReader, quants

    source, output = made(tmp_path, "gguf:q4_0")
    error = by_name(verify(output, source=source))["blk.1.ffn_up.weight"]
    tensor = next(one for one in GGUFReader(output).tensors if one.name == error.name)
    want = tiny_checkpoint.weights(WIDE)["model.layers.1.mlp.up_proj.weight"].astype(np.float64)
    difference = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64) - want
    blocks = np.sqrt((difference.reshape(-1, 32) ** 2).mean(axis=1))
    assert error.weights == want.size
    assert error.rmse == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
    assert error.relative == pytest.approx(np.sqrt((difference**2).mean() / (want**2).mean()), rel=1e-4)
    assert error.maximum == pytest.approx(np.abs(difference).max(), rel=1e-6)
    assert (error.block, error.block_rmse) == (blocks.argmax(), pytest.approx(blocks.max(), rel=1e-4))


def test_the_worst_comes_first(tmp_path):
    source, output = made(tmp_path, "gguf:q4_k_m")
    relative = [error.relative for error in verify(output, source=source).errors]
    assert relative == sorted(relative, reverse=True)
    assert len(relative) == len(open_gguf(output).tensors)


@pytest.mark.parametrize("target", ["gguf:q4_0", "mlx:4bit"])
@pytest.mark.parametrize("layout", ["each", "fused"])
def test_experts_are_compared_each_with_its_own(tmp_path, target, layout):
    config = tiny_checkpoint.moe()
    weights = tiny_checkpoint.weights(config)
    source = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.fused(weights) if layout == "fused" else weights, shards=2)
    output = convert(source, Target.parse(target), tmp_path / ("m.gguf" if "gguf" in target else "m"))
    assert verify(output, source=source).ok
    # Two experts in each other's place.
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 5)]
    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]
    other = tiny_checkpoint.write(tmp_path / "other", config, weights)
    suspicious = [error.name for error in verify(output, source=other).errors if error.suspicious]
    assert suspicious == [("blk.1.ffn_up_exps.weight" if "gguf" in target else "model.layers.1.mlp.switch_mlp.up_proj.weight")]


def test_a_padded_ffn_is_compared_with_zeros(tmp_path):
    source, output = made(tmp_path, "gguf:q4_k_m", tiny_checkpoint.dense(hidden_size=256, intermediate_size=416), options=Options(pad_ffn=True))
    report = verify(output, source=source)
    assert report.ok
    assert by_name(report)["blk.0.ffn_down.weight"].weights == 256 * 512
    # A weight where there should be padding. Rows of ffn_up follow each other: the last one is padding.
    tensor = read_gguf(output).tensors["blk.0.ffn_up.weight"]
    with output.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes - 144)
        file.write(b"\x00\x3c\x00\x3c" + b"\xff" * 140)
    changed = by_name(verify(output, source=source))["blk.0.ffn_up.weight"]
    assert changed.block == 511
    assert changed.suspicious


@pytest.mark.parametrize(
    ("method", "bits", "target"), [("gptq", 4, "gguf:q4_0"), ("gptq", 8, "mlx:8bit"), ("awq", 4, "gguf:q4_1"), ("awq", 4, "mlx:4bit")]
)
def test_packed_sources(tmp_path, method, bits, target):
    source, plain = packed.checkpoint(tmp_path, tiny_checkpoint.dense(hidden_size=256, intermediate_size=512), packed.settings(method, bits))
    output = convert(source, Target.parse(target), tmp_path / ("m.gguf" if "gguf" in target else "m"))
    for origin in (source, plain):
        report = verify(output, source=origin)
        assert not report.faults
        assert max(error.relative for error in report.errors) < 0.003
    # The packed checkpoint itself, too.
    assert max(error.relative for error in verify(source, source=plain).errors) < 1e-6


def test_a_hugging_face_folder_is_compared_by_name(tmp_path):
    weights = tiny_checkpoint.weights(WIDE, "F32")
    source = tiny_checkpoint.write(tmp_path / "a", WIDE, weights, dtype="F32")
    other = tiny_checkpoint.write(tmp_path / "b", WIDE, weights, dtype="BF16")
    report = verify(other, source=source)
    assert report.ok
    assert 0.001 < max(error.relative for error in report.errors) < 0.005


# Broken conversions


def scaled(tmp_path: Path, factor: float) -> tuple[Path, Path]:
    """An MLX folder, and a source of which one tensor is `factor` times that of the folder."""
    _, output = made(tmp_path, "mlx:bf16")
    weights = tiny_checkpoint.weights(WIDE)
    weights["model.layers.1.self_attn.k_proj.weight"] *= np.float32(factor)
    return tiny_checkpoint.write(tmp_path / "other", WIDE, weights), output


@pytest.mark.parametrize("factor", [-1, 0.5, 2])
def test_a_wrong_tensor_is_found(tmp_path, factor):
    source, output = scaled(tmp_path, factor)
    report = verify(output, source=source)
    assert not report.ok
    assert [error.name for error in report.errors if error.suspicious] == ["model.layers.1.self_attn.k_proj.weight"]
    assert report.errors[0].suspicious


@pytest.mark.parametrize("seen", ["transposed", "shuffled"])
def test_turned_weights_are_found_even_at_two_bits(tmp_path, seen):
    _, output = made(tmp_path, "gguf:q2_k")
    weights = tiny_checkpoint.weights(WIDE)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].T if seen == "transposed" else np.roll(weights[name], 1, axis=0)
    source = tiny_checkpoint.write(tmp_path / "other", WIDE, weights)
    assert [error.name for error in verify(output, source=source).errors if error.suspicious] == ["blk.0.attn_q.weight"]


def test_weights_that_are_no_numbers_are_found_and_come_first(tmp_path):
    source, output = made(tmp_path, "mlx:4bit")
    header = read_header(output / "model.safetensors")
    entry = header.tensors["model.layers.0.mlp.up_proj.scales"]
    with (output / "model.safetensors").open("r+b") as file:
        file.seek(entry.begin)
        file.write(b"\xc0\x7f")
    report = verify(output, source=source)
    assert report.errors[0].name == "model.layers.0.mlp.up_proj.weight"
    assert report.errors[0].suspicious
    assert np.isnan(report.errors[0].relative)
    assert report.errors[0].block == 0


def test_a_tensor_of_zeros_has_no_error_or_an_infinite_one():
    zero = TensorError("t", "F32", 4, rms=0.0, rmse=0.0, maximum=0.0, block=0, block_rmse=0.0)
    assert not zero.suspicious
    assert TensorError("t", "F32", 4, rms=0.0, rmse=1e-9, maximum=1e-9, block=0, block_rmse=1e-9).suspicious


def test_another_model_as_the_source_is_one_fault(tmp_path):
    _, output = made(tmp_path, "gguf:q8_0")
    other = tiny_checkpoint.dense()
    source = tiny_checkpoint.write(tmp_path / "other", other, tiny_checkpoint.weights(other))
    report = verify(output, source=source)
    assert len(report.faults) == 1
    assert "The source is another model" in report.faults[0]
    assert report.errors == ()


def test_more_layers_in_the_source_are_named(tmp_path):
    _, output = made(tmp_path, "mlx:bf16")
    config = WIDE | {"num_hidden_layers": 3}
    report = verify(output, source=tiny_checkpoint.write(tmp_path / "other", config, tiny_checkpoint.weights(config)))
    assert report.faults[0] == "The tensor 'model.layers.2.input_layernorm.weight' is not in the model."
    assert report.faults[-1] == "7 more tensors are not in both."


def test_what_is_no_source_is_refused(tmp_path):
    _, output = made(tmp_path, "mlx:4bit")
    with pytest.raises(BadFile, match="is no folder"):
        verify(output, source=tmp_path / "nowhere")
    with pytest.raises(UnsupportedModel, match="is an MLX folder already"):
        verify(output, source=output)


# Structure and checksums


def test_damage_is_in_the_report(tmp_path):
    source, output = made(tmp_path, "gguf:q8_0")
    output.write_bytes(output.read_bytes()[:-1])
    report = verify(output, source=source)
    assert not report.ok
    assert report.errors == ()
    assert "it is truncated" in report.faults[0]


@pytest.fixture
def store(home: Path) -> Store:
    """The one that the program itself uses."""
    return Store()


@pytest.fixture
def installed(tmp_path: Path, store: Store) -> Any:
    source = tiny_checkpoint.write(tmp_path / "hf", WIDE, tiny_checkpoint.weights(WIDE))
    install(source, Target.parse("mlx:4bit"), store, "tiny:mlx-4bit")
    yield store.get("tiny:mlx-4bit")
    shutil.rmtree(store.folder / "tiny@mlx-4bit")


def test_an_installed_model_is_checked_and_compared_with_where_it_came_from(installed):
    done = run("verify", "TINY:mlx-4bit", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["ok"]
    assert report["files_hashed"] == len(installed.manifest.files)
    assert report["source"] == installed.manifest.source
    assert report["errors"][0].keys() == {"name", "type", "weights", "relative_rmse", "rmse", "rms", "max_error", "worst_block", "suspicious"}


def test_a_merged_adapter_is_no_damage(tmp_path, store):
    weights = tiny_checkpoint.weights(WIDE)
    source = tiny_checkpoint.write(tmp_path / "hf", WIDE, weights)
    adapter = lora.write(tmp_path / "adapter", lora.settings(), lora.tensors(weights, lora.settings()))
    made = install(source, Target.parse("mlx:bf16"), store, "tiny:merged", options=Options(lora=adapter))
    assert made.source == f"{source} + {adapter}"
    done = run("verify", "tiny:merged")
    assert done.returncode == 0, done.stdout
    assert "not at hand" in done.stdout
    # Asked for, the difference is shown.
    assert run("verify", "tiny:merged", "--source", source).returncode == 3
    store.remove("tiny:merged")


def test_rotten_missing_and_extra_files_are_all_named(installed):
    weights = installed.folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (installed.folder / "tokenizer_config.json").unlink()
    (installed.folder / "generation_config.json").write_text("{}")
    (installed.folder / "evil\x1b[31m.py").write_text("")
    done = run("verify", "tiny:mlx-4bit")
    assert done.returncode == 3
    assert "model.safetensors has changed since it was installed: its SHA-256 is another." in done.stdout
    assert "tokenizer_config.json is missing." in done.stdout
    assert "generation_config.json has 2 bytes," in done.stdout
    assert "evil[31m.py was not installed." in done.stdout
    assert "All is well" not in done.stdout


def test_a_damaged_manifest_is_said(installed):
    (installed.folder / "manifest.json").write_text("{")
    done = run("verify", "tiny:mlx-4bit")
    assert done.returncode == 3
    assert "tiny:mlx-4bit cannot be verified: its manifest is damaged" in done.stderr


def test_progress_covers_both_halves_and_never_goes_back(tmp_path, installed):
    seen: list[tuple[str, int, int]] = []
    verify(installed.path, manifest=installed.manifest, source=Path(installed.manifest.source), progress=lambda *told: seen.append(told))
    assert {phase for phase, _, _ in seen} == {"hashing", "comparing"}
    done = [count for _, count, _ in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2]


# The command


def test_the_table(tmp_path):
    source, output = made(tmp_path, "gguf:q4_0")
    done = run("verify", output, "--source", source)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("TENSOR"))
    assert lines[head].split("  ")[0] == "TENSOR"
    assert len(lines[head + 1 :]) == 10 + 3  # the worst, how many more, an empty line, the verdict
    assert lines[-1] == "All is well."
    everything = run("verify", output, "--source", source, "--all").stdout
    assert everything.count("blk.") == 24


def test_suspicious_tensors_end_with_3(tmp_path):
    source, output = scaled(tmp_path, 2)
    done = run("verify", output, "--source", source)
    assert done.returncode == 3
    assert "fault: 1 tensors are further from the source than their type explains" in done.stdout


def test_structure_alone_without_a_source(tmp_path):
    _, output = made(tmp_path, "mlx:4bit")
    done = run("verify", output)
    assert done.returncode == 0
    assert "not at hand (--source FOLDER compares the weights)" in done.stdout


def test_what_is_no_qwen2_is_refused(tmp_path):
    config = random_qwen2.config(model_type="llama")
    tiny_checkpoint.write(tmp_path / "llama", config, tiny_checkpoint.weights(WIDE))
    done = run("verify", tmp_path / "llama")
    assert done.returncode == 3
    assert "model type 'llama'" in done.stderr
