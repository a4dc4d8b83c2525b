"""Models in a store that are small and whole."""

from __future__ import annotations

from qwen2_local.manifest import Format, Manifest, list_files, now
from qwen2_local.store import Store
from tests.support.gguf_bytes import model


def install(store: Store, name: str, kind: Format = "gguf") -> None:
    with store.add(name) as draft:
        (draft.folder / ("model.gguf" if kind == "gguf" else "model.safetensors")).write_bytes(model().build())
        draft.manifest = manifest(name, draft, kind)


def manifest(name, draft, kind: Format = "gguf") -> Manifest:
    return Manifest(
        name=name, source="Qwen/Qwen2-0.5B-Instruct", revision="", files=list_files(draft.folder), format=kind,
        architecture="qwen2", quantization="Q4_0", licence="apache-2.0", context=32768, created=now(),
    )  # fmt: skip
