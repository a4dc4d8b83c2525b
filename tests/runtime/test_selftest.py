"""The self-test's verdict: asked once, remembered, and about one build; and the numbers that it expects are true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen2_local import doctor
from qwen2_local.backends import selftest, tinygguf
from qwen2_local.backends.base import Layout, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.backends.selftest import Verdict
from qwen2_local.loading import open_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(selftest, "_this_process", {})
    return tmp_path / "home"


def never() -> Verdict:
    raise AssertionError("tested again")


def test_it_passes_here_and_is_asked_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = selftest.verdict()
    assert first.tokens_per_s > 0
    monkeypatch.setattr(selftest, "_test", never)
    assert selftest.verdict() == first
    monkeypatch.setattr(selftest, "_this_process", {})
    assert selftest.verdict() == first
    with pytest.raises(AssertionError):
        selftest.verdict(again=True)


def test_another_build_is_asked_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_test", lambda: Verdict(safe=True, fault="SIGSEGV", tokens_per_s=1.0))
    assert len(selftest.verdict().notes) == 1
    monkeypatch.setattr(selftest.llamalib, "identity", lambda: "another")
    monkeypatch.setattr(selftest, "_test", lambda: Verdict(safe=False, tokens_per_s=1.0))
    assert not selftest.verdict().safe
    assert json.loads((home / "selftest.json").read_text())["build"] == "another"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"build": 1}', "null"])
def test_a_broken_memory_is_none(home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    home.mkdir()
    (home / "selftest.json").write_text(text)
    monkeypatch.setattr(selftest, "_test", lambda: Verdict(safe=False, tokens_per_s=2.0))
    assert selftest.verdict().tokens_per_s == 2.0


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(selftest, "_test", lambda: Verdict(safe=False, tokens_per_s=2.0))
    first = selftest.verdict()
    monkeypatch.setattr(selftest, "_test", never)
    assert selftest.verdict() == first


@pytest.mark.parametrize("crashed", [False, True])
def test_safe_mode_may_be_asked_for(home: Path, monkeypatch: pytest.MonkeyPatch, crashed: bool) -> None:
    monkeypatch.setattr(selftest, "_test", lambda: Verdict(safe=crashed, fault="SIGSEGV" if crashed else "", tokens_per_s=1.0))
    made: list[bool] = []
    opened = open_model("guide", backend="llama.cpp", safe=True)
    plain = open_model("guide", backend="llama.cpp")
    assert (opened.plan.options.safe, plain.plan.options.safe) == (True, False)
    load = LlamaCpp.load
    monkeypatch.setattr(LlamaCpp, "load", lambda *given, **more: (made.append(more["safe"]), load(*given, **more))[1])
    for one in (opened, plain):
        backend = one.plan.load()
        made.append(any("fast matrix code" in note for note in backend.info.notes))
        backend.close()
    assert made == [True, True, crashed, crashed]


def test_the_expected_numbers_are_those_of_32_bit_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tinygguf.write(tmp_path / "tiny.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "exact.gguf"), "qwen2")
    for key, value in tinygguf._METADATA.items():
        if key != "general.architecture":
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
    for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    backend = LlamaCpp.load(tmp_path / "exact.gguf", layout=Layout(1, 128))
    sequence = backend.open()
    for tokens, expected in zip(selftest._STEPS, selftest._EXPECTED, strict=True):
        logits = backend.step([Row(sequence, tokens, logits="last")])[0].logits
        assert logits is not None
        np.testing.assert_allclose(logits[0, ::40], expected, atol=0.03)
    backend.close()


def test_doctor_looks_at_everything_and_breaks_on_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = {check.subject for check in doctor.collect()}
    assert {"program", "processor", "memory", "folder", "disk", "MLX", "llama.cpp", "self-test", "AMX"} <= subjects
    monkeypatch.setattr("qwen2_local.backends.available", lambda: ())
    checks = doctor.collect()
    assert [check.level for check in checks if check.subject == "llama.cpp"] == ["fail"]
    assert all(check.fix for check in checks if check.level != "ok")


@pytest.mark.parametrize(
    ("flags", "used", "level", "says"),
    [
        (set(), set(), "ok", "not on this CPU"),
        ({"amx_int8"}, set(), "warn", "not in this build"),
        ({"amx_int8"}, {"AMX_INT8"}, "ok", "in use"),
    ],
)
def test_doctor_speaks_plainly_of_amx(monkeypatch: pytest.MonkeyPatch, flags: set[str], used: set[str], level: str, says: str) -> None:
    monkeypatch.setattr("qwen2_local.cpu.features", lambda: frozenset({"avx2", *flags}))
    (check,) = (check for check in doctor._features({"AVX2", *used}, False) if check.subject == "AMX")
    assert check.level == level
    assert says in check.text
    assert bool(check.fix) == (level != "ok")
