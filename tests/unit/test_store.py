import json
import shutil
import sys
from pathlib import Path

import pytest

from qwen2_converters.target import VALID, Target
from qwen2_local import paths
from qwen2_local import store as module
from qwen2_local.errors import BadFile, UnknownModel, UnsupportedModel, UsageError
from qwen2_local.manifest import Manifest
from qwen2_local.store import GUIDE_TARGETS, Store, resolve
from tests.support.checkpoints import CONFIG, write_checkpoint
from tests.support.gguf_bytes import model
from tests.support.installed import install, manifest


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "home"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return Store()


def edit(store, **changes):
    path = store.folder / "7b" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_is_listed_got_and_removed(store):
    assert store.list() == []
    install(store, "7b:q4_0")
    install(store, "0.5b:mlx-4bit", "mlx")
    assert [one.name for one in store.list()] == ["0.5b:mlx-4bit", "7b:q4_0"]
    got = store.get("7b:q4_0")
    assert got.manifest.size == got.path.stat().st_size
    assert got.path.name == "model.gguf"
    assert store.get("0.5b:mlx-4bit").path.is_dir()
    store.remove("7b:q4_0")
    assert [one.name for one in store.list()] == ["0.5b:mlx-4bit"]
    with pytest.raises(UnknownModel):
        store.remove("7b:q4_0")


def test_a_manifest_survives_writing_and_reading(store):
    install(store, "7b:q4_0")
    first = store.get("7b:q4_0").manifest
    (store.folder / "x.json").write_text(first.dump())
    assert Manifest.read(store.folder / "x.json") == first


def test_nothing_half_made_is_listed(store):
    with pytest.raises(RuntimeError), store.add("7b") as draft:
        (draft.folder / "model.gguf").write_bytes(b"half")
        assert store.list() == []
        raise RuntimeError
    with pytest.raises(ValueError, match="no manifest"), store.add("7b") as draft:
        (draft.folder / "model.gguf").write_bytes(b"whole, but nobody said so")
    (store.folder / "stray").mkdir()
    (store.folder / "file").write_text("")
    assert store.list() == []
    with pytest.raises(UnknownModel):
        store.get("stray")


def test_a_taken_name_is_not_replaced(store):
    install(store, "7b")
    with pytest.raises(UsageError, match="exists"):
        install(store, "7b")
    assert store.get("7b").manifest.name == "7b"


def test_two_makers_of_one_model(store):
    with store.add("7b") as draft:
        with pytest.raises(UsageError, match="7b is in use by process"), Store().add("7b"):
            pass
        (draft.folder / "model.gguf").write_bytes(b"x")
        draft.manifest = manifest("7b", draft)
    assert store.get("7b")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A b", "7b:", ":x", "a:b:c", ".hidden", "x" * 200, "a@b", "7b\n"])
def test_impossible_names(store, name):
    for use in (store.get, store.remove, lambda name: store.add(name).__enter__()):
        with pytest.raises(UsageError):
            use(name)


def test_a_manifest_of_a_newer_version_is_listed_and_not_used(store):
    install(store, "7b")
    edit(store, schema=2, files="in a new form")
    assert [(one.name, one.manifest, one.note) for one in store.list()] == [("7b", None, "made by a newer version")]
    with pytest.raises(UnsupportedModel, match="newer version"):
        store.get("7b")
    store.remove("7b")
    assert store.list() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "1"}, {"schema": True}, {"name": 7}, {"name": "8b"}, {"format": "pickle"}, {"files": []}, {"files": [7]}, {"context": 0},
        {"files": [{"name": "../x.gguf", "size": 1, "sha256": "0" * 64}]}, {"files": [{"name": "x.gguf", "size": -1, "sha256": "0" * 64}]},
        {"files": [{"name": "x.gguf", "size": 1, "sha256": "0"}]}, {"files": [{"name": "x.py", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "x.gguf", "size": 1, "sha256": "0" * 64}, {"name": "X.gguf", "size": 1, "sha256": "0" * 64}]},
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_listed_and_not_used(store, changes):
    install(store, "7b")
    edit(store, **changes)
    assert [one.note for one in store.list()] == ["its manifest is damaged"]
    with pytest.raises(BadFile) as caught:
        store.get("7b")
    assert "`qwen2-local rm 7b`" in caught.value.hint


