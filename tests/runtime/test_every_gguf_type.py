"""What we convert generates: each type of GGUF, in llama-cpp-python by itself and in our own backend, the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2_converters.convert import convert_all
from qwen2_converters.target import GGUF, Target
from qwen2_local import Qwen2

GUIDE = Path(__file__).parents[2] / "qwen2_local/guide"
TEXT = "The KV cache holds"
COUNT = 8
# In a process of its own: llama-cpp-python's own classes take the library's log for themselves.
THEIRS = """
import json, sys
from itertools import islice
from llama_cpp import Llama
for path in sys.argv[3:]:
    model = Llama(path, n_ctx=256, flash_attn=True, verbose=False)
    prompt = model.tokenize(sys.argv[1].encode(), add_bos=False)
    print(json.dumps(list(islice(model.generate(prompt, temp=0.0, repeat_penalty=1.0), int(sys.argv[2])))))
    model.close()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("types")
    paths = [folder / f"{weights}.gguf" for weights in GGUF]
    convert_all(GUIDE, [(Target("gguf", weights), path) for weights, path in zip(GGUF, paths, strict=True)])
    return paths


@pytest.fixture(scope="module")
def theirs(made: list[Path]) -> dict[str, list[int]]:
    done = subprocess.run([sys.executable, "-c", THEIRS, TEXT, str(COUNT), *map(str, made)], capture_output=True, text=True, timeout=240, check=True)
    return dict(zip(GGUF, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("weights", GGUF)
def test_it_generates_what_llama_cpp_itself_generates(weights: str, made: list[Path], theirs: dict[str, list[int]]) -> None:
    with Qwen2(str(made[GGUF.index(weights)]), backend="llama.cpp") as model:
        ours = model.complete(TEXT, max_tokens=COUNT).finish()
    assert list(ours.tokens) == theirs[weights]
