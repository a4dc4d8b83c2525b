"""Our forward pass against mlx-lm's, on the same folders."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_local.formats.checkpoint import open_checkpoint
from tests.support import random_qwen2

mx = pytest.importorskip("mlx.core")
mlx = pytest.importorskip("qwen2_local.backends.mlx")
mlx_qwen2 = pytest.importorskip("qwen2_local.backends.mlx_qwen2")
mlx_kv = pytest.importorskip("qwen2_local.backends.mlx_kv")

TOKENS = [int(n) for n in np.random.RandomState(4).randint(0, 320, 70)]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# What to write, and how far the largest of 70 x 320 logits may be off; they spread by 2 to 4. On a CPU quantized matrices give equal bits;
# plain ones lie transposed here, so that sums come in another order: 1.6e-5. The room left is for devices that sum in yet another.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "float32": (random_qwen2.config(), {}, 5e-5),
    "float32 yarn": (random_qwen2.config(rope_scaling=YARN), {}, 1e-4),
    "bfloat16 untied": (random_qwen2.config(tie_word_embeddings=False), {"dtype": "bfloat16"}, 0.1),
    "float16": (random_qwen2.config(), {"dtype": "float16"}, 0.02),
    "2-bit": (random_qwen2.config(), {"bits": 2, "group": 32}, 5e-5),
    "3-bit": (random_qwen2.config(), {"bits": 3}, 5e-5),
    "4-bit": (random_qwen2.config(tie_word_embeddings=False), {"bits": 4}, 5e-5),
    "6-bit in groups of 128": (random_qwen2.config(intermediate_size=256), {"bits": 6, "group": 128}, 5e-5),
    "8-bit": (random_qwen2.config(), {"bits": 8}, 5e-5),
    "4-bit bfloat16": (random_qwen2.config(), {"bits": 4, "dtype": "bfloat16"}, 0.1),
    "4-bit with exceptions": (
        random_qwen2.config(),
        {"bits": 4, "exceptions": {"model.embed_tokens": {"bits": 8, "group_size": 32}, "model.layers.1.mlp.down_proj": False}},
        5e-5,
    ),
    "moe": (random_qwen2.moe_config(), {}, 5e-5),
    "moe 4-bit": (random_qwen2.moe_config(), {"bits": 4}, 5e-5),
    "moe 4-bit bfloat16": (random_qwen2.moe_config(), {"bits": 4, "dtype": "bfloat16"}, 0.1),
}


@pytest.mark.parametrize("name", CASES)
def test_in_the_files_own_type(tmp_path: Path, name: str) -> None:
    """As on a GPU."""
    config, how, tolerance = CASES[name]
    folder = random_qwen2.write_mlx(tmp_path, config, random_qwen2.weights(config, 5), **how)
    compare(folder, None, how.get("dtype", "float32"), tolerance)


@pytest.mark.parametrize("config", [random_qwen2.config(), random_qwen2.moe_config()], ids=["dense", "moe"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_files_in_float32(tmp_path: Path, config: dict[str, Any], bits: int | None, dtype: str) -> None:
    """As on a CPU."""
    folder = random_qwen2.write_mlx(tmp_path, config, random_qwen2.weights(config, 5), dtype=dtype, bits=bits)
    compare(folder, mx.float32, "float32", 5e-5)


def compare(folder: Path, dtype: Any, computed_in: str, tolerance: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("mlx_lm.utils")
    theirs_model, _ = utils.load_model(folder)
    if dtype is not None:
        theirs_model.set_dtype(dtype)
    theirs = np.array(theirs_model(mx.array([TOKENS]))[0].astype(mx.float32))

    model = mlx_qwen2.load_model(open_checkpoint(folder), dtype)
    assert str(model.dtype).endswith(computed_in)
    kv = [mlx_kv.LayerKv() for _ in model.layers]
    hidden = model.hidden(mx.array(TOKENS), [mlx_qwen2.Piece(kv, 0, 0, len(TOKENS))])
    ours = np.array(model.logits(hidden))
    error = float(np.abs(ours - theirs).max())
    print(f"largest error {error:.2g}, standard deviation {theirs.std():.2f}")
    assert theirs.std() > 1
    assert error <= tolerance