def test_a_manifest_that_is_no_json_says_how_to_go_on(store):
    install(store, "7b:q4_0")
    (store.folder / "7b@q4_0" / "manifest.json").write_text("{")
    with pytest.raises(BadFile, match=r"manifest\.json is no valid JSON") as caught:
        resolve("7b:q4_0")
    assert caught.value.hint == "`qwen2-local rm 7b:q4_0`, then get it again."


def test_a_file_cut_short_or_gone_is_named(store):
    install(store, "7b")
    file = store.folder / "7b" / "model.gguf"
    file.write_bytes(b"short")
    with pytest.raises(BadFile, match=r"model\.gguf is damaged: \d+ bytes are expected, it has 5"):
        store.get("7b")
    file.unlink()
    with pytest.raises(BadFile, match="it has 0"):
        store.get("7b")


def test_a_store_that_cannot_be_written_can_be_read(store, monkeypatch):
    install(store, "7b")
    monkeypatch.setattr(paths, "writable", lambda folder: False)
    assert Store().get("7b")
    for change in (lambda: store.remove("7b"), lambda: install(store, "8b")):
        with pytest.raises(UsageError, match="cannot be written"):
            change()


def test_a_home_that_cannot_be_made_is_an_empty_store(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN2_LOCAL_HOME", str(tmp_path / "file" / "home"))
    assert Store().list() == []


# resolve


def test_an_installed_name(store):
    install(store, "7b:q4_k_m")
    for name in ("7b:q4_k_m", "7B:Q4_K_M", "7b", "7B-Instruct"):
        ref = resolve(name)
        assert (ref.label, ref.format, ref.origin, ref.path.name) == ("7b:q4_k_m", "gguf", "installed", "model.gguf")
    install(store, "my-tune", "mlx")
    assert resolve("my-tune").format == "mlx"


def test_a_size_installed_twice_has_to_be_named(store):
    install(store, "7b:q4_0")
    install(store, "7b:q8_0")
    assert resolve("7b:q8_0").label == "7b:q8_0"
    with pytest.raises(UnknownModel, match="installed as 7b:q4_0 and 7b:q8_0"):
        resolve("7b")


def test_the_base_model_is_not_the_instruct_model(store):
    install(store, "7b-base:q4_0")
    with pytest.raises(UnknownModel, match="Qwen2-7B-Instruct is not installed"):
        resolve("7b")


def test_a_gguf_file(store):
    path = Path("my model.gguf")
    path.write_bytes(model().build())
    for name in ("my model.gguf", "./my model.gguf", str(path.absolute())):
        ref = resolve(name)
        assert (ref.format, ref.origin, ref.label) == ("gguf", "path", "my model.gguf")


def test_folders_tell_what_they_are(store):
    tensors = {"x": ("BF16", (4,))}
    assert resolve(str(write_checkpoint(Path("plain"), CONFIG, tensors))).format == "hf"
    assert resolve(str(write_checkpoint(Path("written-by-mlx"), CONFIG, tensors, metadata={"format": "mlx"}))).format == "mlx"
    assert resolve(str(write_checkpoint(Path("4bit"), CONFIG | {"quantization": {"bits": 4, "group_size": 64}}, tensors))).format == "mlx"


def test_a_folder_with_one_gguf_or_all_its_parts(store):
    folder = Path("fetched")
    folder.mkdir()
    first = folder / "m-00001-of-00002.gguf"
    first.write_bytes(b"GGUF")
    (folder / "m-00002-of-00002.gguf").write_bytes(b"GGUF")
    assert resolve("fetched/").path == first
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModel, match="holds 3 GGUF files"):
        resolve("./fetched")


def test_names_come_before_files_and_a_separator_makes_a_path(store):
    install(store, "7b")
    shutil.copy(store.get("7b").path, "7b")
    assert resolve("7b").origin == "installed"
    assert resolve("./7b").origin == "path"


def test_the_guide(store, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "package" / "store.py"))
    with pytest.raises(UnknownModel, match="no built-in model"):
        resolve("guide")
    write_checkpoint(tmp_path / "package" / "guide", CONFIG, {})
    ref = resolve("Guide")
    assert (ref.label, ref.format, ref.origin, ref.target) == ("guide", "hf", "built-in", "")
    ref = resolve("guide:MLX-4bit")
    assert (ref.label, ref.format, ref.origin, ref.target) == ("guide:mlx-4bit", "hf", "built-in", "mlx:4bit")
    for name in ("guide:q7_x", "guide:"):
        with pytest.raises(UnknownModel, match="there is no") as caught:
            resolve(name)
        assert "q4_0" in caught.value.hint


