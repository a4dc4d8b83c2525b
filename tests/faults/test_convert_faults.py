"""Conversions that are killed, run out of disk, are stopped, or start from damaged and hostile folders."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen2_converters import blocks, gguf, job, making, mlx
from qwen2_converters.convert import Progress, check, convert
from qwen2_converters.install import install
from qwen2_converters.target import Target
from qwen2_local import files
from qwen2_local.errors import BadFile, DoesNotFit, UnsupportedModel, UsageError
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.gguf import read_gguf
from qwen2_local.store import Store
from tests.support import tiny_checkpoint

TARGETS = [Target("gguf", "q4_0"), Target("mlx", "4bit")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_checkpoint.dense()
    return tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config), shards=2)


def hexdump(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_in_the_middle(source: Path, target: Target, output: Path, *, overwrite: bool = False) -> int:
    """Ends a conversion as Ctrl-C does; after how many bytes."""
    done = 0

    def stop(progress: Progress) -> None:
        nonlocal done
        if progress.done > progress.total / 2:
            done = progress.done
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, output, progress=stop, overwrite=overwrite)
    return done


def same(one: Path, other: Path) -> bool:
    return (hexdump(one) == hexdump(other)) if one.is_dir() else one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_an_output_that_exists_is_kept(source: Path, target: Target, tmp_path: Path) -> None:
    output = convert(source, target, tmp_path / "out")
    before = hexdump(tmp_path)
    with pytest.raises(UsageError, match="exists"):
        convert(source, target, output)
    assert hexdump(tmp_path) == before
    convert(source, target, output, overwrite=True)
    assert hexdump(tmp_path) == before


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_an_output_that_appears_meanwhile_is_kept_and_so_is_the_work(source: Path, target: Target, tmp_path: Path) -> None:
    wanted = convert(source, target, tmp_path / "wanted")
    output = tmp_path / "out"

    def meddle(progress: Progress) -> None:
        if progress.phase == "publishing":
            output.write_text("mine")

    with pytest.raises(UsageError, match="exists"):
        convert(source, target, output, progress=meddle)
    assert output.read_text() == "mine"
    output.unlink()
    phases: list[str] = []
    convert(source, target, output, progress=lambda progress: phases.append(progress.phase))
    assert phases == ["checking", "publishing"]
    assert same(output, wanted)
    assert names(tmp_path) == ["hf", "out", "wanted"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stopped_conversion_changes_nothing_and_goes_on(source: Path, target: Target, overwrite: bool, tmp_path: Path) -> None:
    wanted = convert(source, target, tmp_path / "wanted")
    output = tmp_path / "out"
    if overwrite:
        convert(source, Target(target.format, "f32"), output)
    before = hexdump(tmp_path)
    stopped_at = stop_in_the_middle(source, target, output, overwrite=overwrite)
    assert {name: content for name, content in hexdump(tmp_path).items() if not name.startswith(".qwen2-partial-out/")} == before
    assert output.exists() == overwrite
    seen: list[Progress] = []
    convert(source, target, output, overwrite=overwrite, progress=seen.append)
    started_at = next(progress.done for progress in seen if progress.phase == "converting")
    assert stopped_at / 2 < started_at < seen[-1].total
    assert same(output, wanted)
    assert names(tmp_path) == ["hf", "out", "wanted"]


@pytest.mark.parametrize("name", ["notes.txt", "sub", "model.gguf", "modeling_qwen2.py", "manifest.json"])
def test_a_folder_with_other_files_is_never_replaced(source: Path, name: str, tmp_path: Path) -> None:
    output = convert(source, TARGETS[1], tmp_path / "out")
    if name == "sub":
        (output / name).mkdir()
    else:
        (output / name).write_text("mine")
    before = hexdump(tmp_path)
    with pytest.raises(UsageError, match=name):
        convert(source, TARGETS[1], output, overwrite=True)
    assert hexdump(tmp_path) == before


def test_an_original_checkpoint_or_a_damaged_model_is_never_replaced(source: Path, tmp_path: Path) -> None:
    config = tiny_checkpoint.dense()
    other = tiny_checkpoint.write(tmp_path / "other", config, tiny_checkpoint.weights(config))
    before = hexdump(tmp_path)
    with pytest.raises(UsageError, match="original checkpoint"):
        convert(source, TARGETS[1], other, overwrite=True)
    (other / "config.json").unlink()
    with pytest.raises(UsageError, match="no whole MLX model"):
        convert(source, TARGETS[1], other, overwrite=True)
    del before["other/config.json"]
    assert hexdump(tmp_path) == before


def test_a_folder_that_gets_other_files_meanwhile_is_kept(source: Path, tmp_path: Path) -> None:
    output = convert(source, TARGETS[1], tmp_path / "out")

    def meddle(progress: Progress) -> None:
        if progress.phase == "publishing":
            (output / "mine").write_text("mine")

    with pytest.raises(UsageError, match="mine"):
        convert(source, TARGETS[1], output, progress=meddle, overwrite=True)
    (output / "mine").unlink()
    convert(source, TARGETS[1], output, overwrite=True)
    assert names(tmp_path) == ["hf", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("output", ["hf", "hf/out", "hf/model-00001-of-00002.safetensors", ".", "out/../hf", "link", "link/out", "hf/link"])
def test_an_output_in_or_around_the_source_is_refused(source: Path, target: Target, output: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("hf")
    (source / "link").symlink_to("../out")
    before = hexdump(tmp_path)
    with pytest.raises(UsageError, match="lies in the source"):
        convert(source, target, tmp_path / output, overwrite=overwrite)
    assert hexdump(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_of_the_wrong_kind_is_refused_at_once(source: Path, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")

    def never(_: Progress) -> None:
        pytest.fail("it was begun")

    for target, name, says in (
        (TARGETS[0], "folder", "folder is a folder"),
        (TARGETS[0], "pipe", "pipe is no plain file"),
        (TARGETS[1], "file", "file is a file"),
        (TARGETS[0], "none/x.gguf", "none is no folder"),
        (TARGETS[1], "file/x", "file is no folder"),
    ):
        with pytest.raises(UsageError, match=says):
            convert(source, target, tmp_path / name, overwrite=overwrite, progress=never)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "hf", "pipe"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_what_a_crash_left_beside_the_output_is_swept(source: Path, target: Target, tmp_path: Path) -> None:
    (tmp_path / ".qwen2-0123456789abcdef").mkdir()
    (tmp_path / ".qwen2-0123456789abcdee").write_text("half")
    (tmp_path / ".qwen2-mine").write_text("mine")
    convert(source, target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".qwen2-mine", "hf", "out"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", '{"do_sample": true, "top_k": -1}'),
        ("generation_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer.json", "{}"),
    ],
)
def test_bad_companions_are_refused_before_anything_is_written(source: Path, target: Target, name: str, content: str, tmp_path: Path) -> None:
    (source / name).write_text(content)

    def never(_: Progress) -> None:
        pytest.fail("it was begun")

    with pytest.raises(BadFile, match=name):
        convert(source, target, tmp_path / "out", progress=never)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_progress_adds_up(source: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        _, plan = check(source, target)
        seen: list[Progress] = []
        convert(source, target, tmp_path / target.label, progress=seen.append)
        assert [seen[0].phase, seen[-1].phase] == ["checking", "publishing"]
        assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
        assert seen[-2].done == seen[-1].done == plan.nbytes == seen[0].total
        assert seen[-2].tensor


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_what_is_half_made_is_no_model(source: Path, target: Target, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()

    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(source, target, Store(folder), "tiny", progress=stop)
    assert names(folder) == [".qwen2-partial-tiny", ".tiny.lock"]
    store = Store(folder)
    assert store.list() == []
    manifest = install(source, target, store, "tiny")
    assert store.get("tiny").manifest == manifest
    assert names(folder) == [".tiny.lock", "tiny"]


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors of GGUF files that are quantized from now on."""
    seen: list[str] = []
    plain = gguf._encode

    def encode(block: job.Block, raw: job.Buffer, **rest: Any) -> list[job.Buffer]:
        seen.append(block.tensor.parts[0].name)
        return plain(block, raw, **rest)

    monkeypatch.setattr(gguf, "_encode", encode)
    return seen


