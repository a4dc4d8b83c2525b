"""An importance matrix is read whole and of this model, or refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_converters.imatrix import read_importance
from qwen2_local.errors import BadFile
from qwen2_local.formats.config import Qwen2Config, parse_config
from tests.support import importance, tiny_checkpoint
from tests.support.importance import Sums

Write: TypeAlias = Callable[[Path, Sums], Path]
Change: TypeAlias = Callable[[Sums], object]

CONFIG = parse_config(tiny_checkpoint.dense(), Path("config.json"))
MOE = parse_config(tiny_checkpoint.moe(), Path("config.json"))
DOWN = "blk.1.ffn_down.weight"


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("write", [importance.write_gguf, importance.write_dat], ids=["gguf", "dat"])
def test_it_holds_means(config: Qwen2Config, write: Write, tmp_path: Path) -> None:
    sums = importance.sums(config)
    read = read_importance(write(tmp_path / "imatrix", sums), config)
    assert (read.chunks, read.dataset) == (17, "text.txt")
    want = importance.means(sums)
    assert read.columns.keys() == want.keys()
    for name, numbers in want.items():
        np.testing.assert_allclose(read.columns[name], numbers, rtol=0 if write is importance.write_gguf else 1e-6)


def test_of_a_matrix(tmp_path: Path) -> None:
    read = read_importance(importance.write_gguf(tmp_path / "imatrix", importance.sums(MOE)), MOE)
    name = "blk.0.ffn_up_exps.weight"
    padded = read.of("blk.0.ffn_down_shexp.weight", 0, 256)
    assert read.of(name, 3, 128) is not None and padded is not None
    np.testing.assert_array_equal(read.of(name, 3, 128), read.columns[name][3])
    np.testing.assert_array_equal(read.of(name, 7, 128), np.ones(128))  # no text reached it
    np.testing.assert_array_equal(padded[128:], np.zeros(128))
    assert read.of("token_embd.weight", 0, 128) is None


def changed(change: Change) -> Sums:
    sums = importance.sums(CONFIG)
    change(sums)
    return sums


def put(name: str, values: object, counts: object = (5,)) -> Change:
    return lambda sums: sums.update({name: (np.asarray(values, np.float32), np.asarray(counts, np.float32))})


@pytest.mark.parametrize("write", [importance.write_gguf, importance.write_dat], ids=["gguf", "dat"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (put(DOWN, np.full((1, 192), np.nan)), "not finite"),
        (put(DOWN, np.full((1, 192), np.inf)), "not finite"),
        (put(DOWN, np.full((1, 192), -1e-9)), "negative"),
        (put(DOWN, np.ones((1, 191))), "this model's has"),
        (put(DOWN, np.ones((2, 192)), (1, 2)), "this model's has"),
        (put("blk.2.ffn_down.weight", np.ones((1, 192))), "another model"),
        (put("blk.0.attn_norm.weight", np.ones((1, 128))), "another model"),
        (lambda sums: sums.clear(), "it"),
    ],
)
def test_bad_numbers_and_other_models_are_refused(write: Write, change: Change, fault: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=fault) as caught:
        read_importance(write(tmp_path / "imatrix", changed(change)), CONFIG)
    assert str(tmp_path / "imatrix") in caught.value.what and caught.value.hint


def test_counts_are_checked(tmp_path: Path) -> None:
    for count in (-1.0, np.nan):
        path = importance.write_gguf(tmp_path / "imatrix", changed(put(DOWN, np.ones((1, 192)), (count,))))
        with pytest.raises(BadFile, match="negative or not finite"):
            read_importance(path, CONFIG)


def test_half_an_entry_and_other_ggufs_are_refused(tmp_path: Path) -> None:
    path = importance.write_gguf(tmp_path / "imatrix", importance.sums(CONFIG))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.0.attn_q.weight.counts", b"blk.0.attn_q.weight.cOunts"))
    with pytest.raises(BadFile, match=r"lacks blk.0.attn_q.weight.counts"):
        read_importance(path, CONFIG)
    with pytest.raises(BadFile, match="'model'"):
        read_importance(importance.write_gguf(tmp_path / "model", importance.sums(CONFIG), kind="model"), CONFIG)
    with pytest.raises(BadFile, match="cannot be read"):
        read_importance(tmp_path / "missing", CONFIG)


@pytest.mark.parametrize(
    "raw", [b"", b"abc", b"<!DOCTYPE html>", struct.pack("<i", 0), struct.pack("<iii", 1, 1 << 30, 0), struct.pack("<ii", 1, -1)]
)
def test_what_is_neither_format_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(raw)
    with pytest.raises(BadFile, match="no importance matrix"):
        read_importance(path, CONFIG)


def test_a_matrix_twice_is_refused(tmp_path: Path) -> None:
    path = importance.write_dat(tmp_path / "imatrix.dat", {name: value for name, value in importance.sums(CONFIG).items() if name == DOWN})
    raw = path.read_bytes()
    path.write_bytes(struct.pack("<i", 2) + 2 * raw[4 : 4 + 12 + len(DOWN) + 4 * 192])
    with pytest.raises(BadFile, match="twice"):
        read_importance(path, CONFIG)


@pytest.mark.parametrize("write", [importance.write_gguf, importance.write_dat], ids=["gguf", "dat"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_bad_file_or_harmless(write: Write, data: st.DataObject, tmp_path: Path) -> None:
    config = replace(CONFIG, layers=1)
    raw = bytearray(write(tmp_path / "imatrix", importance.sums(config)).read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    else:
        at = data.draw(st.integers(0, min(len(raw), 3000) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
    (tmp_path / "imatrix").write_bytes(raw)
    try:
        read = read_importance(tmp_path / "imatrix", config)
    except BadFile:
        return
    assert all(np.isfinite(numbers).all() and (numbers >= 0).all() for numbers in read.columns.values())
