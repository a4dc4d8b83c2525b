import pytest

from qwen2_local.catalog import CATALOG, SIZES, defaults_of, lookup, suggestions, yarn_context_of
from qwen2_local.formats.checkpoint import expected_tensors, parameters
from qwen2_local.formats.config import parse_config
from qwen2_local.types import Sampling
from tests.support.checkpoints import CONFIG, MOE_CONFIG

MOE = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480}


def test_ten_checkpoints():
    assert [model.name for model in CATALOG] == [
        "0.5b", "0.5b-base", "1.5b", "1.5b-base", "7b", "7b-base", "57b", "57b-base", "72b", "72b-base",
    ]  # fmt: skip
    assert len({model.repo for model in CATALOG}) == 10


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_the_numbers_agree_with_each_other(size):
    raw = (MOE_CONFIG | MOE if size.name == "57b" else CONFIG) | {
        "hidden_size": size.hidden, "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.intermediate, "vocab_size": size.vocabulary, "tie_word_embeddings": size.tied,
    }  # fmt: skip
    config = parse_config(raw, "config.json")
    assert parameters(config) == size.weights
    assert len(list(expected_tensors(config, "switch"))) == size.tensors
    assert config.kv_values_per_token == size.kv_values_per_token
    assert list(size.gguf_bytes.values()) == sorted(size.gguf_bytes.values())


@pytest.mark.parametrize(
    ("typed", "name", "quantization"),
    [
        ("7b", "7b", None), ("7B", "7b", None), ("7b-base", "7b-base", None), ("7b-instruct", "7b", None), ("0.5b:q4_0", "0.5b", "q4_0"),
        ("Qwen/Qwen2-7B-Instruct", "7b", None), ("Qwen/Qwen2-7B", "7b-base", None), ("qwen2-72b-instruct", "72b", None),
        ("Qwen2-1.5B", "1.5b-base", None),
        ("57b-a14b", "57b", None), ("Qwen/Qwen2-57B-A14B-Instruct:Q8_0", "57b", "q8_0"), (" 7b ", "7b", None),
    ],
)  # fmt: skip
def test_names_that_people_type(typed, name, quantization):
    model, asked = lookup(typed)
    assert (model.name, asked) == (name, quantization)


@pytest.mark.parametrize("typed", ["9b", "", "7", "guide", "Qwen/Qwen2.5-7B", "meta/7b", "7b:", "7b-chat", "7b/../x"])
def test_names_that_are_none(typed):
    assert lookup(typed) is None


def test_names_of_the_hub():
    model = lookup("0.5b")[0]
    assert model.repo == "Qwen/Qwen2-0.5B-Instruct"
    assert model.variant_repo("GGUF") == "Qwen/Qwen2-0.5B-Instruct-GGUF"


def test_defaults_of_instruct_and_base():
    assert lookup("7b")[0].sampling == Sampling(0.7, 0.8, 20, 1.05)
    assert lookup("0.5b")[0].sampling.repetition_penalty == 1.1
    assert lookup("7b-base")[0].sampling == Sampling()


@pytest.mark.parametrize(
    ("names", "chats", "sampling"),
    [
        (["Qwen2 7B Instruct", "x.gguf"], False, Sampling(0.7, 0.8, 20, 1.05)),
        (["qwen2-7b", "qwen2-7b-instruct-q4_k_m.gguf"], False, Sampling(0.7, 0.8, 20, 1.05)),
        (["qwen2-7b"], True, Sampling(0.7, 0.8, 20, 1.05)),
        (["Qwen2 7B", "qwen2-7b.gguf"], False, Sampling()),
        (["DeepSeek R1 Distill Qwen 7B"], True, Sampling(0.6, 0.95)),
        (["DeepSeek_R1_Distill_Qwen_7B-Q4_0.gguf"], False, Sampling(0.6, 0.95)),
    ],
)
def test_sampling_of_files_that_do_not_say(names, chats, sampling):
    assert defaults_of(3584, 28, names, chats=chats) == sampling


def test_sampling_of_sizes_that_are_not_of_the_catalog():
    assert defaults_of(5120, 48, ["Qwen2.5 14B"], chats=True) == Sampling(0.7, 0.8, 20, 1.05)
    assert defaults_of(5120, 48, ["Qwen2.5 14B"], chats=False) == Sampling()
    assert defaults_of(896, 24, ["Qwen2.5 0.5B"], chats=True).repetition_penalty == 1.1


def test_licences():
    assert {size.name: size.licence.id for size in SIZES if size.licence.id != "apache-2.0"} == {"72b": "tongyi-qianwen"}


def test_suggestions():
    assert suggestions("7b-bsae")[0] == "7b-base"
    assert suggestions("giude", ("guide",)) == ["guide"]
    assert suggestions("xyzzy") == []


@pytest.mark.parametrize(("size", "stretched"), [("0.5b", 0), ("1.5b", 0), ("7b", 131072), ("57b", 65536), ("72b", 131072)])
def test_how_far_yarn_stretches_instruct(size, stretched):
    shape = next(one for one in SIZES if one.name == size)
    assert yarn_context_of(shape.hidden, shape.layers, 32768, [], experts=size == "57b", chats=True) == stretched
    assert yarn_context_of(shape.hidden, shape.layers, 32768, ["Qwen2 Instruct"], experts=size == "57b", chats=False) == stretched


def test_yarn_stretches_nothing_that_was_not_announced():
    assert yarn_context_of(3584, 28, 131072, [], experts=False, chats=True) == 0, "a base model, or one made for more already"
    assert yarn_context_of(3584, 28, 32768, ["Qwen2-7B"], experts=False, chats=False) == 0
    assert yarn_context_of(3584, 30, 32768, [], experts=False, chats=True) == 0