def test_no_finished_tensor_is_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = encoded(monkeypatch)
    stop_in_the_middle(source, TARGETS[0], tmp_path / "out")
    first = seen.copy()
    seen.clear()
    convert(source, TARGETS[0], tmp_path / "out")
    # What was under way when it was stopped may be done twice, one block for each thread and those that waited.
    assert len(set(first) & set(seen)) <= 3 * making.cpu.cores() + 1
    assert set(first) | set(seen) == set(read_gguf(tmp_path / "out").tensors)


def touch(source: Path) -> None:
    os.utime(source / "model-00001-of-00002.safetensors", ns=(1, 1))


def retarget(source: Path) -> None:
    (source / "generation_config.json").unlink()  # a part of the header


@pytest.mark.parametrize("change", [touch, retarget])
def test_another_source_starts_over(source: Path, change: Callable[[Path], None], tmp_path: Path) -> None:
    stop_in_the_middle(source, TARGETS[0], tmp_path / "out")
    change(source)
    wanted = convert(source, TARGETS[0], tmp_path / "wanted")
    seen: list[Progress] = []
    convert(source, TARGETS[0], tmp_path / "out", progress=seen.append)
    assert len([progress for progress in seen if progress.phase == "converting"]) == len(read_gguf(wanted).tensors)
    assert same(tmp_path / "out", wanted)


