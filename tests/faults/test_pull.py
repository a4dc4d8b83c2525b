"""What goes wrong between a hub and the store: every fault has a typed error, and nothing half-made is ever a model."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qwen2_converters.fetching import AHEAD, is_stub
from qwen2_converters.hub import sources
from qwen2_converters.pull import carry_out, prepare, pull
from qwen2_converters.pull_step import Step
from qwen2_converters.target import Target
from qwen2_local import files
from qwen2_local.cli import pull as cli
from qwen2_local.errors import BadFile, DoesNotFit, FetchFailed, Offline, UnknownModel, UnsupportedModel, UsageError
from qwen2_local.store import Store
from tests.support import gguf_bytes, tiny_checkpoint
from tests.support.hub_server import HTML, HubServer, git_blob_id
from tests.support.program import command, run
from tests.support.pulling import APACHE

TUNE = "some/tune"
TO = [Target.parse("gguf:q8_0")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Both hubs, with a GGUF model and a checkpoint of five shards; an empty home and Hugging Face cache."""
    with HubServer() as server:
        for name, value in (("QWEN2_LOCAL_HOME", tmp_path / "home"), ("HF_HOME", tmp_path / "hf")):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        config = tiny_checkpoint.dense()
        folder = tiny_checkpoint.write(tmp_path / "made", config, tiny_checkpoint.weights(config), shards=5)
        server.add(TUNE, {path.name: path.read_bytes() for path in folder.iterdir()}, card=APACHE)
        server.add(f"{TUNE}-GGUF", {"tune-q8_0.gguf": gguf_bytes.model().build()}, card=APACHE)
        yield server


def cache(tmp_path: Path, hub: HubServer, id: str) -> Path:
    """The repository as huggingface_hub keeps it; gives its folder of blobs."""
    repo, folder = hub.repos[id], tmp_path / "hf" / "hub" / f"models--{id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(repo.commit)
    (folder / "blobs").mkdir()
    (folder / "snapshots" / repo.commit).mkdir(parents=True)
    for name, data in repo.files.items():
        digest = hashlib.sha256(data).hexdigest() if name.endswith((".safetensors", ".gguf")) else git_blob_id(data)
        (folder / "blobs" / digest).write_bytes(data)
        (folder / "snapshots" / repo.commit / name).symlink_to(f"../../blobs/{digest}")
    return folder / "blobs"


def nothing_is_there() -> bool:
    store = Store()
    return store.list() == [] and not [path for path in store.folder.iterdir() if not path.name.startswith(".")]


# Listings


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("name", ["../../outside.gguf", "/etc/passwd", "a\\b.gguf", "con.gguf"])
def test_one_hostile_name_and_nothing_is_fetched(hub, source, name):
    def edit(listing):
        listing.append({**listing[0], "rfilename": name, "Path": name})

    hub.repos[f"{TUNE}-GGUF"].edit = edit
    with pytest.raises(BadFile, match="is refused"):
        prepare(f"{TUNE}-GGUF", source=source)
    assert hub.sent("tune-q8_0.gguf") == 0 and nothing_is_there()


def test_a_listing_that_lies_about_a_size_ends_at_the_size(hub):
    hub.repos[f"{TUNE}-GGUF"].edit = lambda listing: listing[0]["lfs"].update(size=100) if "lfs" in listing[0] else None
    with pytest.raises((BadFile, FetchFailed)):
        pull(f"{TUNE}-GGUF")
    assert nothing_is_there()


def test_a_licence_cannot_steer_the_terminal(hub, monkeypatch, capsys):
    hub.add("some/evil", hub.repos[TUNE].files, card={"license": "other", "license_name": "\x1b[31m\u009b31mred\nfree"})
    plan = prepare("some/evil", original=True)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr(cli.click, "confirm", lambda text, **_: asked.append(text))
    with pytest.raises(click.Abort):
        cli._require_consent(plan, yes=False, accepted=False)
    cli._print_object(plan, "planned")
    assert "[31m31mred free: " in asked[0]
    assert not {"\x1b", "\u009b"} & {*asked[0], *capsys.readouterr().out}


def test_what_is_not_there(hub):
    for name in ("some/nothing", "nobody/tune"):
        with pytest.raises(UnknownModel, match=name):
            prepare(name)
    with pytest.raises(UnknownModel, match="revision"):
        prepare(TUNE, revision="v9")
    with pytest.raises(UnknownModel, match="ModelScope"):
        prepare("some/nothing", source="modelscope")


