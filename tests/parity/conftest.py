"""What the comparisons with other implementations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def on_processor() -> Iterator[None]:
    """MLX computes on the processor meanwhile: on a GPU it rounds otherwise."""
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
