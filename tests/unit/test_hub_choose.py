"""Of several ways to a model, the one that fits, fetches least and need not be converted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2_converters.hub.asked import understand
from qwen2_converters.hub.choose import choose, siblings
from qwen2_converters.hub.preflight import converted_bytes, fits, shape_of
from qwen2_converters.hub.repository import HubFile, Repository, check_listing, checkpoint_files, ggufs, level_of, source_hash
from qwen2_converters.target import Target
from qwen2_local.catalog import lookup
from qwen2_local.errors import BadFile, UnknownModel, UnsupportedModel, UsageError
from qwen2_local.fit import Memory
from qwen2_local.formats.config import parse_config
from tests.support.checkpoints import CONFIG

GB = 10**9
SEVEN = CONFIG | {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "vocab_size": 152064, "tie_word_embeddings": False, "max_position_embeddings": 32768,
}  # fmt: skip


def original(id="Qwen/Qwen2-7B-Instruct", raw=SEVEN, shards=4, size=15_231_000_000):
    names = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    listed = [HubFile(name, size // shards) for name in names]
    listed += [HubFile(name, 1000) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "run.py", "pytorch_model.bin")]
    return Repository("huggingface", id, "c" * 40, check_listing(listed, id), kind="original", config=parse_config(raw, "config.json"))


def gguf(id="Qwen/Qwen2-7B-Instruct-GGUF", **levels):
    listed = [HubFile(f"qwen2-7b-instruct-{level}.gguf", int(size * GB)) for level, size in levels.items()]
    return Repository("huggingface", id, "c" * 40, check_listing(listed, id))


def mlx(id="Qwen/Qwen2-7B-Instruct-MLX", bits=4):
    raw = SEVEN | {"quantization": {"bits": bits, "group_size": 64}}
    listed = [HubFile("model.safetensors", 4_300_000_000), HubFile("config.json", 1000), HubFile("tokenizer.json", 1000)]
    return Repository("huggingface", id, "c" * 40, check_listing(listed, id), kind="mlx", config=parse_config(raw, "config.json"))


OFFICIAL = gguf(q4_k_m=4.68, q8_0=8.09, q2_k=3.0, fp16=15.2)


def pick(typed, *repositories, backend="llama.cpp", memory=64, targets=(), keep=False):
    asked, room = understand(typed), Memory(memory * GB, memory * GB)
    return choose(
        asked, repositories, backend=backend, targets=[Target.parse(target) for target in targets], original=keep, size_of=converted_bytes,
        fits=lambda way: fits(way, shape_of(way.repository, asked.model), room),
    )  # fmt: skip


def test_the_official_gguf_is_taken_before_the_original_is_converted():
    choice = pick("7b", OFFICIAL, original())
    assert (choice.best.labels, choice.best.format, choice.best.fetched) == (("q4_k_m",), "gguf", 4_680_000_000)
    assert [str(target) for target in choice.runner_up.targets] == ["gguf:q4_k_m"]


def test_without_a_gguf_the_original_is_converted():
    choice = pick("7b-base", original("Qwen/Qwen2-7B"))
    assert (choice.best.format, [str(target) for target in choice.best.targets]) == ("hf", ["gguf:q4_k_m"])
    assert abs(choice.best.written - 4_680_000_000) < 20_000_000
    assert not any(file.name.endswith((".py", ".bin")) for file in choice.best.files)


def test_a_level_is_taken_where_it_is_there_and_made_where_it_is_not():
    assert pick("7b:q8_0", OFFICIAL, original()).best.format == "gguf"
    assert pick("7b:fp16", OFFICIAL, original()).best.format == "gguf"
    assert pick("7b:q6_k", OFFICIAL, original()).best.targets == (Target("gguf", "q6_k"),)
    with pytest.raises(UnknownModel, match='has no "q9_x"') as caught:
        pick("7b:q9_x", OFFICIAL)
    assert "q4_k_m" in caught.value.hint


def test_less_memory_means_fewer_bits():
    assert pick("7b", OFFICIAL, memory=16).best.labels == ("q4_k_m",)
    assert pick("7b", OFFICIAL, memory=5).best.labels == ("q2_k",)
    # What fits nowhere is still what is recommended: the preflight says that it does not fit.
    assert pick("7b", OFFICIAL, memory=2).best.labels == ("q4_k_m",)


def test_a_small_model_keeps_eight_bits():
    assert pick("some/tiny", gguf("some/tiny", q4_k_m=0.39, q8_0=0.53)).best.labels == ("q8_0",)
    assert pick("some/tiny", original("some/tiny", CONFIG, shards=1)).best.targets == (Target("gguf", "q8_0"),)


def test_on_apple_silicon_mlx_is_taken_as_it_is():
    choice = pick("7b", mlx(), original(), backend="mlx")
    assert (choice.best.format, choice.best.labels) == ("mlx", ("mlx-4bit",))
    assert pick("7b", original(), backend="mlx").best.targets == (Target("mlx", "4bit"),)
    assert pick("7b:mlx-8bit", mlx(), original()).best.targets == (Target("mlx", "8bit"),)
    assert pick("7b:mlx", mlx(), original()).best.format == "mlx"


def test_gptq_becomes_what_holds_its_codes_exactly():
    raw = SEVEN | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}}
    repository = original("Qwen/Qwen2-7B-Instruct-GPTQ-Int4", raw, size=5_600_000_000)
    repository = Repository(**{name: getattr(repository, name) for name in repository.__slots__} | {"kind": "gptq"})
    assert pick("7b:gptq-int4", repository).best.targets == (Target("gguf", "q4_0"),)
    assert pick("7b", original(), repository, backend="mlx").best.repository is repository
    assert pick("7b:gptq-int4", repository, backend="mlx").best.targets == (Target("mlx", "4bit-g128"),)


def test_targets_start_from_the_original():
    choice = pick("7b", OFFICIAL, original(), targets=["gguf:q4_k_m", "mlx:4bit"])
    assert (choice.best.format, choice.best.labels) == ("hf", ("q4_k_m", "mlx-4bit"))
    assert pick("7b", original(), keep=True).best.labels == ("original",)
    assert pick("7b", original(), keep=True, targets=["gguf:q8_0"]).best.labels == ("original", "q8_0")
    assert pick("7b:original", original()).best.labels == ("original",)
    with pytest.raises(UnsupportedModel, match="quantized already"):
        pick("some/tune", OFFICIAL, targets=["gguf:q4_0"])


def test_a_split_gguf_is_one_model_if_all_its_parts_are_there():
    parts = [HubFile(f"Q4_K_M/m-Q4_K_M-{number:05d}-of-00003.gguf", GB) for number in (1, 2, 3)]
    whole = Repository("huggingface", "some/big", "c" * 40, check_listing(parts, "x"))
    assert [(one.level, one.size) for one in ggufs(whole)] == [("q4_k_m", 3 * GB)]
    assert [file.name for file in pick("some/big:q4_k_m", whole).best.files] == [file.name for file in parts]
    cut = Repository("huggingface", "some/big", "c" * 40, check_listing(parts[:2], "x"))
    with pytest.raises(UnknownModel):
        pick("some/big:q4_k_m", cut)


def test_a_file_that_was_named_is_taken():
    asked = "https://huggingface.co/some/tune/blob/main/qwen2-7b-instruct-q2_k.gguf"
    assert pick(asked, gguf("some/tune", q4_k_m=4.68, q2_k=3.0)).best.labels == ("q2_k",)
    with pytest.raises(UnknownModel, match="has no"):
        pick("https://huggingface.co/some/tune/blob/main/other.gguf", gguf("some/tune", q4_k_m=4.68))


def test_a_repository_without_a_model():
    with pytest.raises(UnknownModel, match="holds no model"):
        pick("some/thing", Repository("huggingface", "some/thing", "c" * 40, (HubFile("README.md", 5),)))


def test_which_repositories_are_looked_at():
    def of(typed, backend="llama.cpp", targets=(), keep=False):
        return [id.removeprefix("Qwen/Qwen2-") for id in siblings(understand(typed), backend, targets, original=keep)]

    assert of("7b") == ["7B-Instruct-GGUF", "7B-Instruct"]
    assert of("7b", "mlx") == ["7B-Instruct-MLX", "7B-Instruct"]
    assert of("7b-base") == ["7B"]
    assert of("72b:mlx-4bit") == ["72B-Instruct"]
    assert of("72b", "mlx") == ["72B-Instruct-GPTQ-Int4", "72B-Instruct"]
    assert of("7b:gptq-int8") == ["7B-Instruct-GPTQ-Int8"]
    assert of("7b", keep=True) == of("7b", targets=["x"]) == ["7B-Instruct"]
    assert of("Qwen/Qwen2-7B-Instruct-GGUF") == ["7B-Instruct-GGUF"]


@pytest.mark.parametrize(
    ("stem", "level"),
    [
        ("qwen2-7b-instruct-q4_k_m", "q4_k_m"), ("Qwen2.5-7B-Instruct-Q8_0", "q8_0"), ("m.IQ4_XS", "iq4_xs"), ("m-fp16", "f16"), ("m-BF16", "bf16"),
        ("m-q5_0-split", "q5_0"), ("Q4_K_M/m-Q6_K", "q6_k"), ("model", ""), ("qwen2", ""), ("m-q4_k_m-notes", ""),
    ],
)  # fmt: skip
def test_levels_in_names(stem, level):
    assert level_of(stem) == level


# Listings


HOSTILE = ["../x.gguf", "/etc/passwd", "a/../../x", "a//b", "x\0.gguf", "x\n.gguf", "C:\\x", "con.gguf", ".", "a/", "\u202egguf.exe", "x" * 300]


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_name_spoils_the_whole_listing(name):
    with pytest.raises(BadFile, match="The listing"):
        check_listing([HubFile("model.safetensors", 1), HubFile(name, 1)], "The listing")


@pytest.mark.parametrize("file", [HubFile("x", -1), HubFile("x", 1 << 60), HubFile("x", 1, sha256="0"), HubFile("x", 1, blob="z" * 40)])
def test_impossible_sizes_and_hashes_spoil_it_too(file):
    with pytest.raises(BadFile):
        check_listing([file], "The listing")


def test_names_that_are_one_file_on_some_systems_spoil_it():
    with pytest.raises(BadFile, match="one file"):
        check_listing([HubFile("Model.gguf", 1), HubFile("model.gguf", 1)], "The listing")


@given(st.lists(st.text(max_size=30), max_size=8))
def test_whatever_is_listed_no_name_leads_out_of_a_folder(names):
    try:
        files = check_listing([HubFile(name, 1) for name in names], "x")
    except BadFile:
        return
    assert all(file.name and "/" not in file.name and file.name not in (".", "..") and "\0" not in file.name for file in files)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["model.safetensors", "tokenizer.json"], "no config.json"), (["config.json", "tokenizer.json", "pytorch_model.bin"], "no .safetensors"),
        (["config.json", "model.safetensors"], "no tokenizer.json"),
        (["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"], "all shards"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lacks_something_is_not_begun(names, fault):
    with pytest.raises(BadFile, match=fault):
        checkpoint_files(Repository("huggingface", "some/thing", "c" * 40, tuple(HubFile(name, 1) for name in names)))


def test_the_source_hash_tells_changes_and_nothing_else():
    one, two = HubFile("a", 1, sha256="0" * 64), HubFile("b", 2, blob="1" * 40)
    assert source_hash([one, two]) == source_hash([two, one]) != source_hash([one])
    assert source_hash([one, HubFile("c", 3)]) == ""
    assert source_hash([one, HubFile("README.md", 3, blob="2" * 40)]) == source_hash([one])


def test_sizes_of_conversions_are_those_of_the_catalog():
    size = lookup("7b")[0].size
    for level, count in size.gguf_bytes.items():
        assert abs(converted_bytes(original(), Target("gguf", level)) - count) < 0.006 * GB, level


def test_a_level_and_a_target_contradict_each_other():
    with pytest.raises(UsageError, match="q8_0"):
        siblings(understand("0.5b:q8_0"), "llama.cpp", [Target.parse("gguf:q4_0")], original=False)
    assert siblings(understand("0.5b:original"), "llama.cpp", [Target.parse("gguf:q4_0")], original=False) == ["Qwen/Qwen2-0.5B-Instruct"]


@pytest.mark.parametrize(("typed", "meant"), [("q4_0", "gguf:q4_0?"), ("gguf:q4km", "gguf:q4_k_m?"), ("mlx-4bit", "mlx:4bit?")])
def test_a_target_that_is_nearly_right_is_guessed(typed, meant):
    with pytest.raises(UsageError) as caught:
        Target.parse(typed)
    assert f"Did you mean {meant}" in caught.value.hint
