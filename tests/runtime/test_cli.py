"""The command line, as processes: what it prints where, and how it ends. Nothing here depends on how good the answers are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2_local import Qwen2, __version__, backends
from qwen2_local.store import Store, guide_folder
from tests.support.installed import install
from tests.support.program import Terminal, command, here, run

COMMANDS = ("run", "app", "chat", "chats", "ls", "show", "rm", "cache", "convert", "doctor", "completion")
QUESTION = "What is GGUF?"
WILD = ("--temperature", "100", "--seed", "3")
"""Makes long replies of random tokens."""
FEW = ("--max-tokens", "8")
MLX_NOTE = "note: MLX has no GPU"

needs_llama = pytest.mark.skipif("llama.cpp" not in backends.available(), reason="llama.cpp is not installed here")
needs_mlx = pytest.mark.skipif("mlx" not in backends.available(), reason="mlx is not installed here")


@pytest.fixture(scope="module")
def guide() -> Qwen2:
    """What the processes should say, by the API."""
    with Qwen2("guide") as model:
        yield model


def usage_of(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.splitlines()[-1])["usage"]


# Help


def test_help_lists_every_command_and_exit_code() -> None:
    done = here("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name}  +\w", done.stdout, re.MULTILINE), name
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 130, 141):
        assert re.search(rf"\b{code} [a-z]", done.stdout), code
    assert here("-h").stdout == done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = here(name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: qwen2-local {name} ")
    undocumented = [line for line in done.stdout.splitlines() if re.fullmatch(r"  -\S+( \S+)?", line)]
    assert undocumented == []


def test_version() -> None:
    done = here("--version")
    assert (done.returncode, done.stdout) == (0, f"qwen2-local, version {__version__}\n")


@pytest.mark.parametrize(
    "arguments", [["walk"], ["--walk"], ["run", "--walk"], ["run", "guide", "a", "b"], ["run", "guide", "a", "--backend", "abacus"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    done = here(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage:" in done.stderr
    assert "Error:" in done.stderr


def test_help_and_version_load_nothing_large() -> None:
    code = "import sys\nfrom qwen2_local.cli import qwen2_local\nqwen2_local.main(['--help'], standalone_mode=False)\n"
    done = subprocess.run([sys.executable, "-c", code + "print(sorted(sys.modules))"], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    for name in ("numpy", "mlx", "llama_cpp", "tokenizers", "huggingface_hub", "qwen2_local.model"):
        assert f"'{name}'" not in loaded, name


# run


def test_run_prints_the_reply_and_nothing_else(guide: Qwen2) -> None:
    done = here("run", "guide", QUESTION, *FEW)
    assert done.returncode == 0
    assert done.stdout == guide.ask(QUESTION, max_tokens=8) + "\n"
    assert done.stderr == ""


def test_a_prompt_on_stdin(guide: Qwen2) -> None:
    done = here("run", "guide", *FEW, stdin=QUESTION + "\n")
    assert done.stdout == guide.ask(QUESTION, max_tokens=8) + "\n"


def test_without_arguments_and_terminal_the_guide_answers_stdin(guide: Qwen2) -> None:
    done = here(stdin=QUESTION)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == guide.ask(QUESTION) + "\n"


def test_text_on_stdin_is_added_to_the_prompt(guide: Qwen2) -> None:
    done = here("run", "guide", "Summarise", "--json", "--max-tokens", "1", stdin="One.\nTwo.\n")
    together = guide.stream("Summarise\n\nOne.\nTwo.", max_tokens=1).finish()
    assert usage_of(done)["prompt_tokens"] == together.usage.prompt_tokens
    assert json.loads(done.stdout)["text"] == together.text


def test_json_is_one_object_on_the_last_line(guide: Qwen2) -> None:
    done = here("run", "guide", QUESTION, "--json", *FEW)
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    expected = guide.stream(QUESTION, max_tokens=8).finish()
    assert list(said) == ["text", "finish_reason", "usage"]
    assert (said["text"], said["finish_reason"]) == (expected.text, expected.finish_reason)
    assert list(said["usage"]) == [
        *("prompt_tokens", "cached_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens"),
        *("prefill_s", "decode_s", "decode_tokens_per_s"),
    ]
    assert said["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert said["usage"]["completion_tokens"] == len(expected.tokens)
    assert said["usage"]["cached_tokens"] == 0
    assert said["usage"]["prefill_s"] > 0


def test_json_keeps_chinese_readable() -> None:
    done = here("run", "guide", "--raw", "你好", "--json", "--max-tokens", "40", *WILD)
    assert "\\u" not in done.stdout
    assert re.search(r"[\u4e00-\u9fff]", json.loads(done.stdout)["text"])


def test_an_output_that_cannot_take_chinese_takes_the_rest() -> None:
    done = run("run", "guide", "--raw", "你好", "--max-tokens", "40", *WILD, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "?" in done.stdout


def test_raw_is_without_a_template(guide: Qwen2) -> None:
    done = here("run", "guide", "Qwen2 is", "--raw", "--json", "--max-tokens", "4")
    expected = guide.complete("Qwen2 is", max_tokens=4).finish()
    assert json.loads(done.stdout)["text"] == expected.text
    assert usage_of(done)["prompt_tokens"] == expected.usage.prompt_tokens


def test_system(guide: Qwen2) -> None:
    done = here("run", "guide", QUESTION, "--system", "Be brief, please.", "--json", "--max-tokens", "4")
    expected = guide.stream(QUESTION, system="Be brief, please.", max_tokens=4).finish()
    assert usage_of(done)["prompt_tokens"] == expected.usage.prompt_tokens
    assert json.loads(done.stdout)["text"] == expected.text


def test_system_and_raw_exclude_each_other() -> None:
    done = here("run", "guide", "a", "--raw", "--system", "b")
    assert done.returncode == 2
    assert "--system" in done.stderr


def test_the_same_seed_gives_the_same_reply() -> None:
    sampling = ("--raw", "Qwen2", "--temperature", "2", "--top-p", "0.95", "--top-k", "50", "--max-tokens", "12")
    first, second, other = (here("run", "guide", *sampling, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == second != other


def test_top_k_of_one_is_greedy(guide: Qwen2) -> None:
    done = here("run", "guide", QUESTION, "--temperature", "5", "--top-k", "1", *FEW)
    assert done.stdout == guide.ask(QUESTION, max_tokens=8) + "\n"


@needs_mlx
def test_the_backend_can_be_chosen() -> None:
    done = here("run", "guide", QUESTION, "--backend", "mlx", "--json", "--max-tokens", "2")
    assert done.returncode == 0
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert done.stderr == "" or done.stderr.startswith(MLX_NOTE)


def test_the_context_can_be_chosen() -> None:
    done = here("run", "guide", "--raw", "a b c", "--context", "20", "--json", *WILD)
    said = json.loads(done.stdout)
    assert said["finish_reason"] == "context"
    assert said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"] == 20


# Errors


@pytest.mark.parametrize(
    ("option", "value"),
    # test_types.py has the whole list of what sampling refuses.
    [
        *(("--temperature", value) for value in ("nan", "-1", "hot")),
        *(("--top-p", "0"), ("--top-k", "-1"), ("--seed", "18446744073709551616")),
        *(("--max-tokens", "0"), ("--context", "-1"), ("--context", "8193"), ("--context", "99999999999999999999")),
    ],
)
def test_absurd_values(option: str, value: str) -> None:
    done = here("run", "guide", "hi", f"{option}={value}")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(option.lstrip("-").replace("-", "[-_ ]"), done.stderr), done.stderr
    assert value in done.stderr.replace(",", ""), done.stderr


def test_absurd_values_are_refused_before_anything_is_loaded() -> None:
    done = run("run", "guide", "hi", "--temperature=nan", before="import sys; sys.modules['llama_cpp'] = sys.modules['mlx'] = None")
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gide", "Did you mean guide"),
        ("guide:q9", "q4_0"),
        ("7b", "`qwen2-local pull 7b`"),
        ("0.5B-Instruct", "`qwen2-local pull 0.5b`"),
        ("qwen3", "0.5b"),
        ("./nothing.gguf", "no file or folder"),
        ("", "missing"),
        ("x" * 5000, "no model"),
        ("a\udcffb", "no model"),
    ],
)
def test_an_unknown_model_says_what_there_is(name: str, says: str) -> None:
    done = here("run", os.fsencode(name), "hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr) < 1000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGUF" + b"\xff" * 60, "version"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, ""),
        (b"<html><body>Not found</body></html>", "HTML|web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"", "empty"),
        (b"\x00" * 100, ""),
    ],
)
def test_a_hostile_or_damaged_file(tmp_path: Path, content: bytes, says: str) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(content)
    done = here("run", model, "hi")
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert str(model) in done.stderr
    assert re.search(says, done.stderr, re.IGNORECASE), done.stderr
    assert here("show", model).stderr == done.stderr


def test_a_hostile_folder(tmp_path: Path) -> None:
    shutil.copytree(guide_folder(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": ', '"num_attention_heads": -'))
    done = here("run", tmp_path / "model", "hi")
    assert (done.returncode, done.stdout) == (3, "")
    assert "num_attention_heads" in done.stderr


def test_a_folder_with_a_cut_off_shard(tmp_path: Path, home: Path) -> None:
    shutil.copytree(guide_folder(), tmp_path / "model")
    shard = tmp_path / "model" / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    before = sorted((home / "cache" / "converted").iterdir())
    done = here("run", tmp_path / "model", "hi")
    assert (done.returncode, done.stdout) == (3, "")
    assert "model.safetensors" in done.stderr
    assert sorted((home / "cache" / "converted").iterdir()) == before


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_missing_backend(name: str) -> None:
    library = {"mlx": "mlx", "llama.cpp": "llama_cpp"}[name]
    done = run("run", "guide", "hi", "--backend", name, before=f"import sys; sys.modules['{library}'] = None")
    assert (done.returncode, done.stdout) == (4, "")
    assert name in done.stderr
    assert "uv sync" in done.stderr


def test_no_backend_at_all() -> None:
    done = run("run", "guide", "hi", before="import sys; sys.modules['mlx'] = sys.modules['llama_cpp'] = None")
    assert done.returncode == 4
    assert "uv sync" in done.stderr
    assert run("ls", before="import sys; sys.modules['mlx'] = sys.modules['llama_cpp'] = None").returncode == 0


def test_what_does_not_fit_into_memory() -> None:
    small = "import qwen2_local.fit as f; f.machine_memory = lambda: f.Memory(8_000_000_000, 170_000_000)"
    done = run("run", "guide", "hi", "--context", "8192", before=small)
    assert (done.returncode, done.stdout) == (5, "")
    assert "GB" in done.stderr
    (largest,) = re.findall(r"--context (\d+)", done.stderr)
    assert run("run", "guide", "hi", "--context", largest, "--max-tokens", "1", before=small).returncode == 0


def test_a_prompt_that_does_not_fit_into_the_context() -> None:
    done = here("run", "guide", "--context", "64", stdin="word " * 500)
    assert (done.returncode, done.stdout) == (5, "")
    assert re.search(r"\d+ tokens.*64", done.stderr)


@pytest.mark.parametrize(
    ("prompt", "stdin", "says"),
    [
        (None, None, "no prompt"),
        ("", " \n\n", "no prompt"),
        (None, b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "no UTF-8"),
        ("Describe", b"abc\xff", "byte 3"),
        (b"caf\xe9", None, "surrogate"),
        ("hi", b"x" * 16_000_001, "16 MB"),
    ],
)
def test_an_unreadable_prompt(prompt: str | bytes | None, stdin: bytes | str | None, says: str) -> None:
    done = here("run", "guide", *([prompt] if prompt is not None else []), stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


def test_a_closed_stdin_is_no_prompt() -> None:
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command("run", "guide")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no prompt" in done.stderr


def test_escape_sequences_do_not_reach_the_terminal(tmp_path: Path) -> None:
    red = "\x1b[31mred\x1b]0;title\x07\u202e"
    folder = tmp_path / f"model{red}"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 30)
    for arguments in (
        ("run", red, "hi"),
        ("show", folder),
        ("run", folder / "x.gguf", "hi"),
        (red,),
        (f"--{red}",),
        ("run", "a", "b", red),
        ("rm", red),
    ):
        done = here(*arguments)
        assert done.returncode in (2, 3)
        assert "red" in done.stderr
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr), done.stderr


def test_a_bug_is_called_a_bug() -> None:
    before = "import qwen2_local.store as s\ndef broken(*a, **k): raise ZeroDivisionError('x')\ns.resolve = broken"
    done = run("show", "guide", before=before)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "bug" in done.stderr
    shown = subprocess.run(
        command("show", "guide", before=before), env={**os.environ, "QWEN2_LOCAL_DEBUG": "1"}, capture_output=True, text=True, check=False
    )
    assert "Traceback" in shown.stderr


# Output that nobody takes


@pytest.mark.parametrize(
    "arguments", [("run", "guide", "--raw", "Qwen2", "--max-tokens", "400", *WILD), ("run", "guide", QUESTION, "--json", *FEW), ("ls",), ("--help",)]
)
def test_a_reader_that_goes_away(arguments: tuple[str, ...]) -> None:
    shell = ["bash", "-c", 'set -o pipefail; "$@" </dev/null | head -c 0', "bash", *command(*arguments)]
    done = subprocess.run(shell, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_is_full() -> None:
    for arguments in (("ls",), ("run", "guide", QUESTION, *FEW)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command(*arguments), stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 5
        assert done.stderr.count("error:") == 1
        assert "No space left" in done.stderr
        assert "Exception ignored" not in done.stderr


def test_closed_outputs_are_no_error() -> None:
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&- </dev/null', "sh", *command("run", "guide", QUESTION, *FEW)], check=False)
    assert done.returncode == 0


# The models


@pytest.fixture
def own_home(tmp_path: Path) -> dict[str, Path]:
    """A home with one model in it."""
    install(Store(_made(tmp_path / "home" / "models")), "0.5b:q4_0")
    return {"QWEN2_LOCAL_HOME": tmp_path / "home"}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_ls(own_home: dict[str, Path]) -> None:
    done = here("ls", env=own_home)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["NAME", "FORMAT", "SIZE", "CONTEXT"]
    assert [line[0] for line in lines[1:]] == ["0.5b:q4_0", "guide"]
    models = json.loads(here("ls", "--json", env=own_home).stdout)
    assert [model["name"] for model in models] == ["0.5b:q4_0", "guide"]
    assert set(models[0]) == {"name", "format", "bytes", "context"}
    assert models[0]["context"] == 32768
    assert models[1]["context"] == 8192
    assert 1_000_000 < models[1]["bytes"] < 16_000_000


def test_show(own_home: dict[str, Path]) -> None:
    done = here("show", "0.5b", env=own_home)
    assert done.returncode == 0
    assert re.search(r"^name +0.5b:q4_0$", done.stdout, re.MULTILINE)
    facts = json.loads(here("show", "guide", "--json", env=own_home).stdout)
    assert (facts["name"], facts["origin"], facts["architecture"], facts["context"]) == ("guide", "built-in", "qwen2", 8192)
    assert facts["parameters"] > 1_000_000
    by_path = json.loads(here("show", guide_folder(), "--json").stdout)
    assert by_path["origin"] == "path"
    assert by_path["parameters"] == facts["parameters"]


def test_rm(own_home: dict[str, Path]) -> None:
    unconfirmed = here("rm", "0.5b:q4_0", env=own_home)
    assert unconfirmed.returncode == 2
    assert "--yes" in unconfirmed.stderr
    assert "0.5b:q4_0" in here("ls", env=own_home).stdout
    done = here("rm", "0.5b", "--yes", env=own_home)
    assert (done.returncode, done.stdout) == (0, "")
    assert "0.5b:q4_0" in done.stderr
    assert "0.5b:q4_0" not in here("ls", env=own_home).stdout
    assert here("rm", "0.5b:q4_0", "--yes", env=own_home).returncode == 2


def test_rm_asks_on_a_terminal(own_home: dict[str, Path]) -> None:
    for answer, code in (("n", 0), ("y", 0)):
        with Terminal("rm", "0.5b:q4_0", env=own_home) as terminal:
            terminal.wait_for("Delete 0.5b:q4_0")
            terminal.type(f"{answer}\n")
            assert terminal.end() == code
        assert ("0.5b:q4_0" in here("ls", env=own_home).stdout) == (answer == "n")


def test_rm_of_what_is_not_installed(own_home: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    for name, says in (("guide", "built in"), (str(tmp_path / "mine.gguf"), "path"), ("7b", "not installed")):
        done = here("rm", name, "--yes", env=own_home)
        assert done.returncode == 2
        assert says in done.stderr
    assert (tmp_path / "mine.gguf").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest"])
def test_a_damaged_model_is_refused_and_can_be_removed(own_home: dict[str, Path], damage: str) -> None:
    (folder,) = [path for path in (own_home["QWEN2_LOCAL_HOME"] / "models").iterdir() if path.is_dir()]
    file = folder / ("manifest.json" if damage == "manifest" else "model.gguf")
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    done = here("run", "0.5b:q4_0", "hi", env=own_home)
    assert (done.returncode, done.stdout) == (3, "")
    assert damage == "manifest" or "qwen2-local rm 0.5b:q4_0" in done.stderr
    assert here("ls", env=own_home).returncode == 0
    assert here("rm", "0.5b:q4_0", "--yes", env=own_home).returncode == 0
    assert "0.5b:q4_0" not in here("ls", env=own_home).stdout


# convert


@needs_llama
def test_convert_to_gguf_and_run_it(tmp_path: Path) -> None:
    made = tmp_path / "guide.gguf"
    done = here("convert", guide_folder(), "--to", "gguf:q8_0", "-o", made)
    assert (done.returncode, done.stdout) == (0, "")
    assert str(made) in done.stderr
    assert json.loads(here("show", made, "--json").stdout)["quantization"] == "Q8_0"
    reply = here("run", made, QUESTION, *FEW)
    assert (reply.returncode, reply.stderr) == (0, "")
    assert reply.stdout.strip()
    again = here("convert", guide_folder(), "--to", "gguf:q4_0", "-o", made)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert here("convert", guide_folder(), "--to", "gguf:q4_0", "-o", made, "--force").returncode == 0
    assert json.loads(here("show", made, "--json").stdout)["quantization"] == "Q4_0"
    assert [path.name for path in tmp_path.iterdir()] == ["guide.gguf"]


@needs_mlx
def test_convert_to_mlx_and_run_it(tmp_path: Path) -> None:
    done = here("convert", guide_folder(), "--to", "mlx:4bit", cwd=tmp_path)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["guide-mlx-4bit"]
    reply = here("run", "./guide-mlx-4bit", QUESTION, "--max-tokens", "2", cwd=tmp_path)
    assert reply.returncode == 0
    wrong = here("run", "./guide-mlx-4bit", "hi", "--backend", "llama.cpp", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "is for mlx, not for llama.cpp" in wrong.stderr


@pytest.mark.parametrize(
    ("source", "arguments", "code", "says"),
    [
        ("GUIDE", ["--to", "gguf:q5_x"], 2, "q4_0"),
        ("GUIDE", [], 2, "--to"),
        ("GUIDE", ["--to", "gguf:f16", "-o", "no/such/folder/x.gguf"], 2, "no/such/folder"),
        ("GUIDE", ["--to", "gguf:f16", "-o", "."], 2, "is no name"),
        ("GUIDE", ["--to", "gguf:f16", "-o", "x.gguf", "--name", "x"], 2, "--name"),
        ("GUIDE", ["--to", "gguf:f16", "--name", "x", "--force"], 2, "--name"),
        ("GUIDE", ["--to", "gguf:f16", "--name", "a/b"], 2, "no name for a model"),
        ("GUIDE", ["--to", "gguf:f16", "--name", "guide"], 2, "built-in"),
        ("nothing", ["--to", "gguf:f16"], 2, "nothing"),
        (".", ["--to", "gguf:f16"], 2, "config.json"),
        ("7b", ["--to", "gguf:f16"], 2, "Qwen2-7B-Instruct is not installed"),
        ("0.5b", ["--to", "gguf:f16"], 2, "0.5b:q4_0 is installed"),
    ],
)
def test_convert_refuses(own_home: dict[str, Path], tmp_path: Path, source: str, arguments: list[str], code: int, says: str) -> None:
    place = _made(tmp_path / "here")
    done = here("convert", guide_folder() if source == "GUIDE" else source, *arguments, cwd=place, env=own_home)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "bug" not in done.stderr
    assert list(place.iterdir()) == []
    assert [model["name"] for model in json.loads(here("ls", "--json", env=own_home).stdout)] == ["0.5b:q4_0", "guide"]


@needs_llama
def test_convert_installs_under_a_name(own_home: dict[str, Path], tmp_path: Path) -> None:
    place = _made(tmp_path / "here")
    done = here("convert", "guide", "--to", "gguf:q4_0", "--name", "Mine:q4_0", cwd=place, env=own_home)
    assert (done.returncode, done.stdout) == (0, "")
    assert "mine:q4_0 is installed" in done.stderr
    assert list(place.iterdir()) == []
    assert "mine:q4_0" in here("ls", env=own_home).stdout
    shown = json.loads(here("show", "mine:q4_0", "--json", env=own_home).stdout)
    assert (shown["origin"], shown["quantization"], shown["source"]) == ("installed", "Q4_0", str(guide_folder().resolve()))
    assert here("run", "mine:q4_0", QUESTION, *FEW, env=own_home).stdout.strip()
    again = here("convert", "guide", "--to", "gguf:q8_0", "--name", "mine:q4_0", env=own_home)
    assert again.returncode == 2
    assert "qwen2-local rm mine:q4_0" in again.stderr
    assert here("rm", "mine:q4_0", "--yes", env=own_home).returncode == 0


# Shell completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = here("completion", shell)
    assert done.returncode == 0
    assert "_QWEN2_LOCAL_COMPLETE" in done.stdout
    assert "qwen2-local" in done.stdout
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_completion_knows_commands_and_options() -> None:
    variables = {"_QWEN2_LOCAL_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    assert here(env={**variables, "COMP_WORDS": "qwen2-local r"}).stdout.split() == ["plain,run", "plain,rm"]
    offered = here(env={**variables, "COMP_WORDS": "qwen2-local run --t", "COMP_CWORD": "2"}).stdout.split()
    assert offered == ["plain,--temperature", "plain,--top-p", "plain,--top-k"]


# chat


def test_chat_with_lines_from_a_pipe(guide: Qwen2) -> None:
    done = here("chat", "guide", *FEW, stdin=f"{QUESTION}\n\n/new\n{QUESTION}\n")
    assert done.returncode == 0
    assert done.stdout == 2 * (guide.ask(QUESTION, max_tokens=8) + "\n")


def test_chat_goes_on_after_what_is_no_prompt(guide: Qwen2) -> None:
    done = here("chat", *FEW, "--context", "128", stdin=b"\xff\xfe\n" + b"word " * 300 + b"\n/fly\n/new\n" + QUESTION.encode() + b"\n/quit\nmore\n")
    assert done.returncode == 0
    assert done.stdout == guide.ask(QUESTION, max_tokens=8) + "\n"
    for says in ("surrogate", "tokens", "There is no /fly"):
        assert says in done.stderr


def test_chat_on_a_terminal() -> None:
    with Terminal("chat", "guide", *FEW) as terminal:
        assert "/help" in terminal.wait_for("> ")
        terminal.type("/help\n")
        assert "/system X" in terminal.wait_for("\n> ")
        terminal.type(f"{QUESTION}\n")
        assert terminal.wait_for("\n> ").count("\n") >= 2
        terminal.type("/system Be brief.\n")
        terminal.wait_for("with that system prompt")
        terminal.wait_for("> ")
        terminal.type("/new\n")
        terminal.wait_for("A new conversation.")
        terminal.wait_for("> ")
        time.sleep(0.2)  # faster than a person: Python misses a Ctrl-C between its prompt and its wait for input
        terminal.type("half a line\x03")
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.end() == 0
        assert "\x1b" not in terminal.text


def test_ctrl_d_leaves_the_chat() -> None:
    with Terminal("chat") as terminal:
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_alone_on_a_simple_terminal_it_chats_line_by_line() -> None:
    with Terminal(env={"TERM": "dumb"}) as terminal:
        terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.end() == 0


def test_ctrl_c_stops_the_reply_and_keeps_the_chat() -> None:
    with Terminal("chat", "guide", *WILD) as terminal:
        terminal.wait_for("> ")
        said = ""
        for attempt in range(4):  # a reply of random tokens may end by itself, though it hardly ever does
            terminal.type(f"Hello {attempt}\n")
            terminal.wait_for(f"Hello {attempt}\n")
            while len(reply := terminal.text.rpartition(f"Hello {attempt}\n")[2]) < 20 and not reply.endswith("> "):
                assert terminal.read()
            terminal.type("\x03")
            said = terminal.wait_for("\n> ")
            if "(stopped)" in said:
                break
        assert "(stopped)" in said
        terminal.type("/quit\n")
        assert terminal.end() == 0