def test_another_target_of_the_same_name_starts_over(source: Path, tmp_path: Path) -> None:
    stop_in_the_middle(source, TARGETS[0], tmp_path / "out")
    for target in (TARGETS[1], Target("gguf", "f16")):
        wanted = convert(source, target, tmp_path / target.label)
        assert same(convert(source, target, tmp_path / "out"), wanted)
        (tmp_path / "out").rename(tmp_path / f"{target.label}-done")


@pytest.mark.parametrize("damage", ["journal", "torn", "data", "shorter", "foreign", "numbers"])
def test_damaged_staging_is_never_trusted(source: Path, damage: str, tmp_path: Path) -> None:
    wanted = convert(source, TARGETS[0], tmp_path / "wanted")
    stop_in_the_middle(source, TARGETS[0], tmp_path / "out")
    folder = tmp_path / ".qwen2-partial-out"
    journal, data = folder / "journal", folder / "made" / "model.gguf"
    match damage:
        case "journal":
            journal.unlink()
            data.write_bytes(bytes(data.stat().st_size))
        case "torn":  # a line without its checksum is none
            raw = journal.read_bytes()
            journal.write_bytes(raw.split(b"\n")[0] + b"\n" + b"00000000 0 1 2 3\n" + b"\xff\n")
            data.write_bytes(bytes(data.stat().st_size))
        case "data":
            data.unlink()
        case "shorter":
            os.truncate(data, 100)
        case "foreign":
            journal.write_text("not ours\n" * 1000)
            data.write_bytes(bytes(data.stat().st_size))
        case "numbers":
            text = " ".join(str(number) for number in range(10**6, 10**6 + 50))
            with journal.open("a") as file:
                file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
    assert same(convert(source, TARGETS[0], tmp_path / "out"), wanted)
    assert names(tmp_path) == ["hf", "out", "wanted"]


def test_one_process_at_a_time(source: Path, tmp_path: Path) -> None:
    stop_in_the_middle(source, TARGETS[0], tmp_path / "out")

    def other(_: Progress) -> None:
        with pytest.raises(UsageError, match=f"out is in use by process {os.getpid()}"):
            convert(source, TARGETS[0], tmp_path / "out")
        old = time.time() - 30 * 86400
        for path in (tmp_path / ".qwen2-partial-out").iterdir():
            os.utime(path, (old, old))
        os.utime(tmp_path / ".qwen2-partial-out", (old, old))
        assert files.sweep(tmp_path) == 0

    convert(source, TARGETS[0], tmp_path / "out", progress=lambda p: other(p) if p.phase == "converting" else None)
    assert names(tmp_path) == ["hf", "out"]


def test_work_that_nobody_goes_on_with_is_swept(source: Path, tmp_path: Path) -> None:
    stop_in_the_middle(source, TARGETS[0], tmp_path / "out")
    assert files.sweep(tmp_path) == 0
    old = time.time() - 8 * 86400
    for path in (tmp_path / ".qwen2-partial-out", *(tmp_path / ".qwen2-partial-out").iterdir()):
        os.utime(path, (old, old))
    convert(source, TARGETS[1], tmp_path / "other")
    assert names(tmp_path) == ["hf", "other"]


