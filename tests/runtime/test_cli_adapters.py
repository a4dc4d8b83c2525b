"""`convert` of adapters and of GPTQ checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2_local.formats.gguf import read_gguf
from tests.support import lora, packed, tiny_checkpoint
from tests.support.program import here as run

CONFIG = tiny_checkpoint.dense(torch_dtype="float32", intermediate_size=200)
WEIGHTS = tiny_checkpoint.weights(CONFIG, "F32")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    settings = lora.settings()
    tiny_checkpoint.write(tmp_path / "base", CONFIG, WEIGHTS, dtype="F32")
    return lora.write(tmp_path / "Poet", settings, lora.tensors(WEIGHTS, settings))


def test_an_adapter_to_both_formats(adapter: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    done = run("convert", adapter, "--to", "gguf:f16", "--to", "mlx:f32", "--base", tmp_path / "base", "--pad-ffn", "--json", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(one["path"]).name for one in made] == ["Poet-f16.gguf", "Poet-mlx-f32"]
    assert made[0]["bytes"] == (here / "Poet-f16.gguf").stat().st_size
    header = read_gguf(here / "Poet-f16.gguf")
    assert header.keys["general.name"] == "Poet"
    assert sorted(header.tensors["blk.0.ffn_down.weight.lora_a"].shape) == [4, 256]
    assert json.loads((here / "Poet-mlx-f32" / "adapter_config.json").read_text())["num_layers"] == 2
    again = run("convert", adapter, "--to", "gguf:f16", cwd=here)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert run("convert", adapter, "--to", "gguf:f16", "--force", cwd=here).returncode == 0


def test_an_adapter_is_merged(adapter: Path, tmp_path: Path) -> None:
    done = run("convert", tmp_path / "base", "--to", "gguf:q8_0", "--lora", adapter, "-o", tmp_path / "merged.gguf")
    assert done.returncode == 0, done.stderr
    assert run("convert", tmp_path / "base", "--to", "gguf:q8_0", "-o", tmp_path / "plain.gguf").returncode == 0
    assert (tmp_path / "merged.gguf").stat().st_size == (tmp_path / "plain.gguf").stat().st_size
    assert (tmp_path / "merged.gguf").read_bytes() != (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["Poet", "--to", "gguf:q4_0"], 2, "gguf:f16"),
        (["Poet", "--to", "gguf:f16", "--name", "poet"], 2, "is an adapter"),
        (["Poet", "--to", "gguf:f16", "--lora", "Poet"], 2, "is an adapter"),
        (["Poet", "--to", "mlx:f16", "--pad-ffn"], 2, "GGUF files only"),
        (["Poet", "--to", "gguf:f16", "--base", "guide"], 3, "trained on"),
        (["Poet", "--to", "gguf:f16", "--base", "nothing"], 2, "nothing"),
        (["base", "--to", "gguf:f16", "--base", "base"], 2, "--base is for adapters"),
        (["base", "--to", "gguf:f16", "--lora", "base"], 3, "adapter_config.json"),
        (["packed", "--to", "gguf:q4_k_m"], 3, "gguf:q4_0, mlx:4bit, mlx:4bit-g128"),
    ],
)
def test_refusals(adapter: Path, arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    packed.checkpoint(tmp_path, tiny_checkpoint.dense(intermediate_size=256), packed.settings("gptq"))
    before = sorted(tmp_path.rglob("*"))
    where = [f"./{one}" if one in ("Poet", "base", "packed") else one for one in arguments]
    done = run("convert", *where, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gptq_checkpoint(tmp_path: Path) -> None:
    source, _ = packed.checkpoint(tmp_path, tiny_checkpoint.dense(intermediate_size=256), packed.settings("gptq"))
    done = run("convert", source, "--to", "gguf:q4_0", "--to", "mlx:4bit-g128", "-o", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["packed-mlx-4bit-g128", "packed-q4_0.gguf"]
    shown = json.loads(run("show", source, "--json").stdout)
    assert shown["quantization"] == "GPTQ, 4-bit, groups of 128"
    run_plain = run("run", source, "hello", "--max-tokens", "1")
    assert run_plain.returncode == 3
    assert "gguf:q4_0" in run_plain.stderr
