import errno
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qwen2_local import files
from qwen2_local.errors import BadFile, DoesNotFit, UsageError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "qwen2-0_5b-instruct-q4_k_m.gguf", "tokenizer.json", "模型.gguf", ".hidden", "con-text"])
def test_honest_names_pass(name):
    assert files.safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", "nul", "NUL.txt", "com1", "a\0b", "a\nb", "x\u202eg", "end.", "e ", "a*", "x" * 256],
)
def test_hostile_names_are_refused(name):
    with pytest.raises(BadFile, match="refused"):
        files.safe_name(name)


@pytest.mark.parametrize("pair", [("Model.gguf", "model.gguf"), ("é", "e\u0301"), ("ß", "SS")])
def test_names_that_are_one_file_elsewhere_are_refused(pair):
    files.refuse_clashes([pair[0], "other"])
    with pytest.raises(BadFile, match="one file"):
        files.refuse_clashes(pair)


def test_a_link_may_not_leave_its_folder(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "here").write_text("")
    (root / "near").symlink_to("here")
    (root / "away").symlink_to("/etc/hosts")
    assert files.inside(root, root / "near") == root / "here"
    for path in (root / "away", root / ".." / "x"):
        with pytest.raises(BadFile, match="out of its folder"):
            files.inside(root, path)


def test_write_atomic_replaces_the_whole_and_is_private(tmp_path):
    path = tmp_path / "x.json"
    files.write_atomic(path, "old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert names(tmp_path) == ["x.json"]


def test_a_full_disk_keeps_the_old_file_and_says_the_numbers(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_atomic(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit, match=r"0\.00 GB are needed, .* GB are free"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_require_free_says_what_is_needed_and_what_there_is(tmp_path):
    files.require_free(tmp_path / "not" / "there", 1)
    with pytest.raises(DoesNotFit, match=r"1000000000\.00 GB are needed, .* GB are free"):
        files.require_free(tmp_path, 10**18)


def test_staging_publishes_the_whole_folder_at_once(tmp_path):
    final = tmp_path / "model"
    with files.staging(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("w")
        assert not final.exists()
        assert files.sweep(tmp_path) == 0, "in use"
    assert (final / "sub" / "weights").read_text() == "w"
    assert stat.S_IMODE(final.stat().st_mode) == 0o700
    assert names(tmp_path) == ["model"]


def test_staging_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.staging(tmp_path / "model") as folder:
        (folder / "half").write_text("w")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_staging_never_replaces(tmp_path):
    final = tmp_path / "model"
    with pytest.raises(UsageError, match="meanwhile"), files.staging(final):
        final.mkdir()
        (final / "theirs").write_text("")
    with pytest.raises(UsageError, match="exists"), files.staging(final):
        pass
    assert names(final) == ["theirs"]
    assert names(tmp_path) == ["model"]


def test_staging_on_a_full_disk_is_typed(tmp_path):
    with pytest.raises(DoesNotFit), files.staging(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "no space")
    assert names(tmp_path) == []


def test_sweep_deletes_only_what_nobody_holds(tmp_path):
    (tmp_path / "model").mkdir()
    dead = tmp_path / ".qwen2-0123456789abcdef"
    dead.mkdir()
    (dead / "x").write_text("")
    (tmp_path / ".qwen2-0000000000000000").write_text("")
    link = tmp_path / ".qwen2-1111111111111111"
    link.symlink_to(tmp_path / "model")
    (tmp_path / ".qwen2-notes").write_text("a person's own")
    with files.staging(tmp_path / "new"), files.staging_file(tmp_path / "file"):
        assert files.sweep(tmp_path) == 2
    assert names(tmp_path) == [link.name, ".qwen2-notes", "file", "model", "new"]
    assert files.sweep(tmp_path / "none") == 0


def test_sweep_puts_back_what_was_to_be_replaced(tmp_path):
    for name in ("gone", "there"):
        old = tmp_path / f".qwen2-old-{name.encode().hex():0>16}" / name
        old.mkdir(parents=True)
        (old / "x").write_text("old")
    (tmp_path / "there").mkdir()
    assert files.sweep(tmp_path) == 2
    assert names(tmp_path) == ["gone", "there"]
    assert names(tmp_path / "gone") == ["x"]
    assert names(tmp_path / "there") == []


@pytest.mark.parametrize("old", [None, "folder", "file", "link"])
def test_staging_replaces_if_asked_to(tmp_path, old):
    final = tmp_path / "model"
    if old == "folder":
        final.mkdir()
        (final / "old").write_text("")
    elif old == "file":
        final.write_text("old")
    elif old == "link":
        (tmp_path / "elsewhere").mkdir()
        final.symlink_to(tmp_path / "elsewhere")
    with files.staging(final, overwrite=True) as folder:
        (folder / "new").write_text("")
        assert os.path.lexists(final) == (old is not None)
    assert names(final) == ["new"]
    assert not final.is_symlink()
    assert names(tmp_path) == (["elsewhere"] if old == "link" else []) + ["model"]


def test_what_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    final = tmp_path / "model"
    final.mkdir()
    (final / "old").write_text("")
    real = Path.rename

    def rename(path, target):
        if target == final and not (path / "old").exists():
            raise OSError(errno.EIO, "broken", str(path), str(target))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="broken") as caught, files.staging(final, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert caught.value.filename == str(final), "the name that people know"
    assert names(tmp_path) == ["model"]
    assert names(final) == ["old"]


def test_staging_file(tmp_path):
    final = tmp_path / "x"
    with files.staging_file(final) as file:
        file.write_text("1")
        assert not final.exists()
    with pytest.raises(UsageError, match="exists"), files.staging_file(final):
        pass
    with pytest.raises(KeyboardInterrupt), files.staging_file(final, overwrite=True) as file:
        file.write_text("2")
        raise KeyboardInterrupt
    assert final.read_text() == "1"
    with files.staging_file(final, overwrite=True) as file:
        file.write_text("2")
    assert final.read_text() == "2"
    assert names(tmp_path) == ["x"]
    with pytest.raises(FileNotFoundError) as caught, files.staging_file(tmp_path / "none" / "x"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "x"), "the name that people know"


def test_remove_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").write_text("")
    files.remove_folder(tmp_path / "model")
    assert names(tmp_path) == []


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "x.lock"
    code = f"""
        import sys, pathlib
        from qwen2_local import files
        with files.lock(pathlib.Path({str(path)!r})):
            print("held", flush=True)
            sys.stdin.read()
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"in use by process {holder.pid}"), files.lock(path):
            pass
        told = []

        def on_wait(who):
            told.append(who)
            holder.kill()

        with files.lock(path, wait_s=30, on_wait=on_wait):
            assert told == [f"process {holder.pid}"]
    with pytest.raises(UsageError), files.lock(path), files.lock(path):
        pass


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256(Path(tmp_path / "x")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
