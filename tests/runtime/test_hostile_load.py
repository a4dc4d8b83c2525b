"""llama.cpp aborts the whole process on values it does not expect: what `open_gguf` lets through, it loads or refuses."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.support.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, array, key, model, string

CHILD = """
import sys
from pathlib import Path
from qwen2_local.backends.base import Layout, Row
from qwen2_local.backends.llamacpp import LlamaCpp
from qwen2_local.errors import BadFile, Qwen2LocalError
from qwen2_local.formats.check_gguf import open_gguf

for path in sorted(Path(sys.argv[1]).iterdir()):
    print(path.name, end=" ", flush=True)
    try:
        open_gguf(path)
    except BadFile:
        print("refused")
        continue
    try:
        backend = LlamaCpp.load(path, layout=Layout(1, 64), threads=1)
        backend.step([Row(backend.open(), [1, 2, 3], logits="last")])
        backend.close()
    except Qwen2LocalError:
        pass
    print("loaded")
"""

NAMES = (
    "general.alignment", "general.architecture", "general.file_type", "split.count", "split.no",
    *(f"tokenizer.ggml.{name}" for name in ("pre", "add_bos_token", "bos_token_id", "eot_token_id", "token_type_count", "scores")),
    *(f"ARCH.{name}" for name in (
        "block_count", "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "expert_feed_forward_length",
        "nextn_predict_layers", "embedding_length_out", "pooling_type", "attention.causal", "attention.head_count_kv", "attention.key_length",
        "attention.key_length_swa", "attention.sliding_window", "rope.dimension_count", "rope.dimension_count_swa", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.freq_base", "vocab_size",
    )),
)  # fmt: skip
VALUES = ((U32, 0), (U32, 3), (U32, 600), (U32, 2**32 - 1), (F32, float("nan")), (BOOL, 0), (STRING, "bogus"), (ARRAY, [7, 7]))


def write_cases(folder: Path) -> int:
    """Two honest models; each key with each value; honest models with bytes of the header changed."""
    chance = random.Random(0)
    cases = {}
    for architecture in ("qwen2", "qwen2moe"):
        cases[f"honest {architecture}"] = honest = model(architecture, layers=1).build()
        for name in (name.replace("ARCH", architecture) for name in NAMES):
            for number, (kind, value) in enumerate(VALUES):
                lying = model(architecture, layers=1)
                # The key may be there already, and a second one is refused by itself.
                lying.keys = {own: raw for own, raw in lying.keys.items() if not raw.startswith(string(name))}
                lying.keys["lie"] = array(name, I32, value) if isinstance(value, list) else key(name, kind, value)
                cases[f"{name} {number}"] = lying.build()
        for number in range(150):
            changed = bytearray(honest)
            for _ in range(chance.choice((1, 1, 3))):
                changed[chance.randrange(24, 2000)] = chance.choice((0, 1, 2, 127, 255, chance.randrange(256)))
            cases[f"{architecture} changed {number:03}"] = bytes(changed)
    for name, content in cases.items():
        (folder / name).write_bytes(content)
    return len(cases)


def test_nothing_that_passes_the_check_aborts_the_process(tmp_path: Path) -> None:
    count = write_cases(tmp_path)
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    ran = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, f"{ran.returncode} at {lines[-1]!r}: {ran.stderr[-500:]}"
    assert len(lines) == count
    assert {"honest qwen2 loaded", "honest qwen2moe loaded"} <= set(lines)
    assert min(sum(line.endswith(end) for line in lines) for end in ("loaded", "refused")) > count // 5
