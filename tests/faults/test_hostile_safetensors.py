"""Handmade faults of safetensors files, one a case, beside controls that must pass; then mutated honest headers."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.errors import BadFile
from qwen2_local.formats.safetensors import read_header, read_tensor

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}


def build(header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


GOOD = build({"__metadata__": {"format": "pt"}, "b": B, "a": A}, bytes(22))

CONTROLS = {
    "two tensors": GOOD,
    "no tensors": build({}),
    "an empty tensor": build({"a": A, "e": {"dtype": "F32", "shape": [0], "data_offsets": [16, 16]}}, bytes(16)),
    "a scalar": build({"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "spaces behind the header": build(json.dumps({"a": A}).encode() + b"   ", bytes(16)),
    "a header that begins like a pickle": build(json.dumps({"a": A}).encode().ljust(640), bytes(16)),
}

FAULTS = {
    "empty": (b"", "empty"),
    "seven bytes": (b"\x02" + bytes(6), "not a model file"),
    "no header": (struct.pack("<Q", 2), "not a model file"),
    "header past the end": (build({"a": A}, length=10_000), "truncated"),
    "header size with the top bit": (build({"a": A}, length=2**63 + 5), "truncated"),
    "header of 9 MB": (build(b"{}".ljust(9_000_000)), "larger than"),
    "header of 200 MB in a short file": (build({"a": A}, length=200_000_000), "truncated"),
    "an HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page, not a model file"),
    "an HTML page after a blank line": (b"\n <html>", "an HTML page, not a model file"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer, not a model file"),
    "a PyTorch zip": (b"PK\x03\x04" + bytes(60), "pickle"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(60), "pickle"),
    "a GGUF file": (b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file"),
    "JSON without its length": (b'{"error": "Repository not found"}', "JSON text"),
    "not UTF-8": (build(b'{"\xff":1}'), "UTF-8"),
    "half a header": (build(b'{"a": {"dtype"'), "no valid JSON"),
    "text behind the header": (build(b"{} x"), "no valid JSON"),
    "NaN": (build(b'{"a": NaN}'), "no valid JSON"),
    "duplicate tensor": (build(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}', b"x"), "twice"),
    "duplicate field": (build(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice"),
    "nested too deeply": (build(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deep"),
    "a million lists": (build(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "too many"),
    "an integer of 5000 digits": (build(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}'), "no valid JSON"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata is a list": (build({"__metadata__": []}), "__metadata__"),
    "tensor is a number": (build({"a": 1}), "no dtype"),
    "no offsets": (build({"a": {"dtype": "F32", "shape": [1]}}), "no dtype"),
    "a field too many": (build({"a": {**A, "file": "/etc/passwd"}}, bytes(16)), "no dtype"),
    "unknown dtype": (build({"a": {**A, "dtype": "F33"}}, bytes(16)), "unknown dtype"),
    "dtype is a list": (build({"a": {**A, "dtype": ["F32"]}}, bytes(16)), "unknown dtype"),
    "negative dimension": (build({"a": {**A, "shape": [-2, -2]}}, bytes(16)), "impossible shape"),
    "a float dimension": (build({"a": {**A, "shape": [2.0, 2]}}, bytes(16)), "impossible shape"),
    "a true dimension": (build({"a": {**A, "shape": [True, 4]}}, bytes(16)), "impossible shape"),
    "a hundred dimensions": (build({"a": {**A, "shape": [1] * 100}}, bytes(16)), "impossible shape"),
    "shape overflows 64 bits to 16 bytes": (build({"a": {**A, "shape": [2**62 + 1, 4]}}, bytes(16)), "needs"),
    "dimension over 63 bits": (build({"a": {**A, "shape": [2**64]}}, bytes(16)), "impossible shape"),
    "shape larger than offsets": (build({"a": {**A, "shape": [2, 3]}}, bytes(16)), "needs 24 bytes"),
    "half a byte": (build({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, b"x"), "needs 1.5 bytes"),
    "offsets turned round": (build({"a": {**A, "data_offsets": [16, 0]}}, bytes(16)), "needs"),
    "negative offset": (build({"a": {**A, "data_offsets": [-16, 0]}}, bytes(16)), "impossible data_offsets"),
    "three offsets": (build({"a": {**A, "data_offsets": [0, 8, 16]}}, bytes(16)), "impossible data_offsets"),
    "does not start at 0": (build({"a": {**A, "data_offsets": [4, 20]}}, bytes(20)), "gap of 4"),
    "overlap": (build({"a": A, "b": {**B, "data_offsets": [14, 20]}}, bytes(22)), "overlaps"),
    "the same bytes twice": (build({"a": A, "b": A}, bytes(16)), "overlaps"),
    "gap": (build({"a": A, "b": {**B, "data_offsets": [20, 26]}}, bytes(26)), "gap of 4"),
    "truncated": (GOOD[:-1], "truncated: .* bytes are expected, it has"),
    "data past the file's end": (build({"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}, b"x"), "truncated"),
    "trailing bytes": (GOOD + b"x", "1 bytes follow"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_honest_files_are_read(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTROLS[name])
    for entry in read_header(path).tensors.values():
        assert read_tensor(path, entry).shape == entry.shape


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(tmp_path, name):
    path = tmp_path / "model.safetensors"
    content, message = FAULTS[name]
    path.write_bytes(content)
    with pytest.raises(BadFile, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.what
    assert caught.value.hint


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none"):
        with pytest.raises(BadFile):
            read_header(path)


def test_values_come_back(tmp_path):
    path = tmp_path / "model.safetensors"
    a, b = np.arange(4, dtype="<f4").reshape(2, 2), np.array([0x3F80, 0, 0xC000], dtype="<u2")
    path.write_bytes(build({"a": A, "b": B}, a.tobytes() + b.tobytes()))
    header = read_header(path)
    assert header.metadata == {}
    assert (read_tensor(path, header.tensors["a"]) == a).all()
    bits = read_tensor(path, header.tensors["b"])
    assert bits.dtype == np.uint16
    assert (bits == b).all()


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    entry = read_header(path).tensors["b"]
    path.write_bytes(GOOD[:-4])
    with pytest.raises(BadFile, match="ends at byte"):
        read_tensor(path, entry)


def test_a_hostile_header_of_full_size_takes_little_memory(tmp_path):
    path = tmp_path / "model.safetensors"
    for filling in (b'"ab",', b"1000,"):
        path.write_bytes(build(b'{"a":[' + filling * (7_900_000 // len(filling)) + b"0]}"))
        tracemalloc.start()
        with pytest.raises(BadFile):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200e6


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6), cut=st.integers(0, len(GOOD)))
def test_a_mutated_file_is_read_or_refused_and_nothing_else(tmp_path, edits, cut):
    content = bytearray(GOOD)
    for position, value in edits:
        content[position] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(content[:cut] if cut % 2 else content)
    try:
        header = read_header(path)
    except BadFile:
        return
    for entry in header.tensors.values():
        assert read_tensor(path, entry).nbytes == entry.end - entry.begin
