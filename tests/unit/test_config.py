import json
from pathlib import Path

import pytest

from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.config import MlxQuantization, PackedQuantization, Yarn, parse_config, read_config
from tests.support.checkpoints import CONFIG, MOE_CONFIG

PATH = Path("config.json")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "true_sequential": True, "dataset": None}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True, "modules_to_not_convert": None}


def parse(**changes):
    raw = CONFIG | changes
    return parse_config({key: value for key, value in raw.items() if value != "absent"}, PATH)


def test_a_dense_config():
    config = parse()
    assert (config.hidden, config.layers, config.heads, config.kv_heads, config.head_dim) == (64, 2, 4, 2, 16)
    assert (config.vocabulary, config.intermediate, config.context) == (300, 128, 256)
    assert (config.rope_theta, config.rms_eps, config.tied, config.eos) == (1e6, 1e-6, True, (1,))
    assert config.kv_values_per_token == 2 * 2 * 2 * 16
    assert config.yarn is config.moe is config.quantization is None


def test_a_mixture_of_experts():
    config = parse_config(MOE_CONFIG, PATH)
    assert config.moe is not None
    assert (config.moe.experts, config.moe.experts_per_token, config.moe.expert_size, config.moe.shared_size) == (4, 2, 32, 96)
    assert not config.moe.normalize


def test_sliding_window_is_ignored_when_off():
    assert parse(sliding_window="what?").context == 256


def test_rope_of_transformers_5():
    config = parse(rope_theta="absent", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert (config.rope_theta, config.yarn) == (5e5, None)
    parameters = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert parse(rope_theta="absent", rope_parameters=parameters).yarn == Yarn(4.0, 256)


def test_yarn_of_transformers_4_lengthens_the_context():
    config = parse(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256})
    assert (config.yarn, config.context) == (Yarn(4.0, 256), 1024)
    assert parse(rope_scaling={"rope_type": "yarn", "factor": 2}).yarn == Yarn(2.0, 256)
    assert parse(rope_scaling=None).yarn is None


@pytest.mark.parametrize("setting", [{"attention_factor": 1.5}, {"beta_fast": 16}, {"beta_slow": 2}, {"mscale": 0.7}, {"truncate": False}])
def test_yarn_settings_that_no_backend_computes_are_refused_by_name(setting):
    usual = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 32, "beta_slow": 1}
    assert parse(rope_scaling=usual).yarn == Yarn(4.0, 256)
    with pytest.raises(UnsupportedModel, match=next(iter(setting))):
        parse(rope_scaling=usual | setting)


def test_eos_may_be_one_many_or_none():
    assert parse(eos_token_id=[1, 2]).eos == (1, 2)
    assert parse(eos_token_id=None).eos == ()


def test_mlx_quantization_with_exceptions():
    exceptions = {"lm_head": {"bits": 8, "group_size": 32}, "model.embed_tokens": False}
    config = parse(quantization={"group_size": 64, "bits": 4, **exceptions})
    assert config.quantization == MlxQuantization(4, 64)
    assert config.quantized == {"lm_head": MlxQuantization(8, 32), "model.embed_tokens": None}
    assert parse(quantization={"group_size": None, "bits": 4}).quantization == MlxQuantization(4, 64)
    assert parse(quantization_config={"group_size": 32, "bits": 4, "mode": "mxfp4"}).quantization == MlxQuantization(4, 32, "mxfp4")


def test_mlx_exceptions_are_complete_in_themselves():
    """As mlx-lm reads them: what one leaves out is its own mode's default, not the block's."""
    exceptions = {"lm_head": {"bits": 8}, "model.embed_tokens": {"mode": "mxfp8"}, "model.layers.0.mlp.down_proj": True}
    config = parse(quantization={"group_size": 16, "bits": 4, "mode": "nvfp4", **exceptions})
    nvfp4 = MlxQuantization(4, 16, "nvfp4")
    assert config.quantization == nvfp4
    assert config.quantized == {
        "lm_head": MlxQuantization(8, 64),
        "model.embed_tokens": MlxQuantization(8, 32, "mxfp8"),
        "model.layers.0.mlp.down_proj": nvfp4,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_all_that_mlx_has(bits, group):
    mixed = {"group_size": group, "bits": 2, "mode": "affine", "lm_head": {"group_size": group, "bits": bits, "mode": "affine"}}
    assert parse(quantization=mixed).quantized == {"lm_head": MlxQuantization(bits, group)}


def test_gptq_and_awq():
    assert parse(quantization_config=GPTQ).packed == PackedQuantization("gptq", 4, 128)
    assert parse(quantization_config=GPTQ | {"bits": 8, "desc_act": True}).packed == PackedQuantization("gptq", 8, 128, ordered=False)
    assert parse(quantization_config=AWQ | {"version": "GEMM"}).packed == PackedQuantization("awq", 4, 128)
    assert parse(quantization_config=AWQ).quantization is None


def test_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert read_config(path) == parse()


@pytest.mark.parametrize("family", ["Qwen2.5", "R1-Distill-Qwen"])
def test_relatives_pass_by_their_architecture(family):
    assert parse(_name_or_path=family, hidden_size=128, num_attention_heads=8).hidden == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model type 'llama'"),
        ({"model_type": "qwen2_vl"}, "model type"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_qwen.Qwen2ForCausalLM"}}, "code of its own"),
        ({"model_file": "evil.py"}, "code of its own"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}, "quantized by bitsandbytes"),
        ({"quantization_config": GPTQ | {"sym": False}}, "quantized by gptq .*sym"),
        ({"quantization_config": GPTQ | {"checkpoint_format": "gptq_v2"}}, "checkpoint_format"),
        ({"quantization_config": GPTQ | {"dynamic": {"-:mlp": {}}}}, "dynamic"),
        ({"quantization_config": GPTQ | {"bits": 3}}, "by gptq to 3 bits"),
        ({"quantization_config": GPTQ | {"group_size": -1}}, "group_size"),
        ({"quantization_config": GPTQ | {"group_size": 40}}, "group_size"),
        ({"quantization_config": AWQ | {"version": "gemv"}}, "version: gemv"),
        ({"quantization_config": AWQ | {"bits": 8}}, "by awq to 8 bits"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope"),
        ({"head_dim": 32}, "head_dim"),
    ],
)
def test_sound_models_that_are_not_run_here(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        parse(**changes)
