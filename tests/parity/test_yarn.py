"""YaRN on both backends: the rotary frequencies and, past the original context, the logits that transformers gives (golden/make_yarn.py).

A sample of the cases; all of them with `QWEN2_LOCAL_ALL_POINTS=1 python -m pytest tests/parity/test_yarn.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2_converters.convert import convert
from qwen2_converters.target import Target
from qwen2_local.backends.base import Backend, Layout, LoadOptions, Row
from qwen2_local.formats.config import Yarn, parse_config
from tests.support import random_qwen2
from tests.support.random_qwen2 import Array
from tests.support.small_tokenizer import small_json
from tests.support.yarn import CASES, FACTOR, HEAD_DIMS, LAST, Case

GOLDEN = np.load(Path(__file__).parent / "golden" / "yarn.npz")
BOUNDS = {"mlx": 1e-3, "llama.cpp": 0.08}
"""Measured: MLX 4.6e-5; llama.cpp 0.013 past 512, 0.052 past 32,768 tokens (0.041 with a KV of 8 bits, so it is not that): it comes to a pair's
angle by multiplying its way from pair to pair, and float32 knows angles of 30,000 to 0.002.
"""


def about(name: str) -> Any:
    return json.loads(str(GOLDEN[f"{name}/about"]))


def error(got: Array, name: str) -> float:
    """Root mean square over a position's logits, of the worst position, in standard deviations of the logits.

    Of a mixture of experts the worst quarter is left out: where two experts are nearly as good, rounding decides between them.
    """
    want = GOLDEN[f"{name}/logits"]
    errors = np.sqrt(((got - want) ** 2).mean(axis=1))
    return float(np.quantile(errors, 0.75 if "num_experts" in CASES[name].config else 1.0) / want.std())


LONG = ("dense, past 32,768", "moe, past 32,768")
SHORT = tuple(name for name in CASES if name not in LONG)
EVERY = bool(os.environ.get("QWEN2_LOCAL_ALL_POINTS"))
# Each size of head, dense and with experts, past both contexts, on each backend, but not all of their combinations: MLX's CPU code takes long.
BY_LAYOUT = [(which, name) for which in BOUNDS for name in CASES] if EVERY else [
    ("mlx", LONG[1]), ("mlx", SHORT[1]), ("llama.cpp", LONG[0]), *(("llama.cpp", name) for name in SHORT),
]  # fmt: skip
BY_FILES = [(which, name) for which in BOUNDS for name in SHORT] if EVERY else [("mlx", SHORT[2]), *(("llama.cpp", name) for name in SHORT)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_frequencies(head_dim: int) -> None:
    kv = pytest.importorskip("qwen2_local.backends.mlx_kv")
    config = parse_config(random_qwen2.config(hidden_size=4 * head_dim), Path("config.json"))
    stretch = Yarn(FACTOR, 32768)
    np.testing.assert_allclose(1 / np.array(kv.yarn_periods(config, stretch)), GOLDEN[f"frequencies/{head_dim}"], rtol=1e-6)
    # transformers multiplies queries and keys by its factor, we their product by the square.
    assert kv.Rope(config, stretch).scale == pytest.approx(float(GOLDEN[f"factor/{head_dim}"]) ** 2 / head_dim**0.5)


def logits(backend: Backend, case: Case) -> Array:
    """Of the last positions [LAST, vocabulary]."""
    text, sequence, size = case.text(), backend.open(), backend.step_tokens
    with pytest.MonkeyPatch.context() as patch:
        if backend.info.name == "mlx" and case.config["num_hidden_layers"] == 1:
            # In one layer, no token's keys and values depend on what it attends to: a minute less of MLX's CPU code.
            patch.setattr("qwen2_local.backends.mlx_kv.PlainKv.attend", lambda self, queries, *_: queries)
        for start in range(0, len(text) - LAST, size):
            backend.step([Row(sequence, text[start : min(start + size, len(text) - LAST)])])
    result = backend.step([Row(sequence, text[-LAST:], logits="all")])[0].logits
    assert result is not None
    return result


def options(case: Case) -> LoadOptions:
    most = round(FACTOR * case.original)
    return LoadOptions("test", case.original, yarn_context=most, yarn_factor=FACTOR, yarn_original=case.original)


def source(folder: Path, case: Case, config: dict[str, Any]) -> Path:
    made = random_qwen2.write_hf(folder / "source", config, case.weights())
    (made / "tokenizer.json").write_text(json.dumps(small_json()))
    return made


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_the_golden_logits(name: str) -> None:
    assert random_qwen2.checksum(CASES[name].weights()) == about(name)["checksum"]


def load(which: str, folder: Path, case: Case, config: dict[str, Any], layout: Layout, how: LoadOptions) -> Backend:
    if which == "mlx":
        mlx = pytest.importorskip("qwen2_local.backends.mlx")
        return mlx.load(random_qwen2.write_mlx(folder / "mlx", config, case.weights()), layout=layout, options=how)
    llamacpp = pytest.importorskip("qwen2_local.backends.llamacpp")
    made = convert(source(folder, case, config), Target.parse("gguf:f32"), folder / "model.gguf")
    return llamacpp.LlamaCpp.load(made, layout=layout, options=how, threads=1)


@pytest.mark.parametrize(("which", "name"), BY_LAYOUT)
def test_switched_on_by_the_layout(which: str, name: str, tmp_path: Path) -> None:
    """And off again: the same model, without it, is as far off as transformers is without."""
    case = CASES[name]
    room = case.tokens + 8
    backend = load(which, tmp_path, case, case.config | {"max_position_embeddings": case.original}, Layout(1, room, yarn=True), options(case))
    stretched = backend.fingerprint
    off = error(logits(backend, case), name)
    print(f"{name} {which}: {off:.2g}; without YaRN {about(name)['without']:.2g}")
    assert off <= BOUNDS[which]
    assert about(name)["without"] > 2.5 * BOUNDS[which]
    if name in SHORT:
        backend.arrange(Layout(1, room))
        assert backend.fingerprint != stretched
        assert error(logits(backend, case), name) > about(name)["without"] / 2
        backend.arrange(Layout(2, room, yarn=True))
        assert backend.fingerprint == stretched
        assert error(logits(backend, case), name) <= BOUNDS[which]
    backend.close()


@pytest.mark.parametrize(("which", "name"), BY_FILES)
def test_said_by_the_models_own_files(which: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    backend = load(which, tmp_path, case, case.stretched, Layout(1, case.tokens + 8), LoadOptions("test", case.tokens + 8))
    assert error(logits(backend, case), name) <= BOUNDS[which]
    backend.close()
