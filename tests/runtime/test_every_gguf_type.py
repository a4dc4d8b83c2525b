"""What we convert generates: each type of GGUF, in llama-cpp-python by itself and in our own backend, the same tokens."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from qwen2_converters.convert import convert
from qwen2_converters.target import GGUF, Target
from qwen2_local import Qwen2

GUIDE = Path(__file__).parents[2] / "qwen2_local/guide"
TEXT = "The KV cache holds"
COUNT = 8


@pytest.mark.parametrize("weights", GGUF)
def test_it_generates_what_llama_cpp_itself_generates(weights: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = convert(GUIDE, Target("gguf", weights), tmp_path / f"{weights}.gguf")
    with Qwen2(str(path), backend="llama.cpp") as model:
        ours = model.complete(TEXT, max_tokens=COUNT).finish()
    theirs = llama_cpp.Llama(str(path), n_ctx=256, flash_attn=True, verbose=False)
    try:
        prompt = theirs.tokenize(TEXT.encode(), add_bos=False)
        assert list(ours.tokens) == list(islice(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), COUNT))
    finally:
        theirs.close()
