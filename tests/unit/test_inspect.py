"""What `inspect` shows of sound, foreign and damaged files."""

from __future__ import annotations

import json
import struct
from array import array as numbers
from pathlib import Path
from typing import Any

import pytest

from qwen2_local.errors import BadFile
from qwen2_local.formats.model_card import read_card
from qwen2_local.formats.summarize import summarize
from qwen2_local.formats.summary import Kind, abbreviated
from qwen2_local.store import guide_folder
from tests.support import gguf_bytes, packed, random_qwen2, tiny_checkpoint
from tests.support.checkpoints import CONFIG, write_checkpoint, write_safetensors
from tests.support.gguf_bytes import F32, STRING, U16, U32, array, info, key, model, whole
from tests.support.program import run

LLAMA = whole(
    [
        key("general.architecture", STRING, "llama"), key("general.name", STRING, "A \x1b[31mred\x1b[0m name"), key("llama.block_count", U32, 1),
        key("llama.context_length", U32, 131072), key("general.file_type", U32, 15), key("general.license", STRING, "llama3"),
        key("tokenizer.ggml.model", STRING, "llama"), array("tokenizer.ggml.tokens", STRING, [f"t{number}" for number in range(3000)]),
        array("tokenizer.ggml.scores", F32, [0.5] * 3000), key("tokenizer.ggml.eos_token_id", U32, 2),
        key("tokenizer.chat_template", STRING, "{{ '\x1b]0;owned\x07' }}"), key("x.nan", F32, float("nan")),
    ],
    [info("token_embd.weight", (256, 4), 12, 0), info("output_norm.weight", (256,), 0, 576)],
    bytes(576 + 1024),
)  # fmt: skip


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# GGUF


def test_a_gguf_of_another_architecture(tmp_path):
    summary = summarize(write(tmp_path / "l.gguf", LLAMA))
    assert summary.format == "GGUF"
    assert summary.parameters == 5 * 256
    assert summary.kinds == (Kind("F32", 1, 1024), Kind("Q4_K", 1, 576))
    assert summary.bits_per_weight == 8 * 1600 / 1280
    facts = {"version": 3, "architecture": "llama", "quantization": "Q4_K_M", "licence": "llama3", "layers": 1, "context": 131072}
    assert facts.items() <= summary.facts.items()
    assert summary.facts["tokenizer"] == {"model": "llama", "split": None, "tokens": 3000, "eos": "2 't2'"}
    assert summary.keys["tokenizer.ggml.tokens"] == {"count": 3000, "of": "str", "first": [f"t{number}" for number in range(8)]}
    assert summary.keys["x.nan"] == "nan"
    assert summary.tensors[0].shape == (4, 256)
    assert [(tensor.offset - summary.tensors[0].offset, tensor.nbytes) for tensor in summary.tensors] == [(0, 576), (576, 1024)]
    assert summary.faults == ()
    assert "architecture 'llama'" in summary.note


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2moe"])
def test_a_qwen2_runs_here(tmp_path, architecture):
    summary = summarize(write(tmp_path / "m.gguf", model(architecture).build()))
    assert (summary.faults, summary.note) == ((), "")
    assert summary.facts["architecture"] == architecture
    assert (summary.facts["layers"], summary.facts["heads"], summary.facts["kv_heads"]) == (2, 4, 2)


def test_version_2_is_read(tmp_path):
    content = model().build()
    assert summarize(write(tmp_path / "m.gguf", content[:4] + struct.pack("<I", 2) + content[8:])).facts["version"] == 2


def split(tmp_path: Path, count: int) -> list[Path]:
    paths = []
    for number in range(count):
        part = model()
        names = list(part.tensors)
        part.tensors = {name: part.tensors[name] for name in names[number::count]}
        if number:
            part.keys.clear()
        part.keys |= {"no": key("split.no", U16, number), "count": key("split.count", U16, count), "all": key("split.tensors.count", U16, len(names))}
        paths.append(write(tmp_path / f"m-{number + 1:05d}-of-{count:05d}.gguf", part.build()))
    return paths


def test_all_parts_of_a_split_file_are_one_model(tmp_path):
    paths = split(tmp_path, 3)
    for path in (*paths, tmp_path):
        summary = summarize(path)
        assert summary.files == tuple(one.name for one in paths)
        assert summary.size == sum(one.stat().st_size for one in paths)
        assert len(summary.tensors) == len(model().tensors)
        assert {tensor.file for tensor in summary.tensors} == set(summary.files)
        assert (summary.faults, summary.facts["architecture"]) == ((), "qwen2")


