"""What loading decides reaches the backends: contexts that grow, YaRN, an adapter, 8-bit KV; in this process and in a worker alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2_local import Qwen2, backends, kvcache, loading, paths
from qwen2_local.backends.base import Layout
from qwen2_local.errors import ContextOverflow
from tests.support import lora, tiny_checkpoint

BACKENDS = backends.available()
CONFIG = tiny_checkpoint.dense(torch_dtype="float32", max_position_embeddings=256)
WEIGHTS = tiny_checkpoint.weights(CONFIG, "F32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint.write(tmp_path_factory.mktemp("base") / "base", CONFIG, WEIGHTS, dtype="F32"))


@pytest.fixture(params=[(backend, worker) for backend in BACKENDS for worker in (False, True)], ids=lambda case: f"{case[0]}-{case[1]}")
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    backend, worker = request.param
    return {"backend": backend, "worker": worker}


def reply(model: Qwen2, words: int) -> tuple[int, ...]:
    return model.complete("a b c " * words, max_tokens=5, temperature=0.0).finish().tokens


def layout(model: Qwen2) -> Layout:
    engine: Any = model._engine
    assert isinstance(engine.layout, Layout)
    return engine.layout


def test_the_context_grows_when_it_is_needed(base: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "DEFAULT_CONTEXT", 64)
    with Qwen2(base, **where, context=256, kv_cache=False) as model:
        long, short = reply(model, 30), reply(model, 5)
    with Qwen2(base, **where, kv_cache=False) as model:
        assert layout(model) == Layout(1, 64)
        assert reply(model, 5) == short
        assert reply(model, 30) == long
        assert 184 < layout(model).context <= 256
        with pytest.raises(ContextOverflow, match="256"):
            reply(model, 50)


def test_yarn_is_on_for_long_requests_alone(base: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "yarn_context_of", lambda *shape, **kind: 1024)
    with Qwen2(base, **where) as model:
        assert (model.info.context, model.info.yarn_context) == (256, 1024)
        before = reply(model, 10)
        assert not layout(model).yarn
        reply(model, 100)
        assert layout(model).yarn
        assert reply(model, 10) == before
        assert not layout(model).yarn
        with pytest.raises(ContextOverflow, match=r"2,400 tokens, but the context holds 1,024"):
            reply(model, 400)


def test_an_adapter_changes_what_it_says_and_no_cache_mixes_the_two(base: str, where: dict[str, Any], tmp_path: Path) -> None:
    settings = lora.settings()
    adapter = lora.write(tmp_path / "Poet", settings, lora.tensors(WEIGHTS, settings))
    said = []
    for put_on in (None, adapter, None, adapter):
        with Qwen2(base, **where, adapter=put_on) as model:
            said.append(reply(model, 12))
    assert said[0] == said[2] != said[1] == said[3]


def test_kv_of_8_bits_is_known_apart(base: str, where: dict[str, Any]) -> None:
    kvcache.Disk(paths.kv(), None).clear()
    with Qwen2(base, **where) as model:
        plain, bytes_plain = reply(model, 12), model.info.kv_bytes_per_token
    for cached in (0, 71):
        with Qwen2(base, **where, kv_bits=8) as model:
            assert model.complete("a b c " * 12, max_tokens=5, temperature=0.0).finish().usage.cached_tokens == cached
            assert model.info.kv_bytes_per_token <= bytes_plain
    with Qwen2(base, **where) as model:
        assert reply(model, 12) == plain
