"""What a model's files say of it, as loading reads them. No backend runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qwen2_local import backends, fit, loading
from qwen2_local.backends.base import Layout
from qwen2_local.errors import BadFile, DoesNotFit, UsageError
from qwen2_local.formats.config import parse_config
from qwen2_local.loading import Opened, open_model
from qwen2_local.types import Sampling
from tests.support import gguf_bytes, random_qwen2, small_tokenizer, tiny_checkpoint
from tests.support.gguf_bytes import BOOL, F32, I32, STRING, U32, array, key
from tests.support.scripted import Scripted
from tests.support.small_tokenizer import CONTROL

END, TEXT_END, START = CONTROL["<|im_end|>"], CONTROL["<|endoftext|>"], CONTROL["<|im_start|>"]
QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATML = "{% for m in messages %}{{ '<|im_start|>' }}{% endfor %}"
SAMPLED = Sampling(0.7, 0.8, 20, 1.05)
GB = 10**9


def open_gguf(folder: Path, *, file: str = "m.gguf", renamed: dict[str, str] | None = None, **keys: Any) -> Opened:
    """A GGUF of nothing but zeros with `keys`, opened; see `write_gguf`."""
    return open_model(str(write_gguf(folder / file, renamed=renamed, **keys)))


def write_gguf(path: Path, *, renamed: dict[str, str] | None = None, **keys: Any) -> Path:
    """A GGUF of nothing but zeros with `keys`, a double underscore for each dot. renamed: other texts of tokens."""
    made = gguf_bytes.model()
    small = small_tokenizer.small_gguf()
    tokens = [(renamed or {}).get(text, text) for text in small["tokenizer.ggml.tokens"]]
    made.keys |= {
        "tokens": array("tokenizer.ggml.tokens", STRING, tokens),
        "types": array("tokenizer.ggml.token_type", I32, small["tokenizer.ggml.token_type"]),
        "merges": array("tokenizer.ggml.merges", STRING, small["tokenizer.ggml.merges"]),
        "pre": key("tokenizer.ggml.pre", STRING, "qwen2"),
    }
    del made.keys["eos"]
    for name in ("token_embd.weight", "output.weight"):
        made.tensors[name] = (gguf_bytes.HIDDEN, len(tokens))
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING}
    for name, value in keys.items():
        made.keys[name.removeprefix("qwen2__")] = key(name.replace("__", "."), kinds[type(value)], value)
    path.write_bytes(made.build())
    return path


def mlx_folder(folder: Path, *, dtype: str = "BF16", **said: Any) -> Path:
    """An MLX folder. said: changes of its JSON files, by their names; None leaves one out."""
    config = tiny_checkpoint.dense()
    tiny_checkpoint.write(folder, config, random_qwen2.weights(config, 1), dtype=dtype)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw.replace(b'{"format": "pt"}', b'{"format":"mlx"}'))
    for name, changes in said.items():
        path = folder / f"{name}.json"
        if changes is None:
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# Sampling


def test_an_official_gguf_is_instruct_though_its_name_does_not_say_so(tmp_path: Path) -> None:
    made = open_gguf(tmp_path, general__name="qwen2-7b", tokenizer__ggml__eos_token_id=END)
    assert made.sampling == SAMPLED
    made = open_gguf(tmp_path, file="qwen2-7b-instruct-q4_0.gguf", general__name="qwen2-7b", tokenizer__ggml__eos_token_id=TEXT_END)
    assert made.sampling == SAMPLED


def test_a_base_gguf_is_greedy_though_it_has_a_template(tmp_path: Path) -> None:
    made = open_gguf(tmp_path, general__name="Qwen2 7B", tokenizer__ggml__eos_token_id=TEXT_END, tokenizer__chat_template=CHATML)
    assert made.sampling == Sampling()


def test_what_a_gguf_says_of_sampling_counts(tmp_path: Path) -> None:
    assert open_gguf(tmp_path, tokenizer__ggml__eos_token_id=END, general__sampling__temp=0.0).sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({"generation_config": None}, SAMPLED),
        ({"generation_config": None, "config": {"eos_token_id": TEXT_END}}, SAMPLED),
        ({"generation_config": None, "config": {"eos_token_id": TEXT_END}, "tokenizer_config": {"eos_token": "<|endoftext|>"}}, Sampling()),
        ({"generation_config": None, "config": {"eos_token_id": TEXT_END}, "tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, SAMPLED),
        ({"generation_config": {"do_sample": False}}, Sampling(repetition_penalty=1.05)),
    ],
)
def test_sampling_of_a_folder(tmp_path: Path, said: dict[str, Any], sampling: Sampling) -> None:
    assert open_model(str(mlx_folder(tmp_path / "m", **said))).sampling == sampling


# Ends


def test_a_folder_stops_at_the_ends_of_all_its_files(tmp_path: Path) -> None:
    folder = mlx_folder(tmp_path / "m", generation_config={"eos_token_id": TEXT_END}, config={"eos_token_id": START})
    assert open_model(str(folder)).stops == {END, TEXT_END, START}


# The system message


@pytest.mark.parametrize(
    ("template", "system"),
    [
        (CHATML, None),
        (f"<|im_start|>system\\n{QWEN25}<|im_end|>", QWEN25),
        ("<|im_start|> You are a helpful assistant.", "You are a helpful assistant."),
    ],
)
def test_the_default_system_message_is_the_template_s(tmp_path: Path, template: str, system: str | None) -> None:
    assert open_gguf(tmp_path, tokenizer__chat_template=template).default_system == system
    folder = mlx_folder(tmp_path / "m", tokenizer_config={"chat_template": template})
    assert open_model(str(folder)).default_system == system
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_model(str(folder)).default_system == system
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(template)
    assert open_model(str(folder)).default_system == system


def test_without_a_template_it_is_qwen2_s(tmp_path: Path) -> None:
    assert open_gguf(tmp_path).default_system == "You are a helpful assistant."
    assert open_model(str(mlx_folder(tmp_path / "m", tokenizer_config=None))).default_system == "You are a helpful assistant."


# What stands before plain text


@pytest.mark.parametrize(("bos", "add", "expected"), [(START, True, (START,)), (START, False, ()), (3, True, ())])
def test_the_first_token_of_plain_text_in_a_gguf(tmp_path: Path, bos: int, add: bool, expected: tuple[int, ...]) -> None:
    made = open_gguf(tmp_path, tokenizer__ggml__bos_token_id=bos, tokenizer__ggml__add_bos_token=add)
    assert made.bos == expected
    assert open_gguf(tmp_path, tokenizer__ggml__bos_token_id=bos).bos == ()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"add_bos_token": True, "bos_token": "<|im_start|>"}, (START,)),
        ({"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}, (START,)),
        ({"add_bos_token": False, "bos_token": "<|im_start|>"}, ()),
        ({"add_bos_token": True, "bos_token": None}, ()),
        ({"add_bos_token": True, "bos_token": [7]}, ()),
        ({"bos_token": "<|im_start|>"}, ()),
    ],
)
def test_the_first_token_of_plain_text_in_a_folder(tmp_path: Path, said: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert open_model(str(mlx_folder(tmp_path / "m", tokenizer_config=said))).bos == expected


def test_the_api_puts_both_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen2_local import Message, Qwen2, model

    opened = open_gguf(tmp_path, tokenizer__chat_template=QWEN25, tokenizer__ggml__bos_token_id=START, tokenizer__ggml__add_bos_token=True)
    backend: list[Scripted] = []

    def load(*_: object, **__: object) -> Scripted:
        backend.append(Scripted())
        return backend[0]

    monkeypatch.setattr(backends, "load", load)
    monkeypatch.setattr(model, "open_model", lambda name, **options: opened)
    with Qwen2("m") as loaded:
        loaded.complete("a", max_tokens=1).finish()
        assert backend[0].steps[0] == (0, (START, *opened.tokenizer.encode("a")))
        del backend[0].steps[:]
        loaded.respond([Message("user", "a")], max_tokens=1).finish()
        seen = [token for _, tokens in backend[0].steps for token in tokens]
    assert QWEN25 in opened.tokenizer.decode(seen)


# Memory


@pytest.mark.parametrize(("dtype", "widened"), [("BF16", 2), ("F16", 2), ("F32", 1)])
def test_mlx_without_a_gpu_needs_room_for_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, widened: int) -> None:
    folder = mlx_folder(tmp_path / "m", dtype=dtype)
    needed: list[int] = []
    for widens in (False, True):
        monkeypatch.setattr(fit, "MLX_WIDENS", widens)
        needed.append(open_model(str(folder), context=256).memory - fit.OVERHEAD)
    config = tiny_checkpoint.dense()
    kv = fit.kv_bytes(parse_config(config, folder / "config.json").kv_values_per_token, 256)
    assert (needed[1] - 2 * kv) == widened * (needed[0] - kv)


def test_a_gguf_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "machine_memory", lambda: fit.Memory(GB, GB // 10))
    with pytest.raises(DoesNotFit, match=r"m\.gguf needs"):
        open_gguf(tmp_path)


def machine(available: int) -> Any:
    return lambda: fit.Memory(64 * GB, available)


def test_a_context_that_is_asked_for_is_there_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=100_000))
    monkeypatch.setattr(fit, "machine_memory", machine(GB))
    plan = open_model(path, context=50_000).plan
    assert (plan.layout.context, plan.options.context, plan.options.yarn_context) == (50_000, 50_000, 0)
    with pytest.raises(UsageError, match=r"100,000"):
        open_model(path, context=100_001)


def test_without_a_wish_it_begins_small_and_may_grow_to_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=100_000))
    for available, begin, most in ((GB, 8192, 100_000), (fit.OVERHEAD + 6_000_000, 8192, None), (fit.OVERHEAD + 700_000, None, None)):
        monkeypatch.setattr(fit, "machine_memory", machine(available))
        opened = open_model(path)
        plan = opened.plan
        assert plan.layout.context <= plan.options.context
        assert begin is None or plan.layout.context == begin
        assert most is None or plan.options.context == most
        assert opened.memory <= available
        assert bool(opened.notes) == (plan.layout.context < 8192)
    assert f"{plan.layout.context:,} tokens, not for the usual 8,192" in opened.notes[0]


def test_force_skips_the_refusal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=10_000))
    monkeypatch.setattr(fit, "machine_memory", machine(1000))
    with pytest.raises(DoesNotFit):
        open_model(path)
    with pytest.raises(DoesNotFit):
        open_model(path, context=300)
    plan = open_model(path, force=True).plan
    assert (plan.layout.context, plan.options.context) == (8192, 10_000)
    with pytest.raises(UsageError):
        open_model(path, context=10_001, force=True)


def test_memory_that_something_else_will_take_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_gguf(tmp_path / "m.gguf"))
    monkeypatch.setattr(fit, "machine_memory", machine(GB))
    open_model(path)
    with pytest.raises(DoesNotFit):
        open_model(path, beside=GB)


def test_memory_for_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=1024))
    kv = fit.kv_bytes(2 * 2 * gguf_bytes.KV, 1024)
    monkeypatch.setattr(fit, "machine_memory", machine(GB))
    assert [open_model(path, parallel=count).kv_memory for count in (1, 3)] == [kv, 3 * kv]
    # What the weights leave is not enough for three: then it is all but a tenth of it.
    weights = open_model(path).memory - fit.OVERHEAD - kv
    monkeypatch.setattr(fit, "machine_memory", machine(fit.OVERHEAD + weights + 2 * kv))
    assert open_model(path, parallel=3).kv_memory == 2 * kv * 9 // 10


def test_kv_of_8_bits_is_about_half(tmp_path: Path) -> None:
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=4096))
    halves, plain = (open_model(path, kv_bits=bits, context=4096) for bits in (8, 16))
    assert halves.plan.options.kv_bits == 8
    kv = fit.kv_bytes(2 * 2 * gguf_bytes.KV, 4096)
    assert plain.memory - halves.memory == kv - kv * 17 // 32
    with pytest.raises(UsageError, match="16 or 8"):
        open_model(path, kv_bits=4)


# YaRN


def test_yarn_where_the_makers_announced_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "machine_memory", machine(GB))
    monkeypatch.setattr(loading, "yarn_context_of", lambda *shape, **kind: 131_072)
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=32_768))
    folder = str(mlx_folder(tmp_path / "m", config={"max_position_embeddings": 32_768}))
    for name in (path, folder):
        plain, long, short = (open_model(name, context=context).plan for context in (None, 60_000, 20_000))
        assert (plain.layout, plain.options.context, plain.options.yarn_context) == (Layout(1, 8192), 32_768, 131_072)
        assert (plain.options.yarn_factor, plain.options.yarn_original) == (4.0, 32_768)
        assert (long.layout, long.options.context, long.options.yarn_context, long.options.yarn_factor) == (Layout(1, 32_768), 32_768, 60_000, 4.0)
        assert (short.options.context, short.options.yarn_context, short.options.yarn_factor) == (20_000, 0, 0.0)


def test_a_model_that_says_yarn_itself_is_always_stretched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "yarn_context_of", lambda *shape, **kind: 131_072)
    said: dict[str, Any] = {
        "qwen2__rope__scaling__type": "yarn",
        "qwen2__rope__scaling__factor": 4.0,
        "qwen2__rope__scaling__original_context_length": 1024,
    }
    path = str(write_gguf(tmp_path / "m.gguf", qwen2__context_length=1024, **said))
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    folder = str(mlx_folder(tmp_path / "m", config={"max_position_embeddings": 1024, "rope_scaling": scaling}))
    for name in (path, folder):
        plan = open_model(name).plan
        assert (plan.layout, plan.options.context, plan.options.yarn_context, plan.options.yarn_factor) == (Layout(1, 4096), 4096, 0, 0.0)


# The same weights?


def test_a_bare_file_is_known_by_its_place_size_and_age(tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        return open_model(str(path)).plan.options.identity

    path = write_gguf(tmp_path / "m.gguf")
    first = identity(path)
    assert identity(path) == first
    os.utime(path, ns=(1, 1))
    second = identity(path)
    copy = tmp_path / "n.gguf"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(1, 1))
    assert len({first, second, identity(copy)}) == 3


def test_a_conversion_is_known_by_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(name: str) -> str:
        return open_model(name).plan.options.identity

    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    config = tiny_checkpoint.dense()
    folder = tiny_checkpoint.write(tmp_path / "m", config, random_qwen2.weights(config, 1))
    first = identity(str(folder))
    for made in (tmp_path / "home" / "cache" / "converted").glob("*.gguf"):
        os.utime(made, ns=(1, 1))
    assert identity(str(folder)) == first
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identity(str(folder)) != first


def test_a_file_that_changed_since_it_was_checked_is_not_loaded(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    opened = open_model(str(path))
    path.write_bytes(path.read_bytes() + bytes(32))
    with pytest.raises(BadFile, match="has changed since"):
        opened.plan.load()


# Links


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_links_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = mlx_folder(tmp_path / "m")
    outside = tmp_path / name
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"x")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(BadFile, match="link out of its folder"):
        open_model(str(folder))


def test_a_hugging_face_cache_is_opened_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mlx_folder(tmp_path / "models--x" / "snapshots" / "abc")
    (tmp_path / "models--x" / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "models--x" / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    monkeypatch.chdir(folder)
    assert open_model(".").sampling == SAMPLED