def test_what_a_part_lacks_is_said_and_the_others_are_shown(tmp_path):
    paths = split(tmp_path, 3)
    paths[1].unlink()
    paths[2].write_bytes(b"<html>")
    summary = summarize(paths[0])
    assert summary.faults[0] == f"{paths[1].name} is missing: part 2 of 3."
    assert "an HTML page" in summary.faults[1]
    assert summary.facts["architecture"] == "qwen2"
    assert 0 < len(summary.tensors) < len(model().tensors)


def test_a_tensor_in_two_parts_is_said(tmp_path):
    paths = split(tmp_path, 2)
    paths[1].write_bytes(paths[0].read_bytes())
    assert "'blk.0.attn_k.bias' is in another part, too" in summarize(paths[0]).faults[0]


@pytest.mark.parametrize("cut", [-1, -2000, -6000])
def test_of_a_truncated_file_the_rest_is_shown(tmp_path, cut):
    whole_one = summarize(write(tmp_path / "m.gguf", model().build()))
    summary = summarize(write(tmp_path / "m.gguf", model().build()[:cut]))
    assert "truncated" in summary.faults[0]
    assert summary.facts == whole_one.facts
    assert [tensor.name for tensor in summary.tensors] == [tensor.name for tensor in whole_one.tensors]


def test_what_comes_before_the_first_fault_is_shown(tmp_path):
    content = whole([key("general.architecture", STRING, "qwen2"), key("k", U32, 1)], [info("a", (4,), 0, 0), info("b", (4,), 99, 32)], bytes(64))
    summary = summarize(write(tmp_path / "m.gguf", content))
    assert summary.faults == (f"{tmp_path / 'm.gguf'} is damaged: the tensor 'b' has the unknown type 99.",)
    assert summary.facts["architecture"] == "qwen2"
    assert list(summary.keys) == ["general.architecture", "k"]
    assert [tensor.name for tensor in summary.tensors] == ["a"]


def test_a_qwen2_that_lies_is_damaged(tmp_path):
    lying = model()
    lying.keys["block_count"] = key("qwen2.block_count", U32, 3)
    summary = summarize(write(tmp_path / "m.gguf", lying.build()))
    assert "'blk.2.attn_norm.weight' is missing" in summary.faults[0]
    assert len(summary.tensors) == len(lying.tensors)


def test_an_adapter_in_a_gguf(tmp_path):
    keys = [key("general.architecture", STRING, "qwen2"), key("general.type", STRING, "adapter"), key("adapter.type", STRING, "lora")]
    keys.append(key("adapter.lora.alpha", F32, 16.0))
    summary = summarize(write(tmp_path / "a.gguf", whole(keys, [info("blk.0.attn_q.weight.lora_a", (8, 2), 0, 0)], bytes(64))))
    assert {"type": "adapter", "adapter": "lora", "lora_alpha": 16.0}.items() <= summary.facts.items()
    assert "type 'adapter'" in summary.note


# safetensors and folders


def test_one_safetensors_file(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": ("BF16", (3, 4)), "b": ("F32", (5,)), "s": ("F32", ())}, {"format": "pt", "who": "me"})
    summary = summarize(tmp_path / "x.safetensors")
    assert (summary.format, summary.parameters) == ("safetensors", 18)
    assert summary.kinds == (Kind("BF16", 1, 24), Kind("F32", 2, 24))
    assert summary.keys == {"format": "pt", "who": "me"}
    assert [(tensor.name, tensor.shape) for tensor in summary.tensors] == [("a", (3, 4)), ("b", (5,)), ("s", ())]


def test_packed_weights_alone_do_not_say_how_many_they_are(tmp_path):
    tensors = {"q.weight": ("U32", (8, 8)), "q.scales": ("BF16", (8, 1)), "q.biases": ("BF16", (8, 1)), "n.weight": ("BF16", (8,))}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    summary = summarize(tmp_path / "x.safetensors")
    assert (summary.parameters, summary.bits_per_weight) == (None, None)
    assert summary.kinds == (Kind("packed", 1, 256 + 32), Kind("BF16", 1, 16))


def test_the_guide():
    summary = summarize(guide_folder())
    assert (summary.format, summary.faults, summary.note) == ("Hugging Face folder", (), "")
    assert (summary.parameters, summary.bits_per_weight) == (5_773_568, 16)
    assert "<|im_start|>" in summary.template


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (8, 64)])
def test_an_mlx_folder_counts_weights_not_words(tmp_path, bits, group):
    pytest.importorskip("mlx.core")
    config = random_qwen2.config()
    weights = random_qwen2.weights(config, 1)
    random_qwen2.write_mlx(tmp_path / "m", config, weights, bits=bits, group=group, exceptions={"model.embed_tokens": {"bits": 6, "group_size": 64}})
    summary = summarize(tmp_path / "m")
    assert (summary.format, summary.faults, summary.note) == ("MLX folder", (), "")
    assert summary.parameters == sum(value.size for value in weights.values())
    kinds = {kind.type: kind.tensors for kind in summary.kinds}
    assert kinds[f"{bits}-bit, groups of {group}"] == 14
    assert kinds["6-bit, groups of 64"] == 1
    assert sum(kind.nbytes for kind in summary.kinds) == sum(tensor.nbytes for tensor in summary.tensors)


