"""What goes over a worker's pipe: any value, cut anywhere; and nothing that is not ours."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_local.backends import Plan, Stamp
from qwen2_local.backends.base import BackendInfo, Layout, LoadOptions
from qwen2_local.errors import BackendError, DoesNotFit, InvalidSampling, Qwen2LocalError
from qwen2_local.types import Sampling
from qwen2_local.worker import frames
from qwen2_local.worker.codec import pack, unpack
from qwen2_local.worker.frames import MAX_FRAME, Decoder, FrameError, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
).filter(lambda value: "Infinity" not in str(value) and value != math.inf)


def finite(value: Any) -> bool:
    return "inf" not in repr(value)


# Frames


@given(st.lists(JSON.filter(finite), max_size=5), st.lists(st.integers(0, 400), max_size=8))
def test_values_come_out_as_they_went_in_wherever_the_bytes_are_cut(values: list[Any], cuts: list[int]) -> None:
    data = b"".join(map(encode, values))
    decoder = Decoder()
    came: list[object] = []
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in pairwise(edges):
        came.extend(decoder.feed(data[begin:end]))
    decoder.end()
    assert came == values


@given(st.binary(max_size=300))
def test_any_bytes_are_values_or_the_typed_error(data: bytes) -> None:
    decoder = Decoder()
    try:
        list(decoder.feed(data))
        decoder.end()
    except FrameError as error:
        assert isinstance(error, BackendError)
        assert error.hint


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">I", 0),
        struct.pack(">I", MAX_FRAME + 1),
        struct.pack(">I", 2**32 - 1),
        struct.pack(">I", 2) + b"{]",
        struct.pack(">I", 2) + b"\xff\xfe",
        struct.pack(">I", 3) + b"NaN",
        struct.pack(">I", 8) + b"Infinity",
        struct.pack(">I", 200_000) + b"[" * 200_000,
        struct.pack(">I", 10_000) + b"1" * 10_000,
    ],
)
def test_hostile_frames(frame: bytes) -> None:
    with pytest.raises(FrameError):
        list(Decoder().feed(frame))


def test_the_length_is_refused_before_anything_of_it_is_kept() -> None:
    decoder = Decoder()
    with pytest.raises(FrameError):
        list(decoder.feed(struct.pack(">I", MAX_FRAME + 1)))


def test_an_end_in_the_middle_of_a_frame() -> None:
    decoder = Decoder()
    assert list(decoder.feed(encode("abc")[:-1])) == []
    with pytest.raises(FrameError, match="middle"):
        decoder.end()


def test_what_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 100)
    with pytest.raises(FrameError, match="too large"):
        encode("x" * 99)


def test_the_log_probability_of_what_cannot_be() -> None:
    assert list(Decoder().feed(encode([-math.inf, 0.1]))) == [[-math.inf, 0.1]]


# Dataclasses


PLAN = Plan(
    "mlx", Path("/a b/\udc80"), Layout(2, 512, True), LoadOptions("ab", 4096, Path("/l"), "cd", 8, 131072, 4.0, 1), (Stamp(Path("/x"), 1, 2),)
)


@pytest.mark.parametrize(
    "value",
    [
        PLAN,
        BackendInfo("n", "v", "qwen2", 1, 2, 3, 4, 5, ("a note",)),
        Sampling(0.7, 0.8, 20, 1.05, 2**64 - 1, 0.1, 1.0, -1.0, 64, {3: -1.5, 7: 100.0}),
        Sampling(),
    ],
)
def test_dataclasses_come_back_equal(value: Any) -> None:
    (sent,) = Decoder().feed(encode(pack(value)))
    assert unpack(type(value), sent) == value


@settings(max_examples=300)
@given(JSON)
def test_what_does_not_fit_a_type_is_refused(value: Any) -> None:
    for kind in (Plan, Sampling, BackendInfo):
        with pytest.raises(FrameError):
            unpack(kind, value)


@given(st.integers(0, 4), JSON)
def test_a_field_of_another_type_is_refused(place: int, value: Any) -> None:
    raw = pack(PLAN)
    assert isinstance(raw, list)
    raw[place] = value
    try:
        made = unpack(Plan, raw)
    except FrameError:
        return
    assert isinstance(made.backend, str) and isinstance(made.path, Path) and isinstance(made.layout.context, int) and isinstance(made.files, tuple)


def test_the_dataclasses_own_checks_count() -> None:
    raw = pack(Sampling())
    assert isinstance(raw, list)
    raw[0] = -1.0
    with pytest.raises(InvalidSampling):
        unpack(Sampling, raw)


def test_what_is_no_plain_data_is_not_sent() -> None:
    with pytest.raises(TypeError):
        pack(object())


# Errors


def test_errors_keep_their_class_and_words() -> None:
    from qwen2_local.worker.messages import Failed, answer
    from qwen2_local.worker.messages import encode as message

    for error in (DoesNotFit("Too large.", hint="Less."), InvalidSampling("No."), FrameError("x")):
        (sent,) = Decoder().feed(message(Failed.of(7, error)))
        came = answer(sent)
        assert isinstance(came, Failed)
        back = came.error()
        assert isinstance(back, type(error) if type(error) is not FrameError else BackendError)
        assert (back.what, back.hint) == (error.what, error.hint)


@pytest.mark.parametrize("kind", ["Exception", "annotations", "SystemExit", "__builtins__", ""])
def test_no_other_class_is_made_of_a_name(kind: str) -> None:
    from qwen2_local.worker.messages import Failed

    assert type(Failed(1, kind, "w", "h").error()) is BackendError
    assert isinstance(Failed.of(1, KeyError("x")).error(), Qwen2LocalError)


@given(JSON.filter(lambda value: not (isinstance(value, list) and len(value) == 1)))
def test_what_is_no_message_is_refused(value: Any) -> None:
    from qwen2_local.worker import messages

    for side in (messages.order, messages.answer):
        with pytest.raises(FrameError):
            side(value)
        with pytest.raises(FrameError):
            side(["Cancel" if side is messages.order else "Ended", value])
