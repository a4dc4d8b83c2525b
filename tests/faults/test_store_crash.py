"""SIGKILL while a model is made or removed: nothing half-made is ever listed, and the next start sweeps what is left."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qwen2_local import files
from qwen2_local.store import Store
from tests.support.installed import install

ROOT = Path(__file__).parents[2]

MAKER = """
    import os, signal, sys
    from pathlib import Path
    from qwen2_local import files
    from qwen2_local.store import Store
    from tests.support.installed import install

    # Dies before call number N of whatever changes the disk or makes it durable.
    left = int(sys.argv[2])
    def counted(real):
        def call(*args, **more):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)
        return call
    for owner, name in ((os, "open"), (os, "fsync"), (os, "ftruncate"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "write_bytes")):
        setattr(owner, name, counted(getattr(owner, name)))
    install(Store(Path(sys.argv[1])), "7b:q4_0")
    print("done")
"""

REMOVER = MAKER.replace('install(Store(Path(sys.argv[1])), "7b:q4_0")', 'Store(Path(sys.argv[1])).remove("7b:q4_0")').replace(
    '(os, "open"), ', '(os, "unlink"), (os, "rmdir"), (os, "open"), '
)


REPLACER = MAKER.replace(
    'install(Store(Path(sys.argv[1])), "7b:q4_0")',
    """
    with files.staging(Path(sys.argv[1]) / "model", overwrite=True) as folder:
        (folder / "new").write_bytes(b"")
    """.strip(),
).replace('(os, "open"), ', '(os, "unlink"), (os, "rmdir"), (os, "open"), ')


def run(code, folder, steps):
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(steps)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".qwen2-")]


def test_a_maker_killed_at_any_step_leaves_nothing_listed(tmp_path):
    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        ended = run(MAKER, folder, steps)
        store = Store(folder)
        assert leftovers(folder) == []
        if ended.stdout == "done\n":
            assert store.get("7b:q4_0")
            assert steps > 10, "the steps were not counted"
            return
        assert ended.returncode == -9, ended.stderr
        for listed in store.list():
            # Killed after the rename: then it is whole.
            assert store.get(listed.name)
        if not store.list():
            install(store, "7b:q4_0")
            assert store.get("7b:q4_0")
    pytest.fail("it never finished")


def test_a_remover_killed_at_any_step_leaves_the_whole_or_nothing(tmp_path):
    for steps in range(100):
        folder = tmp_path / str(steps)
        folder.mkdir()
        install(Store(folder), "7b:q4_0")
        ended = run(REMOVER, folder, steps)
        store = Store(folder)
        assert leftovers(folder) == []
        for listed in store.list():
            assert store.get(listed.name)
        if ended.stdout == "done\n":
            assert store.list() == []
            return
        assert ended.returncode == -9, ended.stderr
    pytest.fail("it never finished")


def test_a_replacement_killed_at_any_step_leaves_the_old_or_the_new(tmp_path):
    seen = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "old").write_text("")
        ended = run(REPLACER, folder, steps)
        files.sweep(folder)
        assert [path.name for path in folder.iterdir()] == ["model"]
        (only,) = (folder / "model").iterdir()
        seen.append(only.name)
        if ended.stdout == "done\n":
            assert seen == sorted(seen, reverse=True)
            assert set(seen) == {"old", "new"}
            return
        assert ended.returncode == -9, ended.stderr
    pytest.fail("it never finished")


def test_what_a_living_maker_builds_is_not_swept(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from qwen2_local.store import Store
        with Store(Path(sys.argv[1])).add("7b") as draft:
            (draft.folder / "model.gguf").write_bytes(b"half")
            print("building", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        assert maker.stdout.readline() == b"building\n"
        assert Store(tmp_path).list() == []
        assert len(leftovers(tmp_path)) == 1
        maker.kill()
    assert Store(tmp_path).list() == []
    assert leftovers(tmp_path) == []