@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_gptq_and_awq_folders_too(tmp_path, method, bits):
    folder, plain = packed.checkpoint(tmp_path, tiny_checkpoint.dense(hidden_size=256, intermediate_size=512), packed.settings(method, bits))
    summary = summarize(folder)
    assert summary.faults == ()
    assert summary.parameters == summarize(plain).parameters
    assert f"{method} {bits}-bit, groups of 128" in {kind.type for kind in summary.kinds}


def test_a_folder_of_another_architecture(tmp_path):
    config = {"model_type": "llama", "hidden_size": 8, "vocab_size": 16, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    write_checkpoint(tmp_path / "l", config, {"model.embed_tokens.weight": ("F16", (16, 8)), "model.x": ("F16", (8,))}, shards=2)
    (tmp_path / "l/README.md").write_text('---\nlicense: "llama3"\n---\n')
    (tmp_path / "l/chat_template.jinja").write_text("{{ x }}")
    summary = summarize(tmp_path / "l")
    assert summary.facts == {"architecture": "llama", "hidden": 8, "vocabulary": 16, "context": 4096, "dtype": "float16", "licence": "llama3"}
    assert (summary.parameters, summary.template, summary.faults) == (136, "{{ x }}", ())
    assert "model type 'llama'" in summary.note


def test_a_missing_shard_is_said_and_the_others_are_shown(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG, {"a": ("BF16", (4,)), "b": ("BF16", (4,)), "c": ("BF16", (4,))}, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    summary = summarize(folder)
    assert summary.faults == (f"{folder} lacks 1 of 3 shards: model-00002-of-00003.safetensors.",)
    assert [tensor.name for tensor in summary.tensors] == ["a", "c"]


def test_a_damaged_config_hides_no_tensors(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG, {"a": ("BF16", (4,))})
    (folder / "config.json").write_text("{")
    summary = summarize(folder)
    assert "no valid JSON" in summary.faults[0]
    assert [tensor.name for tensor in summary.tensors] == ["a"]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder = write_checkpoint(tmp_path / "m", CONFIG, {"a": ("BF16", (4,))})
    for name in ("tokenizer_config.json", "README.md", "model-2.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/etc/passwd")
    summary = summarize(folder)
    assert all("is a link out of its folder" in fault for fault in summary.faults)
    assert len(summary.faults) == 2


PEFT = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2-0.5B", "r": 8, "lora_alpha": 16, "use_rslora": True, "use_dora": False}
MLX = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}


@pytest.mark.parametrize(("config", "file", "kind", "facts"), [
    (PEFT, "adapter_model.safetensors", "PEFT adapter", {"adapter": "LORA", "base_model": "Qwen/Qwen2-0.5B", "rank": 8, "rslora": True}),
    (MLX, "adapters.safetensors", "MLX adapter", {"adapter": "lora", "rank": 8, "scale": 20.0, "layers": 16}),
])  # fmt: skip
def test_adapters(tmp_path, config: dict[str, Any], file: str, kind: str, facts: dict[str, Any]):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / file, {"q.lora_A.weight": ("F32", (8, 16))})
    summary = summarize(tmp_path)
    assert (summary.format, summary.parameters, summary.faults) == (kind, 128, ())
    assert facts.items() <= summary.facts.items()


