"""The mixed recipes, of some bits for most matrices and more for others: against mlx_lm's, and run by mlx_lm and by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from qwen2_local.backends.base import Row
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.config import MlxQuantization
from tests.support import mlx_models, random_qwen2, tiny_checkpoint

mlx_lm = pytest.importorskip("mlx_lm")
generate = pytest.importorskip("mlx_lm.generate")

pytestmark = pytest.mark.usefixtures("on_processor")

RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
LAYERS = 9
"""One in the first eighth, two in the last, and every third of the six between."""


def made(folder: Path, config: dict[str, Any], target: str) -> tuple[Path, Path]:
    """The checkpoint, and what we make of it."""
    source = tiny_checkpoint.write(folder / "hf", config, tiny_checkpoint.weights(config))
    return source, convert(source, Target.parse(f"mlx:{target}"), folder / "ours")


def load(folder: Path) -> dict[str, mx.array]:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in mx.load(str(path)).items()}


def quantization(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    block: dict[str, Any] = config["quantization"]
    return block


def different(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not mx.array_equal(ours[name].view(mx.uint8), theirs[name].view(mx.uint8)).item()]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_what_mlx_lm_makes_of_an_untied_model(recipe: str, group: int, tmp_path: Path) -> None:
    source, ours = made(tmp_path, tiny_checkpoint.dense(num_hidden_layers=LAYERS, tie_word_embeddings=False), f"{recipe}-g{group}")
    theirs = tmp_path / "theirs"
    mlx_lm.convert(str(source), str(theirs), quantize=True, quant_predicate=recipe, q_group_size=group, q_bits=RECIPES[recipe][0])
    assert different(load(ours), load(theirs)) == []
    # mlx_lm names every matrix, we those that have other bits than the rest.
    default, block = {"group_size": group, "bits": RECIPES[recipe][0], "mode": "affine"}, quantization(ours)
    named = {path: value for path, value in quantization(theirs).items() if isinstance(value, dict)}
    assert named and {path: block.get(path, default) for path in named} == named
    assert {path: value for path, value in block.items() if path not in named} == default


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tied_head_gets_more_bits(recipe: str, tmp_path: Path) -> None:
    """mlx_lm gives it the fewest, as it looks for lm_head; the rest is the same."""
    low, high = RECIPES[recipe]
    config = tiny_checkpoint.dense(num_hidden_layers=LAYERS)
    source, ours = made(tmp_path, config, recipe)
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, quant_predicate=recipe)
    head = mx.quantize(mx.array(tiny_checkpoint.weights(config)["model.embed_tokens.weight"]).astype(mx.bfloat16), 64, high)
    wanted = load(tmp_path / "theirs") | dict(zip((f"model.embed_tokens.{part}" for part in ("weight", "scales", "biases")), head, strict=True))
    assert different(load(ours), wanted) == []
    block = quantization(ours)
    # mlx_lm says group_size: null here.
    assert (block["group_size"], block["bits"]) == (64, low)
    assert block["model.embed_tokens"] == {"group_size": 64, "bits": high, "mode": "affine"}


def test_which_matrices_get_more_bits(tmp_path: Path) -> None:
    _, ours = made(tmp_path, tiny_checkpoint.dense(num_hidden_layers=LAYERS), "mixed_3_6")
    named = {path for path, value in quantization(ours).items() if isinstance(value, dict)}
    layers = (0, 3, 6, 7, 8)
    assert named == {"model.embed_tokens"} | {f"model.layers.{n}.{path}" for n in layers for path in ("self_attn.v_proj", "mlp.down_proj")}


def test_in_a_mixture_of_experts(tmp_path: Path) -> None:
    """Experts and shared expert as in a dense model; the gates are not quantized."""
    config = tiny_checkpoint.moe()
    _, ours = made(tmp_path, config, "mixed_3_6-g32")
    tensors, block = load(ours), quantization(ours)
    for name, value in random_qwen2.stacked(tiny_checkpoint.weights(config)).items():
        module, _, ending = name.rpartition(".")
        plain = mx.array(value).astype(mx.bfloat16)
        if ending == "bias" or value.ndim < 2 or module.endswith((".gate", "_gate")):
            assert mx.array_equal(tensors[name], plain).item()
            continue
        more = module == "lm_head" or (module.startswith("model.layers.1.") and module.endswith(("v_proj", "down_proj")))
        assert block.get(module, {"bits": 3})["bits"] == (6 if more else 3)
        for part, wanted in zip(("weight", "scales", "biases"), mx.quantize(plain, 32, 6 if more else 3), strict=True):
            assert mx.array_equal(tensors[f"{module}.{part}"], wanted).item()


CONFIGS = {
    "tied": tiny_checkpoint.dense(num_hidden_layers=LAYERS),
    "untied": tiny_checkpoint.dense(num_hidden_layers=LAYERS, tie_word_embeddings=False),
    "experts": tiny_checkpoint.moe(),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("target", [*RECIPES, "mixed_3_6-g32", "3bit-g32", "5bit", "6bit-g128", "8bit", "f32"])
def test_mlx_lm_and_we_say_the_same(target: str, config: str, tmp_path: Path) -> None:
    _, folder = made(tmp_path, CONFIGS[config], target)
    prompt = [int(token) for token in np.random.RandomState(3).randint(0, 250, 20)]
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)  # in which we compute on a processor
    theirs = [int(token) for token, _ in generate.generate_step(mx.array(prompt), model, max_tokens=16)]
    assert greedy(folder, prompt, 16) == theirs
    assert len(set(theirs)) > 3


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    loaded = mlx_models.load(folder, context=64)
    try:
        sequence, fed, said = loaded.open(), prompt, []
        for _ in range(count):
            logits = loaded.step([Row(sequence, fed, logits="last")])[0].logits
            assert logits is not None
            said.append(int(logits[-1].argmax()))
            fed = said[-1:]
        return said
    finally:
        loaded.close()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("config", CONFIGS)
def test_folders_in_the_other_modes_of_mlx_run_too(config: str, mode: str, tmp_path: Path) -> None:
    """As mlx_lm makes them; we do not."""
    source = tiny_checkpoint.write(tmp_path / "hf", CONFIGS[config], tiny_checkpoint.weights(CONFIGS[config]))
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), quantize=True, q_mode=mode)
    quantized = open_checkpoint(tmp_path / "theirs").config.quantization
    assert isinstance(quantized, MlxQuantization) and quantized.mode == mode
    prompt = list(range(5, 25))
    model, _ = mlx_lm.load(str(tmp_path / "theirs"))
    model.set_dtype(mx.float32)
    theirs = np.array(model(mx.array([prompt]))[0, -1].astype(mx.float32))
    loaded = mlx_models.load(tmp_path / "theirs", context=64)
    try:
        ours = loaded.step([Row(loaded.open(), prompt, logits="last")])[0].logits
    finally:
        loaded.close()
    assert ours is not None and np.abs(ours[-1] - theirs).max() < 1e-4 < theirs.std()