@pytest.mark.parametrize("what", ["link", "file"])
def test_a_staging_place_that_is_not_ours_is_left_alone(source: Path, what: str, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    place = tmp_path / ".qwen2-partial-out"
    if what == "link":
        place.symlink_to("victim")
    else:
        place.write_text("mine")
    with pytest.raises(UsageError, match="in the way"):
        convert(source, TARGETS[0], tmp_path / "out")
    assert os.path.lexists(place)
    assert list((tmp_path / "victim").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = sys.platform == "linux" and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("target", [Target("gguf", "f16"), Target("mlx", "bf16")], ids=str)
def test_a_full_disk(source: Path, target: Target, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight is switched off: somebody else filled the disk meanwhile."""
    with pytest.raises(DoesNotFit, match="are needed"):
        convert(source, target, small_disk / "out")
    monkeypatch.setattr(files, "require_free", lambda *_: None)
    with pytest.raises(DoesNotFit, match="are needed"):
        convert(source, target, small_disk / "out")
    assert list(small_disk.iterdir()) == []
    (small_disk / "store").mkdir()
    store = Store(small_disk / "store")
    with pytest.raises(DoesNotFit, match="are needed"):
        install(source, target, store, "tiny")
    assert store.list() == []


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_full_disk_without_one(source: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hexdump(tmp_path)
    plain = os.pwrite
    calls = iter(range(1000))

    def pwrite(handle: int, data: bytes, offset: int) -> int:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(handle, data, offset)

    monkeypatch.setattr(blocks.os, "pwrite", pwrite)
    with pytest.raises(DoesNotFit):
        convert(source, target, tmp_path / "out")
    assert hexdump(tmp_path) == before


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_truncated_shard(source: Path, target: Target, tmp_path: Path) -> None:
    shard = source / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(BadFile, match=r"model-00002-of-00002\.safetensors.*truncated"):
        convert(source, target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_shard_that_shrinks_while_it_is_read(source: Path, target: Target, tmp_path: Path) -> None:
    def shrink(progress: Progress) -> None:
        if progress.phase == "checking":
            os.truncate(source / "model-00001-of-00002.safetensors", 5000)

    with pytest.raises(BadFile, match="became shorter"):
        convert(source, target, tmp_path / "out", progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_shard_that_is_replaced_while_others_are_read(source: Path, target: Target, tmp_path: Path) -> None:
    """Its header and size are the same: without care half of one model would be published with half of another."""
    config = tiny_checkpoint.dense()
    other = tiny_checkpoint.write(tmp_path / "other", config, tiny_checkpoint.weights(config, seed=2), shards=2)

    def replace(progress: Progress) -> None:
        if progress.phase == "converting" and (other / "model-00002-of-00002.safetensors").exists():
            (other / "model-00002-of-00002.safetensors").replace(source / "model-00002-of-00002.safetensors")

    with pytest.raises(BadFile, match="changed while it was converted"):
        convert(source, target, tmp_path / "out", progress=replace)
    assert names(tmp_path) == ["hf", "other"]
    convert(source, target, tmp_path / "out")


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers(source: Path, target: Target, bits: int, tensor: str, tmp_path: Path) -> None:
    located = open_checkpoint(source).tensors[tensor]
    with located.file.open("r+b") as file:
        file.seek(located.entry.begin + 20)
        file.write(struct.pack("<H", bits))
    with pytest.raises(BadFile, match="no finite numbers"):
        convert(source, target, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_too_large_for_16_bits(tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(torch_dtype="float16")
    weights = tiny_checkpoint.weights(config, "F32")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = -7e4
    source = tiny_checkpoint.write(tmp_path / "hf", config, weights, dtype="F32")
    for target in (*TARGETS, Target("gguf", "f16")):
        with pytest.raises(BadFile, match="too large"):
            convert(source, target, tmp_path / "out")
    for target in (Target("gguf", "f32"), Target("mlx", "bf16")):
        convert(source, target, tmp_path / target.label)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_code_and_pickles_are_never_copied(source: Path, target: Target, tmp_path: Path) -> None:
    for name in ("modeling_qwen2.py", "pytorch_model.bin", "setup.py", "evil.pt", ".bashrc", "tokenizer.py"):
        (source / name).write_text("import os")
    (source / "nested").mkdir()
    (source / "nested" / "x.py").write_text("import os")
    output = convert(source, target, tmp_path / "out")
    if target.format == "mlx":
        assert {path.name for path in output.iterdir()} == {
            "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip


def test_names_and_templates_that_are_no_valid_text(tmp_path: Path) -> None:
    """A folder named in another encoding, and half a surrogate pair in a stranger's JSON: a GGUF file gets question marks."""
    config = tiny_checkpoint.dense()
    source = tiny_checkpoint.write(Path(f"{tmp_path}/caf\udce9"), config, tiny_checkpoint.weights(config))
    (source / "tokenizer_config.json").write_text('{"chat_template": "a\\ud800b"}')
    keys = read_gguf(convert(source, TARGETS[0], tmp_path / "out.gguf")).keys
    assert (keys["general.name"], keys["tokenizer.chat_template"]) == ("caf?", "a?b")


def test_a_large_companion_is_copied_in_pieces(source: Path, tmp_path: Path) -> None:
    with (source / "LICENSE").open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    convert(source, TARGETS[1], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "LICENSE").stat().st_size == 64 << 20
    assert peak < 32e6


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_links_out_of_the_folder_are_refused(source: Path, target: Target, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (source / "tokenizer_config.json").unlink()
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(BadFile, match="link out of its folder"):
        convert(source, target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "secret"]


def test_the_hubs_cache_of_links_is_read(source: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--Qwen--Qwen2-Tiny"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(source.iterdir()):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    made = convert(snapshot, TARGETS[0], tmp_path / "out.gguf")
    assert read_gguf(made).keys["general.name"] == "Qwen2-Tiny"
    assert not [path for path in convert(snapshot, TARGETS[1], tmp_path / "mlx").iterdir() if path.is_symlink()]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_tokenizer_that_does_not_belong(source: Path, target: Target, tmp_path: Path) -> None:
    config = tiny_checkpoint.dense(vocab_size=200)
    small = tiny_checkpoint.write(tmp_path / "small", config, tiny_checkpoint.weights(config))
    with pytest.raises(BadFile, match="tokens"):
        convert(small, target, tmp_path / "out")
    (source / "tokenizer.json").unlink()
    with pytest.raises(BadFile, match="tokenizer"):
        convert(source, target, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "small"]


def test_repeated_conversions_are_alike(source: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        assert same(convert(source, target, tmp_path / f"1-{target.label}"), convert(source, target, tmp_path / f"2-{target.label}"))


def test_blocks_of_any_size_and_many_threads_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_checkpoint.moe()
    source = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.fused(tiny_checkpoint.weights(config)))
    plain = [convert(source, target, tmp_path / target.label) for target in TARGETS]
    monkeypatch.setattr(gguf, "_BLOCK", 1000)
    monkeypatch.setattr(mlx, "_BLOCK", 1000)
    monkeypatch.setattr(making.cpu, "cores", lambda: 5)
    for target, wanted in zip(TARGETS, plain, strict=True):
        assert same(convert(source, target, tmp_path / f"{target.label}-small"), wanted)


def test_an_error_stops_the_other_threads_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []

    def work(block: int) -> None:
        if block == 3:
            raise BadFile("bad")
        time.sleep(0.001)
        done.append(block)

    with pytest.raises(BadFile):
        list(blocks._each(work, range(10_000), 4))
    assert len(done) < 40


def test_a_quantized_or_foreign_source_is_refused(source: Path, tmp_path: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"torch_dtype"', '"quantization_config": {"quant_method": "fp8"}, "torch_dtype"'))
    with pytest.raises(UnsupportedModel, match="fp8"):
        convert(source, TARGETS[0], tmp_path / "out")


@pytest.mark.parametrize("target", [Target("gguf", "q8_0"), Target("mlx", "8bit")], ids=str)
def test_memory_is_bounded_by_the_block(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 32 MB goes through two threads' blocks of 4 MB, and 1 MB of 8-bit codes each."""
    config = tiny_checkpoint.dense(num_hidden_layers=1, vocab_size=1 << 16, torch_dtype="float32")
    source = tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.weights(config, "F32"), dtype="F32")
    monkeypatch.setattr(gguf if target.format == "gguf" else mlx, "_BLOCK", 1 << 20)
    monkeypatch.setattr(making.cpu, "cores", lambda: 2)
    peaks: list[int] = []

    def note(_: Progress) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    tracemalloc.start()
    convert(source, target, tmp_path / "out", progress=note)
    tracemalloc.stop()
    # The first two cover the tokenizer, too.
    assert 5e6 < max(peaks[2:]) < 24e6
