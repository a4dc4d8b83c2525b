"""Lying config.json files and checkpoints that do not keep their word: an error names the field, the file or the tensor."""

import json
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2_local.errors import BadFile
from qwen2_local.formats.checkpoint import expected_tensors, open_checkpoint
from qwen2_local.formats.config import parse_config, read_config
from tests.support.checkpoints import CONFIG, MOE_CONFIG, write_checkpoint, write_safetensors


def tensors(config=CONFIG):
    return {name: ("BF16", shape) for name, shape in expected_tensors(parse_config(config, "config.json"))}


ABSENT = object()
LIES = {
    "0 heads": ("num_attention_heads", 0),
    "negative heads": ("num_attention_heads", -4),
    "heads that do not divide": ("num_attention_heads", 3),
    "heads are true": ("num_attention_heads", True),
    "KV heads that do not divide": ("num_key_value_heads", 3),
    "0 layers": ("num_hidden_layers", 0),
    "a million layers": ("num_hidden_layers", 10**6),
    "layers are text": ("num_hidden_layers", "2"),
    "layers are a float": ("num_hidden_layers", 2.0),
    "no layers": ("num_hidden_layers", ABSENT),
    "a huge vocabulary": ("vocab_size", 2**40),
    "a vocabulary of 10**4000": ("vocab_size", 10**4000),
    "no vocabulary": ("vocab_size", None),
    "hidden is a list": ("hidden_size", [64]),
    "no hidden": ("hidden_size", ABSENT),
    "intermediate 0": ("intermediate_size", 0),
    "epsilon 0": ("rms_norm_eps", 0),
    "epsilon is text": ("rms_norm_eps", "1e-6"),
    "no epsilon": ("rms_norm_eps", ABSENT),
    "theta negative": ("rope_theta", -1),
    "theta absent": ("rope_theta", ABSENT),
    "theta of 10**400": ("rope_theta", 10**400),
    "tied is text": ("tie_word_embeddings", "false"),
    "context 0": ("max_position_embeddings", 0),
    "rope_scaling is text": ("rope_scaling", "yarn"),
    "YaRN by 0": ("rope_scaling", {"type": "yarn", "factor": 0}),
    "YaRN without factor": ("rope_scaling", {"type": "yarn"}),
    "YaRN of a list": ("rope_scaling", {"type": ["yarn"]}),
    "eos negative": ("eos_token_id", -1),
    "eos is text": ("eos_token_id", "<|im_end|>"),
    "a thousand eos": ("eos_token_id", [1] * 1000),
    "the model type is a number": ("model_type", 2),
    "no model type": ("model_type", ABSENT),
    "quantization is text": ("quantization", "4bit"),
    "quantization of 7 bits": ("quantization", {"bits": 7, "group_size": 64}),
    "quantization in groups of 63": ("quantization", {"bits": 4, "group_size": 63}),
    "GPTQ of 0 bits": ("quantization_config", {"quant_method": "gptq", "bits": 0, "group_size": 128}),
    "GPTQ without groups": ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    "GPTQ in groups of a million": ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 1 << 20}),
    "GPTQ that is text": ("quantization_config", {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": "false"}),
    "a quantization without a name": ("quantization_config", {"quant_method": ["gptq"], "bits": 4, "group_size": 128}),
    "quantization of an unknown mode": ("quantization", {"bits": 4, "group_size": 64, "mode": "exec"}),
    "an exception of 0 bits": ("quantization", {"bits": 4, "group_size": 64, "lm_head": {"bits": 0}}),
}


@pytest.mark.parametrize("name", LIES)
def test_the_field_is_named(tmp_path, name):
    field, value = LIES[name]
    config = {key: of for key, of in (CONFIG | {field: value}).items() if of is not ABSENT}
    with pytest.raises(BadFile, match=field) as caught:
        parse_config(config, tmp_path / "config.json")
    assert str(tmp_path / "config.json") in caught.value.what


MOE_LIES = {"num_experts": 0, "num_experts_per_tok": 5, "moe_intermediate_size": "x", "shared_expert_intermediate_size": None, "norm_topk_prob": 1}


@pytest.mark.parametrize("field", MOE_LIES)
def test_the_field_of_an_expert_is_named(field):
    with pytest.raises(BadFile, match=field):
        parse_config(MOE_CONFIG | {field: MOE_LIES[field]}, "config.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"<html>",
        b" " * 5_000_000,
        b'{"a": ' + b"9" * 5000,
    ],
    ids=["empty", "list", "null", "half", "nan", "twice", "utf16", "deep", "html", "5 MB", "digits"],
)
def test_what_is_no_config_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"config\.json"):
        read_config(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "bits", "mode"]), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=500)
