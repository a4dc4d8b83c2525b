import time
from array import array as numbers

import pytest

from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.ggml_types import BY_NAME, TYPES
from qwen2_local.formats.gguf import read_gguf
from tests.support.gguf_bytes import BOOL, F32, I32, STRING, U32, array, info, key, model, whole


def test_types_are_those_of_the_gguf_package():
    from gguf.constants import GGML_QUANT_SIZES

    theirs = {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}
    assert {kind.number: (kind.name, kind.block, kind.block_bytes) for kind in TYPES}.items() <= theirs.items()


def test_rows_are_whole_blocks():
    assert BY_NAME["Q4_K"].row_bytes(1024) == 4 * 144
    with pytest.raises(ValueError, match="whole blocks"):
        BY_NAME["Q4_K"].row_bytes(896)


def test_what_the_gguf_package_writes_is_read(tmp_path):
    import gguf
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(7)
    writer.add_token_list(["a", "é", "Ġthe"])
    writer.add_token_types([1, 3, 6])
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("t", values)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("u", gguf.quants.quantize(np.ones((2, 64), np.float32), q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(path)
    assert header.version == 3
    assert header.keys["qwen2.block_count"] == 7
    assert header.strings("tokenizer.ggml.tokens") == ["a", "é", "Ġthe"]
    assert header.keys["tokenizer.ggml.token_type"] == numbers("i", [1, 3, 6])
    t, u = header.tensors["t"], header.tensors["u"]
    assert (t.type.name, t.shape, t.nbytes) == ("F32", (4, 3), 48)
    assert (u.type.name, u.shape, u.nbytes) == ("Q8_0", (64, 2), 4 * 34)
    assert path.read_bytes()[t.offset : t.offset + t.nbytes] == values.tobytes()


def test_a_vocabulary_of_qwen2_s_size_is_read_fast(tmp_path):
    path = tmp_path / "model.gguf"
    tokens = array("tokenizer.ggml.tokens", STRING, [f"Ġtok{i}" for i in range(151_936)])
    merges = array("tokenizer.ggml.merges", STRING, [f"Ġt ok{i}" for i in range(151_387)])
    path.write_bytes(whole([tokens, array("tokenizer.ggml.token_type", I32, [1] * 151_936), merges], [info("t", (4,), 0, 0)], bytes(16)))
    began = time.perf_counter()
    header = read_gguf(path)
    # 0.15 s on an idle core of 2023; the margin is for busy machines.
    assert time.perf_counter() - began < 2
    assert header.strings("tokenizer.ggml.tokens")[-1] == "Ġtok151935"
    assert len(header.strings("tokenizer.ggml.merges")) == 151_387


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2moe"])
def test_a_model_s_shape(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    path.write_bytes(model(architecture).build())
    opened = open_gguf(path)
    assert opened.paths == (path,)
    assert opened.architecture == architecture
    assert (opened.layers, opened.hidden, opened.heads, opened.kv_heads, opened.head_dim) == (2, 32, 4, 2, 8)
    assert (opened.context, opened.vocabulary, opened.quantization) == (64, 5, "F32")
    assert opened.weight_bytes == 4 * opened.parameters
    assert opened.kv_values_per_token == 2 * 2 * 2 * 8


def test_a_model_with_a_tied_embedding_and_later_keys(tmp_path):
    made = model()
    del made.tensors["output.weight"]
    made.keys["type"] = key("general.type", STRING, "model")
    made.keys["file_type"] = key("general.file_type", U32, 15)
    made.keys["theta"] = key("qwen2.rope.freq_base", F32, 1e6)
    path = tmp_path / "model.gguf"
    path.write_bytes(made.build())
    assert open_gguf(path).quantization == "Q4_K_M"


def test_what_converters_write_besides_is_no_fault(tmp_path):
    made = model()
    numbers = {
        "rope.dimension_count": 8, "attention.key_length": 8, "attention.value_length": 8, "vocab_size": 5, "attention.sliding_window": 32768,
        "rope.scaling.original_context_length": 32768, "expert_count": 0, "expert_used_count": 0, "pooling_type": 3,
    }  # fmt: skip
    for name, number in numbers.items():
        made.keys[f"k {name}"] = key(f"qwen2.{name}", U32, number)
    made.keys["scaling"] = key("qwen2.rope.scaling.type", STRING, "yarn")
    made.keys["factor"] = key("qwen2.rope.scaling.factor", F32, 4.0)
    made.keys["attn"] = key("qwen2.rope.scaling.attn_factor", F32, 1.0)
    made.keys["finetuned"] = key("qwen2.rope.scaling.finetuned", BOOL, 0)
    made.keys["causal"] = key("qwen2.attention.causal", BOOL, 1)
    made.keys["layout"] = key("qwen2.tensor_data_layout", STRING, "reference")
    made.keys["imatrix"] = key("quantize.imatrix.entries_count", I32, 7)
    made.keys["tokens"] = array("tokenizer.ggml.tokens", STRING, ["a", "b", "c", "", "[PAD4]"])
    made.tensors["output.bias"] = (5,)
    path = tmp_path / "model.gguf"
    path.write_bytes(made.build())
    assert open_gguf(path).layers == 2
