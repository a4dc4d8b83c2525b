"""Handmade faults of GGUF files, one a case, beside controls that must pass; the shapes of the known attacks; mutated honest files."""

import itertools
import os
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.errors import BadFile, UnsupportedModel
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.gguf import MAX_HEADER, read_gguf
from tests.support.gguf_bytes import ARRAY, BOOL, F32, F64, I8, I32, STRING, U16, U32, U64, array, info, key, model, string, whole

ARCH = key("general.architecture", STRING, "qwen2")
GOOD = whole([ARCH, array("a", I32, [1, 2])], [info("t", (4, 2), 0, 0), info("u", (32,), 8, 32)], bytes(66))

CONTROLS = {
    "two tensors": GOOD,
    "version 2": GOOD.replace(struct.pack("<I", 3), struct.pack("<I", 2), 1),
    "no tensors": whole([ARCH], []),
    "nothing at all": whole([], []),
    "alignment of 64": whole([key("general.alignment", U32, 64)], [info("t", (4,), 0, 0)], bytes(64)),
    "every type of value": whole([key(f"k{kind}", kind, 1) for kind in (*range(8), 10, 11, 12)] + [key("s", STRING, "é")], []),
    "every type of array": whole([array(f"k{kind}", kind, [1, 0]) for kind in (*range(8), 10, 11, 12)] + [array("s", STRING, ["", "b"])], []),
    "an empty array": whole([array("a", STRING, []), array("b", F64, [])], []),
    "bytes behind the tensors": GOOD + bytes(30),
}

