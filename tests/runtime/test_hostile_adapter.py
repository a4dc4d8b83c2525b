"""llama.cpp aborts the whole process on adapters that it does not expect: what `check_gguf_adapter` lets through, it runs or refuses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support import tiny

CHILD = """
import sys
from pathlib import Path
from qwen2_local.backends.base import Layout, LoadOptions, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import BadFile, Qwen2LocalError
from qwen2_local.formats.check_adapter import check_gguf_adapter
from qwen2_local.formats.check_gguf import open_gguf

path = Path(sys.argv[1])
model = open_gguf(path)
for adapter in sorted(Path(sys.argv[2]).iterdir()):
    print(adapter.name, end=" ", flush=True)
    try:
        check_gguf_adapter(adapter, model)
    except BadFile:
        print("refused")
        continue
    try:
        backend = LlamaCpp.load(path, layout=Layout(1, 64), options=LoadOptions("", 64, adapter), threads=1)
        backend.step([Row(backend.open(), [1, 2, 3], logits="last")])
        backend.close()
    except Qwen2LocalError:
        pass
    print("loaded")
"""


def write_adapter(path: Path, *, architecture: str = "qwen2", kind: str = "adapter", alpha: float = 16.0, **shapes: tuple[int, int]) -> bytes:
    """shapes: (columns in, columns out) of adapted matrices, `__` for dots."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    chance = np.random.default_rng(0)
    for name, (columns, rows) in (shapes or {"blk__0__attn_q": (128, 128), "blk__1__ffn_down": (256, 128)}).items():
        matrix = name.replace("__", ".")
        writer.add_tensor(f"{matrix}.weight.lora_a", chance.standard_normal((4, columns)).astype(np.float32))
        writer.add_tensor(f"{matrix}.weight.lora_b", chance.standard_normal((rows, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def write_cases(folder: Path) -> int:
    """An honest adapter, lying ones, and the honest one with bytes of its header changed."""
    honest = write_adapter(folder / "honest")
    write_adapter(folder / "of another architecture", architecture="qwen2moe")
    write_adapter(folder / "a model", kind="model")
    write_adapter(folder / "alpha is no number", alpha=float("nan"))
    write_adapter(folder / "alpha is zero", alpha=0.0)
    write_adapter(folder / "another shape", blk__0__attn_q=(128, 64))
    write_adapter(folder / "no such layer", blk__7__attn_q=(128, 128))
    write_adapter(folder / "the embedding", token_embd=(tiny.VOCABULARY, 128))
    write_adapter(folder / "the output", output=(128, tiny.VOCABULARY))
    (folder / "cut off").write_bytes(honest[:-100])
    chance = random.Random(0)
    for number in range(300):
        changed = bytearray(honest)
        for _ in range(chance.choice((1, 1, 3))):
            changed[chance.randrange(8, 700)] = chance.choice((0, 1, 2, 127, 255, chance.randrange(256)))
        (folder / f"changed {number:03}").write_bytes(changed)
    return len(list(folder.iterdir()))


def test_nothing_that_passes_the_check_aborts_the_process(tiny_gguf: Path, tmp_path: Path) -> None:
    count = write_cases(tmp_path)
    command = [sys.executable, "-c", CHILD, str(tiny_gguf), str(tmp_path)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, f"{ran.returncode} at {lines[-1]!r}: {ran.stderr[-500:]}"
    assert len(lines) == count
    assert {"honest loaded", "the output loaded", "another shape refused", "the embedding refused", "cut off refused"} <= set(lines)
    assert min(sum(line.endswith(end) for line in lines) for end in ("loaded", "refused")) > 20