def test_an_adapter_without_weights_is_damaged(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    assert "holds none of" in summarize(tmp_path).faults[0]


@pytest.mark.parametrize(("content", "message"), [
    (b"<html>404", "an HTML page"), (b"", "empty"), (b"\x80\x04\x95pickle", "pickle"), (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
])  # fmt: skip
def test_what_is_no_model_is_named(tmp_path, content, message):
    with pytest.raises(BadFile, match=message):
        summarize(write(tmp_path / "m.gguf", content))


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(BadFile, match="holds no model"):
        summarize(tmp_path)


# Its parts


def test_long_values_are_cut_short():
    assert abbreviated("x" * 1000) == f"{'x' * 200}… (1,000 characters)"
    assert abbreviated(numbers("i", range(1000))) == {"count": 1000, "of": "int32", "first": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert abbreviated([1, 2]) == [1, 2]
    assert abbreviated({"a": {"b": {"c": {"d": 1}}}}) == {"a": {"b": {"c": {"entries": 1}}}}
    assert abbreviated({str(number): 0 for number in range(100)}) == {"entries": 100}
    assert abbreviated([[[[[]]]]]) == [[[{"count": 1, "of": "list", "first": []}]]]
    assert (abbreviated(10**400), abbreviated(10**30), abbreviated(float("inf")), abbreviated(None)) == ("a huge number", "1.000e+30", "inf", None)


def test_the_head_of_a_model_card(tmp_path):
    card = tmp_path / "README.md"
    assert read_card(card) == {}
    card.write_text("\ufeff---\nlicense: other\nlicense_name: 'tongyi'\nlanguage: en\n---\nlicense: mit\n", encoding="utf-8")
    assert read_card(card) == {"license": "other", "license_name": "tongyi"}
    for text in ("license: mit\n", "---\nlicense: mit\n", "---\nlicense:\n---\n", f'---\nlicense:{" " * 60_000}x"y\n---\n'):
        card.write_text(text)
        assert read_card(card) in ({}, {"license": 'x"y'})


# The command


def test_the_page(tmp_path):
    done = run("inspect", write(tmp_path / "l.gguf", LLAMA), "--tensors", "--template")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "name A [31mred[0m name", "context 131,072", "bits per weight 10.00", "TYPE TENSORS SIZE SHARE", "Q4_K 1 1 kB 36.0%",
        "tokenizer.ggml.tokens 3,000 of str: t0, t1, t2, t3, t4, t5, t6, t7 …", "TENSOR TYPE SHAPE BYTES OFFSET FILE", "{{ ']0;owned' }}",
    ):  # fmt: skip
        assert line in lines
    assert any(line.startswith("runs here no:") for line in lines)


def test_the_json(tmp_path):
    path = write(tmp_path / "l.gguf", LLAMA)
    done = run("inspect", path, "--json", "--tensors", "--template")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    shown = json.loads(done.stdout, parse_constant=pytest.fail)
    assert (shown["format"], shown["architecture"], shown["parameters"]) == ("GGUF", "llama", 1280)
    assert shown["quantization_types"] == [{"type": "F32", "tensors": 1, "bytes": 1024}, {"type": "Q4_K", "tensors": 1, "bytes": 576}]
    assert shown["tensors"][0].keys() == {"name", "type", "shape", "file", "offset", "nbytes"}
    assert shown["template"] == "{{ '\x1b]0;owned\x07' }}"
    assert "tensors" not in json.loads(run("inspect", path, "--json").stdout)


def test_damaged_files_end_with_3_and_are_shown_all_the_same(tmp_path):
    path = write(tmp_path / "m.gguf", gguf_bytes.model().build()[:-1])
    done = run("inspect", path)
    assert done.returncode == 3
    assert "architecture      qwen2" in done.stdout
    assert "runs here         not this damaged" in done.stdout
    assert done.stderr.startswith(f"damaged: {path} is damaged: it is truncated")
    as_json = run("inspect", path, "--json")
    assert as_json.returncode == 3
    assert len(json.loads(as_json.stdout)["faults"]) == 1


@pytest.mark.parametrize("name", ["guide", "qwen2_local/guide/model.safetensors"])
def test_names_and_single_files_are_taken(name):
    root = Path(__file__).parents[2]
    done = run("inspect", name, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "5,773,568" in done.stdout


def test_what_is_not_there_is_said():
    done = run("inspect", "./nothing.gguf")
    assert done.returncode == 2
    assert "there is no file or folder ./nothing.gguf" in done.stderr
