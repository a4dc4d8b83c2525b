"""Ctrl-C and kill -9 at any moment: one clean end, nothing left behind, and the next run is right."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qwen2_local import backends
from qwen2_local.store import guide_folder
from tests.support.machine import busy
from tests.support.program import command, run

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in backends.available(), reason=f"{name} is not installed here")) for name in backends.NAMES
]
PROMPT_SECONDS = 1.0
"""Ran: 0.02 to 0.2 s with one other program beside it; on a busier machine it may be more."""
WILD = ("--raw", "--temperature", "100", "--seed", "3", "--max-tokens", "7000")
"""Random tokens: a reply that goes on for thousands of them."""

TELL_PREFILL = """
import sys
from qwen2_local.cli import output
output.Status.prefill = lambda self, done, total: print("read", done, total, file=sys.stderr, flush=True)
"""
TELL_TOKENS = """
import sys
from qwen2_local.detokenize import TextStream
push = TextStream.push
def told(self, data):
    print("token", file=sys.stderr, flush=True)
    return push(self, data)
TextStream.push = told
"""
PAUSE_CONVERSION = """
import sys, time
from qwen2_local.cli import output
def pause(self, doing, done, total):
    if doing == "converting" and done > total / 2:
        print("converting", file=sys.stderr, flush=True)
        time.sleep(60)
output.Status.bytes = pause
"""


def start(*arguments: str, before: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments, before=before), env={**os.environ, **(env or {})}, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def wait_for(process: subprocess.Popen[str], pattern: str, times: int = 1) -> None:
    """Until so many lines of its stderr match."""
    assert process.stderr is not None
    for line in process.stderr:
        times -= bool(re.search(pattern, line))
        if not times:
            return
    pytest.fail(f"{pattern} did not come")


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ctrl-C; what it still writes. It has to end soon, with the right exit code and no traceback."""
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - before
    assert process.returncode == 130, err
    assert took < PROMPT_SECONDS * busy()
    assert "Traceback" not in err
    assert "error" not in err
    return out, err


