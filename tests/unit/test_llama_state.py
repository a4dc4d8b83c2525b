"""llama.cpp's form of a sequence's KV: what is written is what is read, and any other byte around the rows is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_local.backends.llama_state import StateFormat
from qwen2_local.errors import BackendError

FORMS = st.builds(StateFormat, st.integers(1, 3), st.sampled_from([2, 34, 128]), st.sampled_from([1, 8]), st.sampled_from([1, 2, 5]))


def random_rows(form: StateFormat, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2 * form.layers, tokens * form.row), np.uint8)


@given(FORMS, st.integers(1, 9), st.integers(0, 10_000), st.data())
def test_what_is_written_is_read(form: StateFormat, tokens: int, first: int, data: st.DataObject) -> None:
    sequence = data.draw(st.integers(0, form.streams - 1 if form.streams > 1 else 1))
    cut = data.draw(st.integers(0, tokens)) * form.row
    rows = random_rows(form, tokens)
    state = form.write([rows[:, :cut], rows[:, cut:]], first, sequence)
    assert state.size == form.size(tokens)
    np.testing.assert_array_equal(form.read(state, first, tokens, sequence), rows)


@given(FORMS, st.data())
def test_every_byte_that_is_no_row_is_checked(form: StateFormat, data: st.DataObject) -> None:
    tokens = 3
    state = form.write([np.zeros((2 * form.layers, tokens * form.row), np.uint8)], 0, 1)
    around = np.flatnonzero(form.write([np.full((2 * form.layers, tokens * form.row), 255, np.uint8)], 0, 1) == state)
    assert len(around) == state.size - tokens * form.token_bytes
    state[data.draw(st.sampled_from(around.tolist()))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BackendError, match="unknown"):
        form.read(state, 0, tokens, 1)


@given(FORMS, st.permutations(range(5)))
def test_cells_may_lie_in_any_order(form: StateFormat, order: list[int]) -> None:
    rows = random_rows(form, 5)
    by_token = rows.reshape(2 * form.layers, 5, form.row)
    state = form.write([by_token[:, order].reshape(rows.shape)], 7, 1)
    start = state.tobytes().index(np.array([7, 1, 1, 8, 1, 1], np.int32).tobytes())
    state[start : start + 60].view(np.int32)[::3] = np.array(order) + 7
    np.testing.assert_array_equal(form.read(state, 7, 5, 1), rows)


@pytest.mark.parametrize("size", [-1, 1])
def test_a_state_of_another_size(size: int) -> None:
    form = StateFormat(2, 4, 1, 1)
    state = np.zeros(form.size(3) + size, np.uint8)
    with pytest.raises(BackendError, match="unknown"):
        form.read(state, 0, 3, 0)


@pytest.mark.parametrize(
    ("data", "tokens"), [(b"", 0), (b"", 1), (bytes(16), -1), (bytes(15), 1), (bytes(17), 1), (bytes(16), 2), ("x" * 16, 1), (None, 1)]
)
def test_a_chunk_of_another_size(data: bytes, tokens: int) -> None:
    with pytest.raises(BackendError, match="chunk"):
        StateFormat(2, 4, 1, 1).rows(data, tokens)