def test_what_may_not_be_read(hub, monkeypatch):
    hub.repos[TUNE].token = "hf_secret"
    with pytest.raises(UnknownModel, match="may be read") as caught:
        prepare(TUNE)
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(FetchFailed, match="token") as caught:
        prepare(TUNE)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert prepare(TUNE).fetch
    hub.repos[TUNE].gated = True
    with pytest.raises(FetchFailed, match="asked for access"):
        prepare(TUNE)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, monkeypatch):
    hub.repos[f"{TUNE}-GGUF"].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(f"{TUNE}-GGUF")
    assert all(one.headers.get("authorization") == "Bearer hf_secret" for one in hub.log if one.host == "hub")
    assert [one for one in hub.log if one.host == "cdn"] and not any("authorization" in one.headers for one in hub.log if one.host == "cdn")


def test_a_model_of_another_architecture_is_refused_before_it_is_fetched(hub):
    foreign = gguf_bytes.model()
    foreign.keys["general.architecture"] = gguf_bytes.key("general.architecture", gguf_bytes.STRING, "llama")
    foreign.tensors["blk.0.attn_q.weight"] = (32, 100_000)
    hub.add("some/llama-GGUF", {"llama-q8_0.gguf": foreign.build()})
    with pytest.raises(UnsupportedModel, match="architecture 'llama'"):
        prepare("some/llama-GGUF")
    hub.add("some/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x", "tokenizer.json": b"{}"})
    with pytest.raises(UnsupportedModel, match="llama"):
        prepare("some/llama")
    assert hub.sent("llama-q8_0.gguf") <= 1 << 20 and hub.sent("model.safetensors") == 0


# The network


def test_offline_says_what_can_be_done(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Offline, match="HF_HUB_OFFLINE") as caught:
        prepare(TUNE)
    assert "cache" in caught.value.hint and hub.log == []
    done = run("pull", "7b")
    assert done.returncode == 6 and "HF_HUB_OFFLINE" in done.stderr


def test_nobody_answers(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Offline, match="cannot be reached"):
        prepare(TUNE)


@pytest.mark.parametrize("offline", [True, False])
def test_what_is_in_the_hugging_face_cache_is_not_fetched_again(hub, tmp_path, monkeypatch, offline):
    cache(tmp_path, hub, TUNE)
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = prepare(TUNE, targets=TO, original=True)
    assert plan.fetch == 0
    assert [manifest.name for manifest in carry_out(plan)] == ["tune:original", "tune:q8_0"]
    assert Store().get("tune:original").manifest.revision == hub.repos[TUNE].commit
    assert not [one for one in hub.log if "/resolve/" in one.path]
    assert not (offline and hub.log)


def test_a_damaged_cache_is_not_believed(hub, tmp_path, monkeypatch):
    blobs = cache(tmp_path, hub, TUNE)
    weights = hub.repos[TUNE].files["model-00002-of-00005.safetensors"]
    blob = blobs / hashlib.sha256(weights).hexdigest()
    blob.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    pull(TUNE, original=True)
    assert hub.sent("model-00002-of-00005.safetensors") == len(weights)
    assert hub.sent("model-00001-of-00005.safetensors") == 0
    assert files.sha256(Store().get("tune:original").folder / "model-00002-of-00005.safetensors") == blob.name
    Store().remove("tune:original")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Offline, match="not in the Hugging Face cache"):
        pull(TUNE, original=True)
    assert nothing_is_there()