def leftovers(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.name.startswith(".qwen2-")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_while_a_long_prompt_is_read(backend: str, home: Path) -> None:
    run("run", "guide", "hi", "--backend", backend, "--max-tokens", "1")
    process = start("run", "guide", "--backend", backend, before=TELL_PREFILL)
    assert process.stdin is not None
    process.stdin.write("one two three four five six seven " * 480)
    process.stdin.close()
    process.stdin = None
    wait_for(process, r"read [1-9]\d* ", times=2)
    out, err = interrupt(process)
    assert out == ""
    read, total = map(int, re.findall(r"read (\d+) (\d+)", err)[-1]) if "read" in err else (0, 7000)
    assert read < total
    assert total > 3000
    assert leftovers(home) == []
    assert run("run", "guide", "hi", "--backend", backend, "--max-tokens", "4").returncode == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_while_a_reply_is_written_keeps_what_is_there(backend: str, home: Path) -> None:
    process = start("run", "guide", "Qwen2", "--backend", backend, *WILD, before=TELL_TOKENS)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    wait_for(process, "token", times=5)
    out, _ = interrupt(process)
    assert out.endswith("\n")
    # Replies of this seed are the same from a cold start: the partial one is the start of the whole one.
    written = out.removesuffix("\n")
    whole = run("run", "guide", "Qwen2", "--backend", backend, *WILD[:-1], str(len(written) + 40)).stdout
    assert written
    assert whole.startswith(written.rstrip("\N{REPLACEMENT CHARACTER}"))
    assert leftovers(home) == []


def test_ctrl_c_with_json_still_gives_the_object() -> None:
    process = start("run", "guide", "Qwen2", *WILD, "--json", before=TELL_TOKENS)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    wait_for(process, "token", times=3)
    out, _ = interrupt(process)
    said = json.loads(out)
    assert said["finish_reason"] == "cancelled"
    assert said["usage"]["completion_tokens"] >= 2  # the third was on its way
    assert said["usage"]["prefill_s"] > 0
    assert said["usage"]["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("form", ["batch", "--n", "bench", "selftest"])
def test_ctrl_c_stops_many_replies_and_keeps_what_is_whole(form: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('{"prompt": "Qwen2", "max_tokens": 2}\n' + '"Qwen2"\n' * 8)
    commands = {
        "batch": ["run", "guide", "--batch", str(tmp_path / "prompts"), "--concurrency", "2", *WILD],
        "--n": ["run", "guide", "Qwen2", "--n", "8", *WILD, "--json"],
        "bench": ["bench", "guide", "--tokens", "4000"],
        "selftest": ["selftest", "guide:q4_0", "--output", str(tmp_path)],
    }
    process = start(*commands[form], before=TELL_TOKENS)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    wait_for(process, "token", times=20)
    out, _ = interrupt(process)
    if form == "batch":
        assert [json.loads(line)["id"] for line in out.splitlines()][:1] in ([], [1]), "whole lines only"
    elif form == "--n":
        assert isinstance(json.loads(out), list)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_ctrl_c_in_the_first_conversion_leaves_what_the_next_start_goes_on_with(tmp_path: Path) -> None:
    env = {"QWEN2_LOCAL_HOME": str(tmp_path)}
    process = start_pausing(env)
    assert len(leftovers(tmp_path)) == 1
    out, _ = interrupt(process)
    assert out == ""
    assert conversions(tmp_path) == []
    assert len(leftovers(tmp_path)) == 1
    assert run("run", "guide", "hi", "--max-tokens", "2", env=env).returncode == 0
    assert len(conversions(tmp_path)) == 1
    assert leftovers(tmp_path) == []


def test_ctrl_c_while_stdin_is_awaited() -> None:
    process = start("run", "guide", before="import sys\nprint('started', file=sys.stderr, flush=True)")
    wait_for(process, "started")
    time.sleep(1.0)  # it says nothing when it begins to wait
    out, _ = interrupt(process)
    assert out == ""


def test_ctrl_c_ends_a_chat_that_reads_a_script() -> None:
    process = start("chat", "guide", *WILD[1:], before=TELL_TOKENS)
    assert process.stdin is not None
    process.stdin.write("Hello\nHello again\n")
    process.stdin.flush()
    wait_for(process, "token", times=3)
    interrupt(process)


def conversions(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "cache" / "converted").iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("moment", ["phase == 'checking'", "phase == 'converting' and done > total / 2", "phase == 'publishing'"])
def test_a_kill_in_the_first_conversion(moment: str, tmp_path: Path) -> None:
    env = {"QWEN2_LOCAL_HOME": str(tmp_path)}
    before = f"""
import os, signal
from qwen2_local.cli import output
def die(self, phase, done, total):
    if {moment}:
        os.kill(os.getpid(), signal.SIGKILL)
output.Status.bytes = die
"""
    killed = subprocess.run(command("run", "guide", "hi", before=before), env={**os.environ, **env}, stdin=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert conversions(tmp_path) == []
    listed = run("ls", "--json", env=env)
    assert [model["name"] for model in json.loads(listed.stdout)] == ["guide"]
    done = run("run", "guide", "hi", "--max-tokens", "2", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(conversions(tmp_path)) == 1
    assert leftovers(tmp_path) == [], "swept"


def test_two_first_runs_at_once_convert_once(tmp_path: Path) -> None:
    env = {"QWEN2_LOCAL_HOME": str(tmp_path)}
    processes = [start("run", "guide", "hi", "--max-tokens", "2", before="", env=env) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert len(conversions(tmp_path)) == 1
    assert leftovers(tmp_path) == []


WAIT = """
import sys
from qwen2_local.cli import output
show = output.Status.show
def told(self, text):
    if "waiting" in text:
        print(text, file=sys.stderr, flush=True)
    show(self, text)
output.Status.show = told
"""


def start_pausing(env: dict[str, str]) -> subprocess.Popen[str]:
    """A first run of the guide, which stays in the middle of its conversion."""
    process = start("run", "guide", "hi", before=PAUSE_CONVERSION, env=env)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    wait_for(process, "converting")
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=60)


def test_a_second_first_run_says_for_whom_it_waits(tmp_path: Path) -> None:
    env = {"QWEN2_LOCAL_HOME": str(tmp_path)}
    first = start_pausing(env)
    second = start("run", "guide", "hi", "--max-tokens", "2", before=f"{WAIT}sys.stdin.close()", env=env)
    try:
        wait_for(second, f"^waiting for process {first.pid}, which converts guide$", times=2)  # again: the first is too early to be shown
    finally:
        end(first)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out.count("\n")) == (0, 1), err


def test_conversions_of_two_models_do_not_wait_for_each_other(tmp_path: Path) -> None:
    shutil.copytree(guide_folder(), tmp_path / "model")
    env = {"QWEN2_LOCAL_HOME": str(tmp_path / "home")}
    first = start_pausing(env)
    try:
        assert run("run", tmp_path / "model", "hi", "--max-tokens", "2", env=env).returncode == 0
    finally:
        end(first)


def test_a_conversion_of_what_the_source_was_before_goes(tmp_path: Path) -> None:
    env = {"QWEN2_LOCAL_HOME": str(tmp_path / "home")}
    ask = ("hi", "--max-tokens", "2")
    for name in ("model", "other"):
        shutil.copytree(guide_folder(), tmp_path / name)
        assert run("run", tmp_path / name, *ask, env=env).returncode == 0
    before = conversions(tmp_path / "home")
    assert len(before) == 2
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    assert run("run", tmp_path / "model", *ask, env=env).returncode == 0
    after = conversions(tmp_path / "home")
    assert len(after) == 2
    assert len(set(before) & set(after)) == 1, "the other model's stays"


def test_a_home_inside_of_the_model(tmp_path: Path) -> None:
    shutil.copytree(guide_folder(), tmp_path / "model")
    home = tmp_path / "model" / "home"
    assert run("run", tmp_path / "model", "hi", "--max-tokens", "2", env={"QWEN2_LOCAL_HOME": home}).returncode == 0
    assert len(conversions(home)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fault_of_the_source_is_no_damaged_conversion(backend: str, tmp_path: Path) -> None:
    shutil.copytree(guide_folder(), tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"do_sample": true, "top_k": -1}')
    for _ in range(2):
        done = run("run", tmp_path / "model", "hi", "--backend", backend, env={"QWEN2_LOCAL_HOME": str(tmp_path)})
        assert (done.returncode, done.stdout) == (3, "")
        assert str(tmp_path / "model" / "generation_config.json") in done.stderr
        assert conversions(tmp_path) == []


def test_a_damaged_conversion_is_made_anew(tmp_path: Path) -> None:
    env = {"QWEN2_LOCAL_HOME": str(tmp_path)}
    good = run("run", "guide", "hi", "--max-tokens", "4", env=env)
    (name,) = conversions(tmp_path)
    made = tmp_path / "cache" / "converted" / name
    file = made if made.is_file() else made / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size // 2)
    again = run("run", "guide", "hi", "--max-tokens", "4", env=env)
    assert (again.returncode, again.stdout, again.stderr) == (0, good.stdout, good.stderr)
    assert conversions(tmp_path) == [name]
    assert file.stat().st_size == size