FAULTS = {
    "empty": (b"", "empty"),
    "the magic alone": (b"GGUF", "truncated"),
    "an HTML page": (b"<html>404</html>", "an HTML page, not a model file"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "a pickle": (b"\x80\x04\x95", "pickle"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0) + bytes(32), "version is 1"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version is 4"),
    "version 0": (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version is 0"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2**64-1 tensors": (whole([], [], tensor_count=2**64 - 1), "claims 18446744073709551615 tensors"),
    "2**63 keys": (whole([], [], key_count=2**63), "claims 9223372036854775808 keys"),
    "more keys than there are": (whole([ARCH], [], key_count=2), "truncated|empty"),
    "more tensors than there are": (whole([ARCH], [info("t", (4,), 0, 0)], bytes(16), tensor_count=3), "truncated|empty"),
    "an empty key": (whole([key("", U32, 1)], []), "empty"),
    # C strings end at a zero: llama.cpp would take this for the key itself.
    "a key with a zero": (whole([key("qwen2.block_count\0x", U32, 1)], []), "holds a zero"),
    "a token with a zero": (whole([array("tokenizer.ggml.tokens", STRING, ["zz\0a", "zz\0b"])], []), "text with a zero"),
    "a key of 70000": (whole([key("k" * 70_000, U32, 1)], []), "longer than 65535"),
    "a key twice": (whole([ARCH, ARCH], []), "'general.architecture' appears twice"),
    "a key that is no text": (whole([string(b"\xff\xfe") + struct.pack("<II", U32, 1)], []), "not UTF-8"),
    "a value that is no text": (whole([string("k") + struct.pack("<I", STRING) + string(b"\xff")], []), "not UTF-8"),
    "a token that is no text": (whole([array("k", STRING, ["a", b"\xc3"])], []), "not UTF-8"),
    "a value of type 13": (whole([string("k") + struct.pack("<II", 13, 1)], []), "unknown type 13"),
    "an array of type 99": (whole([string("k") + struct.pack("<IIQ", ARRAY, 99, 1)], []), "unknown type 99"),
    "an array of arrays": (whole([string("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(64)], []), "array of arrays"),
    "a bool of 2": (whole([string("k") + struct.pack("<IB", BOOL, 2)], []), "neither true nor false"),
    "an array of bools of 2": (whole([string("k") + struct.pack("<IIQB", ARRAY, BOOL, 1, 2)], []), "neither true nor false"),
    "alignment 0": (whole([key("general.alignment", U32, 0)], []), "power of two"),
    "alignment 24": (whole([key("general.alignment", U32, 24)], []), "power of two"),
    "alignment 2**31": (whole([key("general.alignment", U32, 2**31)], []), "power of two"),
    # ggml aborts the process on tensors that lie closer than 32 bytes.
    "alignment 16": (whole([key("general.alignment", U32, 16)], []), "power of two"),
    "alignment of another type": (whole([key("general.alignment", U64, 32)], []), "uint32"),
    "alignment is text": (whole([key("general.alignment", STRING, "32")], []), "uint32"),
    "a tensor without a name": (whole([], [info("", (4,), 0, 0)], bytes(16)), "empty"),
    "a name of 64 bytes": (whole([], [info("n" * 64, (4,), 0, 0)], bytes(16)), "longer than 63"),
    "a name with a zero": (whole([], [info("a\0b", (4,), 0, 0)], bytes(16)), "holds a zero"),
    "a tensor twice": (whole([], [info("t", (8,), 0, 0), info("t", (8,), 0, 32)], bytes(64)), "appears twice"),
    "no dimensions": (whole([], [info("t", (), 0, 0)], bytes(16)), "0 dimensions"),
    "five dimensions": (whole([], [info("t", (1,) * 5, 0, 0)], bytes(16)), "5 dimensions"),
    "2**32-1 dimensions": (whole([], [string("t") + struct.pack("<I", 2**32 - 1)], bytes(64)), "dimensions"),
    "a dimension of 0": (whole([], [info("t", (4, 0), 0, 0)], bytes(16)), "impossible shape"),
    "a negative dimension": (whole([], [info("t", (2**64 - 4,), 0, 0)], bytes(16)), "impossible shape"),
    "an unknown type": (whole([], [info("t", (4,), 4, 0)], bytes(16)), "unknown type 4"),
    "a type of 2**32-1": (whole([], [info("t", (4,), 2**32 - 1, 0)], bytes(16)), "unknown type"),
    "half a block": (whole([], [info("t", (48,), 8, 0)], bytes(64)), "no whole blocks of Q8_0"),
    "not aligned": (whole([], [info("t", (4,), 0, 4)], bytes(64)), "not aligned"),
    "does not start at 0": (whole([], [info("t", (4,), 0, 32)], bytes(64)), "before it ends at 0"),
    "overlap": (whole([], [info("t", (16,), 0, 0), info("u", (4,), 0, 32)], bytes(96)), "before it ends at 64"),
    "gap": (whole([], [info("t", (4,), 0, 0), info("u", (4,), 0, 64)], bytes(96)), "before it ends at 32"),
    "turned round": (whole([], [info("t", (4,), 0, 32), info("u", (4,), 0, 0)], bytes(64)), "before it ends at 0"),
    "truncated": (GOOD[:-1], "truncated: .* bytes are expected, it has"),
    "header truncated": (GOOD[:60], "header lies"),
}

KNOWN_ATTACKS = {
    # CVE-2025-49847 and its kin: a length that goes negative, or wraps, in a later cast.
    "a key's length of 2**64-1": (whole([struct.pack("<Q", 2**64 - 1) + bytes(64)], []), "header lies"),
    "a value's length of 2**63": (whole([string("k") + struct.pack("<IQ", STRING, 2**63) + bytes(64)], []), "header lies"),
    "a token's length of 2**31": (whole([string("k") + struct.pack("<IIQQ", ARRAY, STRING, 1, 2**31) + bytes(64)], []), "header lies"),
    # CVE-2025-53630, CVE-2026-27940, CVE-2026-33298: products and sums that wrap, so that a small buffer is made for a large tensor.
    "a product of 2**64": (whole([], [info("t", (2**32, 2**32), 0, 0)], bytes(64)), "impossible shape"),
    "a product of 2**64+32": (whole([], [info("t", (32, 2**59 + 1), 0, 0)], bytes(64)), "impossible shape"),
    "bytes of 2**64": (whole([], [info("t", (2**61, 2), 0, 0)], bytes(64)), "truncated"),
    "a sum of sizes of 2**64": (whole([], [info(n, (2**61 - 8,), 0, i * (2**63 - 32)) for i, n in enumerate("tuv")], bytes(64)), "truncated"),
    "padding that wraps": (whole([], [info("t", (4,), 0, 2**64 - 32)], bytes(64)), "before it ends at 0"),
    "an array of 2**61 doubles": (whole([string("k") + struct.pack("<IIQ", ARRAY, F64, 2**61) + bytes(64)], []), "header lies"),
    "an array of 2**62 strings": (whole([string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**62) + bytes(64)], []), "more than"),
    # CVE-2026-7482 (Ollama): offsets past the file's end.
    "offset past the end": (whole([], [info("t", (4,), 0, 2**40)], bytes(64)), "before it ends at 0"),
    "a tensor past the end": (whole([], [info("t", (2**30,), 0, 0)], bytes(64)), "truncated"),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_honest_files_are_read(tmp_path, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTROLS[name])
    header = read_gguf(path)
    for tensor in header.tensors.values():
        assert header.data_offset <= tensor.offset < tensor.offset + tensor.nbytes <= len(CONTROLS[name])


@pytest.mark.parametrize("name", [*FAULTS, *KNOWN_ATTACKS])
def test_faults_are_named(tmp_path, name):
    path = tmp_path / "model.gguf"
    content, message = (FAULTS | KNOWN_ATTACKS)[name]
    path.write_bytes(content)
    with pytest.raises(BadFile, match=message) as caught:
        read_gguf(path)
    assert str(path) in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(("number", "name", "instead"), [(31, "Q4_0_4_4", "Q4_0"), (33, "Q4_0_8_8", "Q4_0"), (36, "IQ4_NL_4_4", "IQ4_NL")])
def test_retired_types_are_no_damage(tmp_path, number, name, instead):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole([], [info("t", (32,), number, 0)], bytes(64)))
    with pytest.raises(UnsupportedModel, match=f"'t' is {name}, which llama.cpp has dropped") as caught:
        read_gguf(path)
    assert caught.value.hint == f"Take the {instead} file instead."


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none"):
        with pytest.raises(BadFile):
            read_gguf(path)


BOMBS = {
    "short strings": (STRING, struct.pack("<Q", 2) + b"ab"),
    "empty strings": (STRING, struct.pack("<Q", 0)),
    "wide strings": (STRING, struct.pack("<Q", 5004) + b"a" * 5000 + "😀".encode()),
    "bytes": (I8, b"\1"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_header_of_full_size_takes_little_memory(tmp_path, name):
    """Of a quarter of it, with a quarter of the memory; QWEN2_LOCAL_ALL_POINTS=1 takes the whole one: counting memory makes it slow."""
    kind, one = BOMBS[name]
    path = tmp_path / "model.gguf"
    part = 1 if os.environ.get("QWEN2_LOCAL_ALL_POINTS") else 4
    count = min((MAX_HEADER - 100) // len(one), 1_000_000 if kind == STRING else MAX_HEADER) // part
    path.write_bytes(whole([string("k") + struct.pack("<IIQ", ARRAY, kind, count) + one * count], []))
    tracemalloc.start()
    read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6 / part


def test_a_header_without_end_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(whole([array("k", STRING, [b"a" * 1_000_000] * 17)], []))
    with pytest.raises(BadFile, match="larger than"):
        read_gguf(path)


def without(changed, *names):
    for name in names:
        del changed.keys[name]


def keyed(name, made):
    return lambda m: m.keys.__setitem__(name, made)


def shaped(name, shape):
    return lambda m: m.tensors.__setitem__(name, shape)


LIES = {
    "no architecture": (lambda m: without(m, "general.architecture"), "architecture 'None'"),
    "llama": (keyed("general.architecture", key("general.architecture", STRING, "llama")), "architecture 'llama'"),
    "the architecture is a number": (keyed("general.architecture", key("general.architecture", U32, 1)), "general.architecture is no string"),
    "a LoRA adapter": (keyed("t", key("general.type", STRING, "adapter")), "type 'adapter'"),
    "another tokenizer": (keyed("model", key("tokenizer.ggml.model", STRING, "llama")), "tokenizer 'llama'"),
    "tokens are numbers": (keyed("tokens", array("tokenizer.ggml.tokens", I32, [1] * 5)), "no list of strings"),
    "no tokens": (keyed("tokens", array("tokenizer.ggml.tokens", STRING, [])), "no tokens"),
    "no merges": (lambda m: without(m, "merges"), "no merges"),
    # llama.cpp reads these as they are, whatever their type and length.
    "token types of one byte": (keyed("types", array("tokenizer.ggml.token_type", I8, [1] * 5)), "token_type"),
    "too few token types": (keyed("types", array("tokenizer.ggml.token_type", I32, [1] * 4)), "token_type"),
    "token types are text": (keyed("types", key("tokenizer.ggml.token_type", STRING, "x")), "token_type"),
    "scores of 8 bytes": (keyed("scores", array("tokenizer.ggml.scores", F64, [1] * 5)), "scores"),
    "eos past the vocabulary": (keyed("eos", key("tokenizer.ggml.eos_token_id", U32, 5)), "eos_token_id is 5"),
    # On these llama.cpp aborts the process.
    "a token twice": (keyed("tokens", array("tokenizer.ggml.tokens", STRING, list("abcda"))), "holds a token twice"),
    "an empty token's other name": (keyed("tokens", array("tokenizer.ggml.tokens", STRING, ["a", "", "[EMPTY_1]", "b", "c"])), "a token twice"),
    "513 layers": (keyed("block_count", key("qwen2.block_count", U32, 513)), "block_count is 513"),
    "an unknown rope scaling": (keyed("k", key("qwen2.rope.scaling.type", STRING, "bogus")), "rope scaling 'bogus'"),
    "rope scaling is a number": (keyed("k", key("qwen2.rope.scaling.type", U32, 1)), "rope.scaling.type is no string"),
    "experts in a dense model": (keyed("k", key("qwen2.expert_count", U32, 5000)), "expert_count of 5000"),
    "used experts in a dense model": (keyed("k", key("qwen2.expert_used_count", U32, 2)), "expert_used_count of 2"),
    "used experts, a number a layer": (keyed("k", array("qwen2.expert_used_count", U32, [2, 2])), "expert_used_count of a list"),
    "groups of experts": (keyed("k", key("qwen2.expert_group_count", U32, 2)), "expert_group_count of 2"),
    "more predicting layers than layers": (keyed("k", key("qwen2.nextn_predict_layers", U32, 99)), "nextn_predict_layers of 99"),
    "another size behind the last layer": (keyed("k", key("qwen2.embedding_length_out", U32, 7)), "embedding_length_out of 7"),
    "sees the future": (keyed("k", key("qwen2.attention.causal", BOOL, 0)), "attention.causal of False"),
    "stretched by NaN": (keyed("k", key("qwen2.rope.scaling.factor", F32, float("nan"))), "scaling.factor is nan"),
    "stretched from a negative length": (keyed("k", key("qwen2.rope.scaling.original_context_length", I32, -1)), "context_length is -1"),
    "no layers": (keyed("block_count", key("qwen2.block_count", U32, 0)), "block_count is 0"),
    "four billion layers": (keyed("block_count", key("qwen2.block_count", U32, 2**32 - 1)), "block_count"),
    "a layer more": (keyed("block_count", key("qwen2.block_count", U32, 3)), "'blk.2.attn_norm.weight' is missing"),
    "a layer less": (keyed("block_count", key("qwen2.block_count", U32, 1)), "'blk.1.attn_k.bias' does not belong"),
    "layers is a list": (keyed("block_count", array("qwen2.block_count", U32, [2])), "block_count is a list"),
    "no heads": (keyed("attention.head_count", key("qwen2.attention.head_count", U32, 0)), "head_count is 0"),
    "three heads": (keyed("attention.head_count", key("qwen2.attention.head_count", U32, 3)), "do not divide"),
    "three KV heads": (keyed("attention.head_count_kv", key("qwen2.attention.head_count_kv", U32, 3)), "do not divide"),
    "heads of another size": (keyed("k", key("qwen2.attention.key_length", U32, 16)), "key_length"),
    "rotates half": (keyed("k", key("qwen2.rope.dimension_count", U32, 4)), "dimension_count"),
    "no epsilon": (lambda m: without(m, "eps"), "layer_norm_rms_epsilon is missing"),
    "epsilon is NaN": (keyed("eps", key("qwen2.attention.layer_norm_rms_epsilon", F32, float("nan"))), "is nan"),
    "theta is infinite": (keyed("theta", key("qwen2.rope.freq_base", F32, float("inf"))), "freq_base is inf"),
    "no context": (lambda m: without(m, "context_length"), "context_length is missing"),
    "vocabulary larger than the embedding": (keyed("tokens", array("tokenizer.ggml.tokens", STRING, list("abcdef"))), "token_type"),
    "embedding smaller than the vocabulary": (shaped("token_embd.weight", (32, 4)), "'token_embd.weight' has the shape"),
    "a transposed matrix": (shaped("blk.0.ffn_up.weight", (48, 32)), "'blk.0.ffn_up.weight' has the shape"),
    "a bias too long": (shaped("blk.1.attn_k.bias", (32,)), "'blk.1.attn_k.bias' has the shape"),
    "an extra tensor": (shaped("blk.0.attn_q.scale", (1,)), "'blk.0.attn_q.scale' does not belong"),
    "a bias of the head too long": (shaped("output.bias", (6,)), "'output.bias' has the shape"),
    "a missing bias": (lambda m: m.tensors.pop("blk.1.attn_v.bias"), "'blk.1.attn_v.bias' is missing"),
    "weights are integers": (lambda m: setattr(m, "kind", 26), "I32"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_about_the_model_are_named(tmp_path, name):
    change, message = LIES[name]
    lying = model()
    change(lying)
    path = tmp_path / "model.gguf"
    path.write_bytes(lying.build())
    read_gguf(path)
    with pytest.raises(BadFile, match=message):
        open_gguf(path)


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.1.attn_k.bias"])
def test_a_vector_of_half_precision_is_refused(tmp_path, name):
    # llama.cpp aborts the process in the first step.
    made = model()
    shape = made.tensors.pop(name)
    made.tensors[name] = shape
    path = tmp_path / "model.gguf"
    path.write_bytes(made.build().replace(info(name, shape, 0, 0)[:-8], info(name, shape, 1, 0)[:-8]))
    with pytest.raises(BadFile, match=f"'{name}' is F16, but vectors are F32"):
        open_gguf(path)


def test_the_unlying_models_open(tmp_path):
    for architecture in ("qwen2", "qwen2moe"):
        path = tmp_path / "model.gguf"
        path.write_bytes(model(architecture).build())
        assert open_gguf(path).layers == 2


MOE_LIES = {
    "no experts": (keyed("expert_count", key("qwen2moe.expert_count", U32, 0)), "expert_count is 0"),
    "more used than there are": (keyed("expert_used_count", key("qwen2moe.expert_used_count", U32, 5)), "expert_used_count is 5"),
    "257 experts": (keyed("expert_count", key("qwen2moe.expert_count", U32, 257)), "expert_count is 257"),
    "groups of experts": (keyed("k", key("qwen2moe.expert_group_count", U32, 2)), "expert_group_count of 2"),
    "a bias of the head": (shaped("output.bias", (5,)), "'output.bias' does not belong"),
    "an expert less": (shaped("blk.0.ffn_up_exps.weight", (32, 24, 3)), "ffn_up_exps"),
    "no head": (lambda m: m.tensors.pop("output.weight"), "'output.weight' is missing"),
}


@pytest.mark.parametrize("name", MOE_LIES)
def test_lies_about_experts_are_named(tmp_path, name):
    change, message = MOE_LIES[name]
    lying = model("qwen2moe")
    change(lying)
    path = tmp_path / "model.gguf"
    path.write_bytes(lying.build())
    with pytest.raises(BadFile, match=message):
        open_gguf(path)


def split(tmp_path, count=2):
    """A model in parts: tensors dealt out in turn."""
    paths = []
    for number in range(count):
        part = model()
        names = list(part.tensors)
        part.tensors = {name: part.tensors[name] for name in names[number::count]}
        if number:
            part.keys.clear()
        part.keys["no"] = key("split.no", U16, number)
        part.keys["count"] = key("split.count", U16, count)
        part.keys["total"] = key("split.tensors.count", I32, len(names))
        paths.append(tmp_path / f"m-{number + 1:05d}-of-{count:05d}.gguf")
        paths[-1].write_bytes(part.build())
    return paths


def test_a_split_model_opens_from_any_part(tmp_path):
    paths = split(tmp_path, 3)
    for path in paths:
        assert open_gguf(path).paths == tuple(paths)


def test_a_missing_part_is_named(tmp_path):
    paths = split(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(BadFile, match=f"lacks 1 of 3 parts: {paths[1].name}"):
        open_gguf(paths[0])


def test_parts_out_of_order_or_renamed_are_refused(tmp_path):
    paths = split(tmp_path)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(BadFile, match="it is not part 2 of 2"):
        open_gguf(paths[0])
    paths[0].rename(tmp_path / "mine.gguf")
    with pytest.raises(BadFile, match="its name does not say so"):
        open_gguf(tmp_path / "mine.gguf")


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    paths = split(tmp_path)
    part = model()
    part.keys = {"n": key("split.no", U16, 1), "c": key("split.count", U16, 2)}
    paths[1].write_bytes(part.build())
    with pytest.raises(BadFile, match="is in another part"):
        open_gguf(paths[0])


def test_lying_split_keys_are_refused(tmp_path):
    for made in (key("split.count", STRING, "2"), key("split.count", U32, 2**32 - 1), array("split.count", U16, [2])):
        lying = model()
        lying.keys["count"] = made
        path = tmp_path / "model.gguf"
        path.write_bytes(lying.build())
        with pytest.raises(BadFile, match=r"split\.count is"):
            open_gguf(path)


HEADER = model(layers=1).build()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=500)
@given(edits=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), max_size=6), cut=st.integers(0, 2 * len(HEADER)))
def test_a_mutated_file_is_read_or_refused_and_nothing_else(tmp_path, edits, cut):
    content = bytearray(HEADER)
    for position, byte in edits:
        content[position] = byte
    path = tmp_path / "model.gguf"
    path.write_bytes(content[:cut])
    try:
        opened = open_gguf(path)
    except (BadFile, UnsupportedModel):
        return
    spans = [(tensor.offset, tensor.offset + tensor.nbytes) for tensor in opened.tensors.values()]
    assert spans[0][0] == opened.header.data_offset
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= path.stat().st_size