def test_a_link_out_of_the_cache_is_no_file_of_it(hub, tmp_path, monkeypatch):
    blobs = cache(tmp_path, hub, TUNE)
    (tmp_path / "secret").write_bytes(b"secret")
    (blobs.parent / "snapshots" / hub.repos[TUNE].commit / "LICENSE").symlink_to(tmp_path / "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "LICENSE" not in {file.path for file in prepare(TUNE, original=True).way.files}


def test_a_sibling_that_cannot_be_asked_is_not_passed_over(hub, monkeypatch):
    """Else the original, three times as large, would be fetched because the GGUF's listing hiccuped."""
    look = sources.look

    def hiccup(source, id, revision=""):
        if id.endswith("-GGUF"):
            raise FetchFailed("a hiccup", hint="Try again.")
        return look("huggingface", TUNE, revision)

    monkeypatch.setattr(sources, "look", hiccup)
    with pytest.raises(FetchFailed, match="hiccup"):
        prepare("0.5b")


# Bytes


def test_wrong_bytes_are_never_a_model(hub):
    hub.fault("tune-q8_0.gguf", times=99, wrong_byte=600)
    with pytest.raises(BadFile, match="tune-q8_0"):
        pull(f"{TUNE}-GGUF")
    assert nothing_is_there()


def test_a_web_page_is_no_model(hub):
    hub.plain["page-q8_0.gguf"] = HTML
    with pytest.raises(BadFile, match="HTML"):
        pull(hub.url("page-q8_0.gguf"))
    assert nothing_is_there()


def test_right_bytes_of_a_bad_model_are_not_kept(hub):
    hub.add("some/bad", hub.repos[TUNE].files | {"model-00001-of-00005.safetensors": b"\x08\0\0\0\0\0\0\0{}      "})
    with pytest.raises(BadFile):
        pull("some/bad", original=True)
    assert nothing_is_there() and not Store().unfinished("bad:original").exists()


def test_too_little_disk_is_said_before_the_first_byte(hub, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 10_000)
    plan = prepare(TUNE, original=True)
    with pytest.raises(DoesNotFit, match="are needed"):
        carry_out(plan)
    assert not [one for one in hub.log if one.name.endswith(".safetensors")] and nothing_is_there()


# Stopped, killed, and taken up again


def expected(hub: HubServer, tmp_path: Path) -> str:
    """The hash of what an undisturbed pull makes."""
    store = Store(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    return pull(TUNE, targets=TO, store=store)[0].files[0].sha256


def test_a_pull_that_is_killed_goes_on(hub, tmp_path):
    right = expected(hub, tmp_path)
    weights = {name: len(data) for name, data in hub.repos[TUNE].files.items() if name.endswith(".safetensors")}
    hub.log.clear()
    hub.fault("model-00003-of-00005.safetensors", on="cdn")  # the look at its header
    hub.fault("model-00003-of-00005.safetensors", on="cdn", stall_after=2000)
    process = subprocess.Popen(command("pull", TUNE, "--to", "gguf:q8_0"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    # Two shards are there and a third hangs.
    while hub.sent("model-00002-of-00005.safetensors") <= weights["model-00002-of-00005.safetensors"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Store().list() == []
    hub.faults.clear()
    done = run("pull", TUNE, "--to", "gguf:q8_0")
    assert done.returncode == 0, done.stderr
    assert Store().get("tune:q8_0").manifest.files[0].sha256 == right
    assert [path.name for path in Store().folder.iterdir() if path.name.startswith(".qwen2-")] == []


def test_what_is_converted_already_needs_no_disk_again(hub, monkeypatch):
    """Else a pull that fitted would not go on after a crash."""

    def stop(step: Step) -> None:
        if step.phase == "converting" and step.done > step.total / 2:
            raise KeyboardInterrupt

    first = prepare(TUNE, targets=TO, discard_source=True)
    with pytest.raises(KeyboardInterrupt):
        carry_out(first, progress=stop)
    kept = first.store.kept("tune:q8_0")
    second = prepare(TUNE, targets=TO, discard_source=True)
    assert kept > 0 and second.disk <= first.disk - kept
    monkeypatch.setattr(files, "free_bytes", lambda path: first.disk - kept)
    assert carry_out(second)


def test_ctrl_c_says_what_is_kept(hub):
    name = stalling(hub)
    process = subprocess.Popen(command("pull", name, "--yes"), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    waiting = threading.Timer(60, process.kill)
    waiting.start()
    part = Store().unfinished("big:q8_0") / "big-q8_0.gguf.part"
    while process.poll() is None and not (part.is_file() and part.stat().st_size >= 1_000_000):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    waiting.cancel()
    assert process.returncode == 130
    assert "the same command goes on" in stderr and "kept" in stderr
    assert Store().kept("big:q8_0") >= 1_000_000
    before = hub.sent("big-q8_0.gguf")
    assert run("pull", "some/big-GGUF").returncode == 0
    size = len(hub.repos["some/big-GGUF"].files["big-q8_0.gguf"])
    assert hub.sent("big-q8_0.gguf") - before <= size - 1_000_000 + (1 << 20), "what was kept came again"


def test_what_was_begun_can_be_given_up(hub):
    plan = prepare(f"{TUNE}-GGUF")
    with pytest.raises(KeyboardInterrupt), Store().resume("tune:q8_0") as draft:
        part = draft.folder / "tune-q8_0.gguf.part"
        part.write_bytes(b"x" * 5000)
        raise KeyboardInterrupt
    assert plan.kept() >= 5000
    assert run("rm", "tune:q8_0").returncode == 2
    done = run("rm", "tune:q8_0", "--yes")
    assert done.returncode == 0 and "what was begun of tune:q8_0" in done.stderr
    assert not part.exists() and Store().kept("tune:q8_0") == 0
    assert run("rm", "tune:q8_0", "--yes").returncode == 2


def stalling(hub: HubServer) -> str:
    """A model of some megabytes that stalls in the middle."""
    made = gguf_bytes.model()
    for layer in range(2):
        for name in ("ffn_gate", "ffn_up"):
            made.tensors[f"blk.{layer}.{name}.weight"] = (32, 20_000)
        made.tensors[f"blk.{layer}.ffn_down.weight"] = (20_000, 32)
    made.keys["feed_forward_length"] = gguf_bytes.key("qwen2.feed_forward_length", gguf_bytes.U32, 20_000)
    hub.add("some/big-GGUF", {"big-q8_0.gguf": made.build()})
    hub.fault("big-q8_0.gguf", on="cdn")  # the look at the header
    hub.fault("big-q8_0.gguf", on="cdn", stall_after=2_000_000)
    return "some/big-GGUF"


def test_two_pulls_of_one_model(hub):
    plan = prepare(TUNE, original=True)
    with plan.store.resume(plan.draft), pytest.raises(UsageError, match="in use by process"):
        carry_out(plan)


def test_a_discarded_source_never_holds_more_than_a_few_shards(hub, tmp_path):
    right = expected(hub, tmp_path)
    plan = prepare(TUNE, targets=TO, discard_source=True)
    source = plan.store.unfinished(plan.draft)
    most = 0

    def look(_: object) -> None:
        nonlocal most
        whole = [path for path in source.glob("*.safetensors") if path.stat().st_size > 40_960 and not is_stub(path)]
        most = max(most, len(whole))

    assert carry_out(plan, progress=look)[0].files[0].sha256 == right
    assert most <= AHEAD + 1


def test_an_original_that_is_kept_is_not_discarded(hub):
    done = run("pull", TUNE, "--original", "--discard-source")
    assert done.returncode == 2 and "--discard-source" in done.stderr


def test_a_failing_shard_keeps_what_was_converted(hub, tmp_path):
    right = expected(hub, tmp_path)
    hub.log.clear()
    name = "model-00004-of-00005.safetensors"
    hub.fault(name, on="cdn")  # its header
    hub.fault(name, times=99, on="cdn", wrong_byte=len(hub.repos[TUNE].files[name]) - 1)
    with pytest.raises(BadFile, match=name):
        pull(TUNE, targets=TO)
    assert nothing_is_there()
    hub.faults.clear()
    first = hub.sent("model-00001-of-00005.safetensors")
    assert pull(TUNE, targets=TO)[0].files[0].sha256 == right
    assert hub.sent("model-00001-of-00005.safetensors") == first


def test_a_header_that_was_not_the_files_is_found_out(hub, tmp_path):
    """It is asked for first, by itself, so that no hash vouches for it; another one would lead to other weights."""
    right = expected(hub, tmp_path)
    name = "model-00003-of-00005.safetensors"
    data = hub.repos[TUNE].files[name]
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    alike: dict[str, str] = {}
    for tensor, entry in header.items():
        other = alike.setdefault(str(entry.get("shape")), tensor)
        if other != tensor:
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
            break
    hub.fault(name, on="cdn", instead=data[:8] + json.dumps(header).encode().ljust(end - 8) + data[end:])
    with pytest.raises(BadFile, match=f"{name} began otherwise"):
        pull(TUNE, targets=TO)
    assert nothing_is_there()
    assert pull(TUNE, targets=TO)[0].files[0].sha256 == right


def test_a_pull_that_is_killed_at_any_time_gives_the_same_in_the_end(hub, tmp_path):
    """Killed every so often, later each time, until it ends by itself."""
    right = expected(hub, tmp_path)
    for name in hub.repos[TUNE].files:
        hub.fault(name, times=9999, pause=0.0005)
    for attempt in range(40):
        process = subprocess.Popen(
            command("pull", TUNE, "--to", "gguf:q8_0", "--discard-source"), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert process.wait(timeout=0.8 + attempt * 0.6) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert all(one.manifest is not None and Store().get(one.name) for one in Store().list())
    assert attempt > 1, "it was hardly killed"
    assert Store().get("tune:q8_0").manifest.files[0].sha256 == right


KILLED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def counted(real):
    def call(*args, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return call
for name in ("write", "pwrite", "ftruncate", "fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
from qwen2_local.cli import main
main()
"""


def test_a_pull_that_is_killed_before_any_write_gives_the_same_in_the_end(hub, tmp_path, monkeypatch):
    """Fetched and converted. QWEN2_LOCAL_ALL_POINTS=1 tries every write, of which there are some hundreds; else few, spread over all."""
    right = expected(hub, tmp_path)
    every = 1 if os.environ.get("QWEN2_LOCAL_ALL_POINTS") else 60
    for steps in range(every // 2, 3000, every):
        monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / f"home-{steps}"))
        arguments = [str(steps), "pull", TUNE, "--to", "gguf:q8_0", "--yes"]
        done = subprocess.run([sys.executable, "-P", "-c", KILLED, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert all(one.manifest is not None and Store().get(one.name) for one in Store().list())
        assert pull(TUNE, targets=TO)[0].files[0].sha256 == right, steps
        assert [path.name for path in Store().folder.iterdir() if path.name.startswith(".qwen2-")] == [], steps
    assert done.returncode == 0 and steps > 2 * every, "it was hardly killed"
    assert Store().get("tune:q8_0").manifest.files[0].sha256 == right
