"""The type of every tensor, at the real sizes, is the one that llama.cpp's own quantizer announces: no weights are needed for that.

Its dry run reads a file's header and prints what it would do; the weights behind the header are a hole in the file.
"""

from __future__ import annotations

import ctypes
import logging
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_converters.mix import FILE_TYPES
from qwen2_converters.plan import make_plan
from qwen2_converters.target import GGUF, Target
from qwen2_local.backends import llamalib
from qwen2_local.formats.checkpoint import Checkpoint
from qwen2_local.formats.config import Moe, Qwen2Config

_LOGGED = re.compile(r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+), size = .*?(?:\((\w+)\))?")


def checkpoint(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool, moe: Moe | None = None
) -> Checkpoint:
    """A header without weights."""
    config = Qwen2Config(
        model_type="qwen2_moe" if moe else "qwen2", vocabulary=vocabulary, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
        intermediate=intermediate, context=32768, rms_eps=1e-6, rope_theta=1e6, tied=tied, dtype="bfloat16", moe=moe,
    )  # fmt: skip
    return Checkpoint(Path("nowhere"), "hf", config, {}, {}, ())


SIZES = {
    "0.5b": checkpoint(896, 24, 14, 2, 4864, 151936, True),
    "1.5b": checkpoint(1536, 28, 12, 2, 8960, 151936, True),
    "7b": checkpoint(3584, 28, 28, 4, 18944, 152064, False),
    "57b": checkpoint(3584, 28, 28, 4, 18944, 151936, False, Moe(64, 8, 2560, 20480, False)),
    "72b": checkpoint(8192, 80, 64, 8, 29568, 152064, False),
}


def ours(source: Checkpoint, weights: str, **options: bool) -> dict[str, str]:
    return {tensor.parts[0].name: tensor.parts[0].type for tensor in make_plan(source, Target("gguf", weights), **options).tensors}


def hollow(path: Path, source: Checkpoint, **options: bool) -> Path:
    """A file as llama.cpp's script makes it, matrices in BF16, the rest in F32; with no weights behind its header."""
    plan = make_plan(source, Target("gguf", "bf16"), **options)
    config = plan.config
    writer = gguf.GGUFWriter(str(path), "qwen2moe" if config.moe else "qwen2")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    if config.moe:
        writer.add_expert_count(config.moe.experts)
        writer.add_expert_used_count(config.moe.experts_per_token)
    for tensor in plan.tensors:
        part = tensor.parts[0]
        kind = gguf.GGMLQuantizationType[part.type]
        writer.add_tensor_info(part.name, part.shape, np.dtype("float32"), part.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + plan.nbytes + 32 * len(plan.tensors))
    return path


class DryRun(logging.Handler):
    """llama.cpp's quantizer, asked what it would do."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        match = _LOGGED.fullmatch(record.getMessage())
        if match:
            self.types[match[1]] = (match[3] or match[2]).upper()

    def of(self, path: Path, weights: str, *, imatrix: bool = False) -> dict[str, str]:
        lib = llamalib.library()
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype = FILE_TYPES[weights]
        parameters.dry_run = True
        number = ctypes.c_float(1.0)
        entries = (lib.llama_model_imatrix_data * 2)((b"one", ctypes.pointer(number), 1), (None, None, 0))
        if imatrix:
            parameters.imatrix = entries
        self.types = {}
        log = logging.getLogger("qwen2_local.llama.cpp")
        level = log.level
        log.addHandler(self)
        log.setLevel(logging.DEBUG)
        try:
            assert lib.llama_model_quantize(str(path).encode(), b"never-written", ctypes.byref(parameters)) == 0
        finally:
            log.removeHandler(self)
            log.setLevel(level)
        return self.types


@pytest.mark.parametrize("size", SIZES)
def test_every_type_at_every_size(size: str, tmp_path: Path) -> None:
    path = hollow(tmp_path / "hollow.gguf", SIZES[size])
    for weights in GGUF:
        assert ours(SIZES[size], weights) == DryRun().of(path, weights), weights


@pytest.mark.parametrize("size", SIZES)
def test_every_type_at_every_size_with_an_importance_matrix(size: str, tmp_path: Path) -> None:
    path = hollow(tmp_path / "hollow.gguf", SIZES[size])
    for weights in GGUF:
        assert ours(SIZES[size], weights, imatrix=True) == DryRun().of(path, weights, imatrix=True), weights


@pytest.mark.parametrize("layers", [1, 7, 15, 16, 30, 39])
def test_every_type_at_other_depths(layers: int, tmp_path: Path) -> None:
    source = checkpoint(256, layers, 4, 2, 256, 64, True)
    path = hollow(tmp_path / "hollow.gguf", source)
    for weights in GGUF:
        assert ours(source, weights) == DryRun().of(path, weights), weights


def test_a_padded_72b(tmp_path: Path) -> None:
    path = hollow(tmp_path / "hollow.gguf", SIZES["72b"], pad_ffn=True)
    for weights in ("q2_k", "q4_k_m", "q6_k", "iq4_xs"):
        assert ours(SIZES["72b"], weights, pad_ffn=True) == DryRun().of(path, weights), weights


@st.composite
def shapes(draw: st.DrawFn) -> Checkpoint:
    """Any Qwen2: where llama.cpp's rules turn on a number, that number is likely."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    heads = kv_heads * draw(st.sampled_from((1, 3, 4, 7)))
    width = st.sampled_from((1, 8, 32, 72, 160, 256, 512))
    moe = Moe(draw(st.sampled_from((1, 2, 7, 8, 9, 64))), 1, draw(width), draw(width), False)
    layers = draw(st.one_of(st.integers(1, 40), st.just(80)))
    hidden = heads * draw(st.sampled_from((2, 8, 32, 64)))
    vocabulary = draw(st.integers(2, 300))
    return checkpoint(hidden, layers, heads, kv_heads, draw(width), vocabulary, draw(st.booleans()), draw(st.sampled_from((None, moe))))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=shapes(), weights=st.sampled_from(GGUF), imatrix=st.booleans())
def test_any_shape(tmp_path: Path, source: Checkpoint, weights: str, imatrix: bool) -> None:
    path = hollow(tmp_path / "hollow.gguf", source)
    assert ours(source, weights, imatrix=imatrix) == DryRun().of(path, weights, imatrix=imatrix)