def test_a_hubs_id_finds_what_was_pulled_from_it(store):
    install(store, "0.5b:q4_0")
    assert resolve("qwen/qwen2-0.5b-instruct").label == "0.5b:q4_0"
    with pytest.raises(UnknownModel) as caught:
        resolve("someone/else")
    assert caught.value.hint == "If a hub has it: `qwen2-local pull someone/else`."


def test_the_original_gives_way_to_what_was_made_of_it(store):
    install(store, "7b:original", "hf")
    assert resolve("7b").format == "hf"
    install(store, "7b:q4_0")
    assert resolve("7b").label == "7b:q4_0"


def test_a_draft_that_fails_is_taken_up_again(store):
    with pytest.raises(KeyboardInterrupt), store.resume("7b") as draft:
        (draft.folder / "model.gguf").write_bytes(model().build())
        raise KeyboardInterrupt
    assert store.list() == []
    assert Store().unfinished("7b").is_dir(), "the sweep of the next start takes it away"
    with store.resume("7b") as draft:
        assert (draft.folder / "model.gguf").is_file()
        draft.manifest = manifest("7b", draft)
    assert store.get("7b").manifest.format == "gguf"
    assert not store.unfinished("7b").parent.exists()


def test_a_draft_without_a_manifest_was_of_use_to_others_only(store):
    with store.resume("7b") as draft:
        (draft.folder / "x").write_bytes(b"")
    assert store.list() == [] and not store.unfinished("7b").parent.exists()


def test_a_finished_draft_replaces_only_where_it_may(store):
    install(store, "7b")
    with pytest.raises(UsageError, match="exists"), store.resume("7b"):
        pass
    with store.resume("7b", replace=True) as draft:
        (draft.folder / "new.gguf").write_bytes(model().build())
        assert store.get("7b").path.name == "model.gguf"
        draft.manifest = manifest("7b", draft)
    assert store.get("7b").path.name == "new.gguf"


def test_the_guide_comes_as_every_target():
    assert {Target.parse(text).label: text for text in VALID} == GUIDE_TARGETS


def test_an_unknown_name_says_what_there_is(store):
    install(store, "7b:q4_k_m")
    with pytest.raises(UnknownModel) as caught:
        resolve("gpt")
    assert str(caught.value) == (
        'no model is called "gpt".\n  Qwen2 comes as 0.5b, 1.5b, 7b, 57b and 72b; installed here: guide, 7b:q4_k_m.\n'
        "  See `qwen2-local ls` and `qwen2-local pull --help`."
    )
    with pytest.raises(UnknownModel, match="Did you mean guide"):
        resolve("giude")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("7b", "`qwen2-local pull 7b`"),
        ("0.5b:q4_0", "`qwen2-local pull 0.5b:q4_0`"),
        ("Qwen/Qwen2-7B", "`qwen2-local pull 7b-base`"),
        ("72B-instruct", "`qwen2-local pull 72b`"),
    ],
)
def test_a_size_that_is_not_installed_says_how_to_get_it(store, name, command):
    with pytest.raises(UnknownModel, match="is not installed") as caught:
        resolve(name)
    assert command in caught.value.hint


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("./none.gguf", UnknownModel, "no file or folder"),
        ("none.gguf", UnknownModel, "no file or folder"),
        ("", UnknownModel, "missing"),
        ("a\0b", UnknownModel, "missing"),
        ("empty", UnknownModel, "holds no model"),
        ("page.gguf", BadFile, "an HTML page, not a model file"),
        ("pickle.bin", BadFile, "pickle"),
        ("empty/../model.safetensors", BadFile, "one file of a checkpoint"),
        ("x" * 5000, UnknownModel, "no model is called"),
    ],
)
def test_what_is_no_model(store, name, error, message):
    Path("empty").mkdir()
    Path("page.gguf").write_text("<!DOCTYPE html>")
    Path("pickle.bin").write_bytes(b"PK\x03\x04")
    Path("model.safetensors").write_bytes(b"")
    with pytest.raises(error, match=message):
        resolve(name)


def test_resolving_loads_no_numpy():
    import subprocess

    code = "import qwen2_local.store, sys; assert 'numpy' not in sys.modules, 'numpy'"
    subprocess.run([sys.executable, "-c", code], check=True)
