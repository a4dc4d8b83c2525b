"""With an importance matrix, too, every tensor is what llama.cpp's own quantizer writes, given the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qwen2_converters.convert import Options, convert
from qwen2_converters.target import GGUF, Target
from qwen2_local.formats.config import parse_config
from tests.support import importance, tiny_checkpoint
from tests.support.llama_quantize import quantize, tensors, write_plain

CASES = {
    "dense": tiny_checkpoint.dense(hidden_size=256, intermediate_size=512, num_hidden_layers=8),
    "dense, rows of 128 and 192": tiny_checkpoint.dense(tie_word_embeddings=False),
    "64 experts": tiny_checkpoint.moe(num_experts=64, hidden_size=256, moe_intermediate_size=32, num_hidden_layers=1),
    "8 experts": tiny_checkpoint.moe(hidden_size=256, moe_intermediate_size=256, num_hidden_layers=1),
}


def compare(tmp_path: Path, config: dict[str, Any], kinds: tuple[str, ...], **options: Any) -> None:
    weights = tiny_checkpoint.weights(config)
    layout = tiny_checkpoint.fused(weights) if "num_experts" in config else weights
    folder = tiny_checkpoint.write(tmp_path / "hf", config, layout)
    plain = write_plain(tmp_path / "plain.gguf", config, weights, "BF16")
    sums = importance.sums(parse_config(config, folder))
    path = importance.write_gguf(tmp_path / "imatrix.gguf", sums)
    for kind in kinds:
        ours = tensors(convert(folder, Target("gguf", kind), tmp_path / f"{kind}.gguf", options=Options(imatrix=path)))
        want = tensors(quantize(plain, tmp_path / f"{kind}-reference.gguf", kind, importance.means(sums)))
        assert {name: value[0] for name, value in ours.items()} == {name: value[0] for name, value in want.items()}, kind
        assert [name for name in want if ours[name] != want[name]] == [], kind


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_what_llama_cpp_makes(case: str, tmp_path: Path) -> None:
    compare(tmp_path, CASES[case], ("q4_k_m", "q2_k", "iq4_xs", "q4_0"))


def test_every_type(tmp_path: Path) -> None:
    compare(tmp_path, tiny_checkpoint.dense(hidden_size=256, num_hidden_layers=1), GGUF)


def test_it_changes_the_weights_and_the_file_says_so(tmp_path: Path) -> None:
    config = CASES["dense, rows of 128 and 192"]
    folder = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config))
    path = importance.write_gguf(tmp_path / "imatrix.gguf", importance.sums(parse_config(config, folder)))
    plain = convert(folder, Target("gguf", "q4_0"), tmp_path / "plain.gguf")
    guided = convert(folder, Target("gguf", "q4_0"), tmp_path / "guided.gguf", options=Options(imatrix=path))
    changed = [name for name, value in tensors(plain).items() if tensors(guided)[name] != value]
    assert "blk.0.attn_q.weight" in changed and "token_embd.weight" not in changed
    fields = {name: field.contents() for name, field in gguf.GGUFReader(guided).fields.items() if name.startswith("quantize")}
    assert fields == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": 14,
        "quantize.imatrix.chunks_count": 17,
    }


def test_a_padded_ffn(tmp_path: Path) -> None:
    """Rows of 640 become rows of 768, in which the k-quants have whole blocks; llama.cpp is given the matrices padded by hand."""
    config = tiny_checkpoint.dense(hidden_size=256, intermediate_size=640)
    weights = tiny_checkpoint.weights(config)
    folder = tiny_checkpoint.write(tmp_path / "hf", config, weights)
    padded = dict(weights)
    for name, value in weights.items():
        if ".mlp." in name:
            padded[name] = np.pad(value, ((0, 0), (0, 128)) if "down" in name else ((0, 128), (0, 0)))
    sums = importance.sums(parse_config(config, folder))
    path = importance.write_gguf(tmp_path / "imatrix.gguf", sums)
    means = importance.means(sums)
    means |= {name: np.pad(value, ((0, 0), (0, 128))) for name, value in means.items() if "ffn_down" in name}
    plain = write_plain(tmp_path / "plain.gguf", config | {"intermediate_size": 768}, padded, "BF16")
    for imatrix, given in ((None, None), (path, means)):
        for kind in ("q4_k_m", "q2_k", "q6_k", "iq4_xs", "q4_0"):
            options = Options(imatrix=imatrix, pad_ffn=True)
            ours = convert(folder, Target("gguf", kind), tmp_path / f"{kind}-{imatrix is None}.gguf", options=options)
            want = quantize(plain, tmp_path / f"{kind}-{imatrix is None}-reference.gguf", kind, given)
            assert tensors(ours) == tensors(want), kind
            assert gguf.GGUFReader(ours).get_field("qwen2.feed_forward_length").contents() == 768
