from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_local.backends.base import Layout
from qwen2_local.backends.llamacpp import LlamaCpp
from tests.support import tiny


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return tiny.write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def llama(tiny_gguf: Path) -> Iterator[LlamaCpp]:
    backend = LlamaCpp.load(tiny_gguf, layout=Layout(3, 256), threads=1)
    yield backend
    backend.close()