@given(
    config=st.sampled_from([CONFIG, MOE_CONFIG]),
    changes=st.dictionaries(st.sampled_from([*MOE_CONFIG, "quantization", "rope_scaling"]), JSON, max_size=4),
)
def test_any_values_give_a_config_or_a_named_fault(config, changes):
    try:
        parsed = parse_config(config | changes, "config.json")
    except BadFile:
        return
    assert parsed.hidden == parsed.heads * parsed.head_dim


# Checkpoints


def test_the_control_opens(tmp_path):
    assert len(open_checkpoint(write_checkpoint(tmp_path, CONFIG, tensors(), shards=3)).shards) == 3


def truncated_shard(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return r"model-00002-of-00003\.safetensors is damaged: it is truncated: \d+ bytes are expected, it has \d+"


def missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return r"lacks 1 of 3 shards: model-00002-of-00003\.safetensors"


def extra_shard(folder):
    (folder / "model-00001-of-00004.safetensors").write_bytes(b"")
    return r"holds 'model-00001-of-00004\.safetensors', which does not belong"


def html_shard(folder):
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"<!doctype html>")
    return "an HTML page, not a model file"


def shard_out_of_the_folder(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")
    return "is a link out of its folder"


def config_out_of_the_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    return "is a link out of its folder"


def no_config(folder):
    (folder / "config.json").unlink()
    return r"config\.json cannot be read"


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def path_in_the_index(folder):
    edit_index(folder, lambda index: index.update({"model.norm.weight": "../outside.safetensors"}))
    return "path separator"


def absolute_path_in_the_index(folder):
    edit_index(folder, lambda index: index.update({"model.norm.weight": "/etc/passwd"}))
    return "path separator"


def pickle_in_the_index(folder):
    edit_index(folder, lambda index: index.update({"model.norm.weight": "pytorch_model.bin"}))
    return r"which is no \.safetensors file"


def number_in_the_index(folder):
    edit_index(folder, lambda index: index.update({"model.norm.weight": 1}))
    return "has no weight_map"


def tensor_that_only_the_index_knows(folder):
    edit_index(folder, lambda index: index.update({"model.more": "model-00001-of-00003.safetensors"}))
    return r"lacks the tensor 'model\.more'"


def tensor_that_the_index_places_elsewhere(folder):
    edit_index(folder, lambda index: index.update({"model.norm.weight": "model-00001-of-00003.safetensors"}))
    return r"the tensor 'model\.norm\.weight'"


def tensor_twice(folder):
    write_safetensors(folder / "model-00001-of-00003.safetensors", tensors())
    return "is both in|does not place there"


def empty_index(folder):
    edit_index(folder, lambda index: index.clear())
    return "has no weight_map"


def no_weights(folder):
    for path in folder.glob("model*"):
        path.unlink()
    return r"holds no model\.safetensors"


FOLDER_FAULTS = [
    truncated_shard, missing_shard, extra_shard, html_shard, shard_out_of_the_folder, config_out_of_the_folder, no_config, path_in_the_index,
    absolute_path_in_the_index, pickle_in_the_index, number_in_the_index, tensor_that_only_the_index_knows, tensor_that_the_index_places_elsewhere,
    tensor_twice, empty_index, no_weights,
]  # fmt: skip


@pytest.mark.parametrize("change", FOLDER_FAULTS, ids=lambda change: change.__name__)
def test_faults_of_the_folder_are_named(tmp_path, change):
    folder = write_checkpoint(tmp_path / "model", CONFIG, tensors(), shards=3)
    message = change(folder)
    with pytest.raises(BadFile, match=message):
        open_checkpoint(folder)


TENSOR_FAULTS = {
    "missing": ({"model.norm.weight": None}, r"'model\.norm\.weight' is missing"),
    "extra": ({"model.layers.2.input_layernorm.weight": ("BF16", (64,))}, r"layers\.2\.input_layernorm\.weight' does not belong"),
    "transposed": ({"model.layers.0.mlp.up_proj.weight": ("BF16", (64, 128))}, r"up_proj\.weight' has the shape \[64, 128\], .* \[128, 64\]"),
    "vocabulary": ({"model.embed_tokens.weight": ("BF16", (301, 64))}, "embed_tokens"),
    "integers": ({"model.norm.weight": ("I32", (64,))}, "is I32"),
    "a head of another shape": ({"lm_head.weight": ("BF16", (300, 32))}, "lm_head"),
    "GPTQ": ({"model.layers.0.mlp.up_proj.weight": None, "model.layers.0.mlp.up_proj.qweight": ("I32", (8, 128))}, "is quantized, but"),
    "scales without a config": ({"model.layers.0.mlp.up_proj.scales": ("BF16", (128, 1))}, "is quantized, but"),
}


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_faults_of_tensors_are_named(tmp_path, name):
    changes, message = TENSOR_FAULTS[name]
    made = {key: value for key, value in (tensors() | changes).items() if value}
    with pytest.raises(BadFile, match=message):
        open_checkpoint(write_checkpoint(tmp_path, CONFIG, made))


UP = "model.layers.0.mlp.up_proj"
PACKED = {"quant_method": "gptq", "bits": 4, "group_size": 32}
UP_PACKED = {f"{UP}.qweight": ("I32", (8, 128)), f"{UP}.qzeros": ("I32", (2, 16)), f"{UP}.scales": ("F16", (2, 128)), f"{UP}.g_idx": ("I32", (64,))}
PACKED_FAULTS = {
    "no zeros": ({}, {f"{UP}.qzeros": None}, "qzeros' is missing"),
    "8 bits": ({"bits": 8}, {}, r"qweight' has the shape \[8, 128\], config.json demands \[16, 128\]"),
    "larger groups": ({"group_size": 64}, {}, "qzeros' has the shape"),
    "groups that do not divide": ({"group_size": 96}, {}, "cannot be packed as GPTQ"),
    "AWQ": ({"quant_method": "awq"}, {}, r"demands \[64, 16\]"),
    "scales in bfloat16": ({}, {f"{UP}.scales": ("BF16", (2, 128))}, "is BF16"),
    "reordered, and not told how": ({"desc_act": True}, {f"{UP}.g_idx": None}, "g_idx' is missing"),
    "the order of another matrix": ({}, {f"{UP}.g_idx": ("I32", (128,))}, "g_idx"),
    "the matrix itself beside": ({}, {f"{UP}.weight": ("F16", (128, 64))}, "does not belong"),
    "a bias of another shape": ({}, {f"{UP}.bias": ("F16", (64,))}, "bias' has the shape"),
    "a packed norm": ({}, {"model.norm.qweight": ("I32", (8, 1))}, "cannot be packed"),
}


@pytest.mark.parametrize("name", PACKED_FAULTS)
def test_faults_of_packed_tensors_are_named(tmp_path, name):
    plain = {key: value for key, value in tensors().items() if key != f"{UP}.weight"}
    sound = CONFIG | {"quantization_config": PACKED}
    open_checkpoint(write_checkpoint(tmp_path / "sound", sound, plain | UP_PACKED))
    settings, changes, message = PACKED_FAULTS[name]
    made = {key: value for key, value in (plain | UP_PACKED | changes).items() if value}
    with pytest.raises(BadFile, match=message):
        open_checkpoint(write_checkpoint(tmp_path / "hostile", sound | {"quantization_config": PACKED | settings}, made))


def test_a_config_that_demands_millions_of_tensors_is_refused_at_once(tmp_path):
    lying = MOE_CONFIG | {"num_hidden_layers": 1024, "num_experts": 1024}
    folder = write_checkpoint(tmp_path, lying, tensors(MOE_CONFIG))
    began = time.monotonic()
    with pytest.raises(BadFile):
        open_checkpoint(folder)
    assert time.monotonic() - began < 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    file=st.sampled_from(["config", "index", "shard"]),
)
def test_a_mutated_checkpoint_opens_or_is_refused_and_nothing_else(tmp_path, edits, file):
    folder = write_checkpoint(tmp_path / "model", CONFIG, tensors(), shards=2)
    names = {"config": "config.json", "index": "model.safetensors.index.json", "shard": "model-00001-of-00002.safetensors"}
    path = folder / names[file]
    content = bytearray(path.read_bytes())
    for position, value in edits:
        content[position % min(len(content), 2500)] = value
    path.write_bytes(content)
    with suppress(BadFile):
        open_checkpoint(folder)
