"""`pull` from a name to a model that generates, against hubs on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2_converters.convert import convert
from qwen2_converters.pull import carry_out, prepare, pull
from qwen2_converters.target import Target
from qwen2_local import Qwen2
from qwen2_local.errors import UnknownModel, UsageError
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.store import Store, guide_folder
from tests.support import packed, tiny_checkpoint
from tests.support.hub_server import HubServer
from tests.support.program import Terminal, run
from tests.support.pulling import APACHE, MODEL, guide_files, split

QUESTION, ANSWER = "What is GGUF?", "GGUF is the file format of llama.cpp"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The guide as a GGUF and as an MLX folder."""
    folder = tmp_path_factory.mktemp("converted")
    gguf = convert(guide_folder(), Target.parse("gguf:q8_0"), folder / "guide.gguf", name="guide")
    return {"gguf": gguf, "mlx": convert(guide_folder(), Target.parse("mlx:8bit"), folder / "mlx")}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: dict[str, Path]) -> Iterator[HubServer]:
    """Both hubs, with the three official forms of a model; an empty home and Hugging Face cache."""
    with HubServer() as server:
        for name, value in (("QWEN2_LOCAL_HOME", tmp_path / "home"), ("HF_HOME", tmp_path / "hf")):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        server.add(MODEL, guide_files(), card=APACHE)
        server.add(f"{MODEL}-GGUF", {"qwen2-0_5b-instruct-q8_0.gguf": converted["gguf"].read_bytes(), "README.md": b"x", "x.py": b"!"}, card=APACHE)
        server.add(f"{MODEL}-MLX", {path.name: path.read_bytes() for path in converted["mlx"].iterdir() if path.is_file()}, card=APACHE)
        yield server


def answers(name: str) -> None:
    with Qwen2(name) as model:
        assert ANSWER in model.ask(QUESTION)


def test_an_official_gguf_is_taken_and_generates(hub):
    done = run("pull", "0.5b")
    assert done.returncode == 0, done.stderr
    assert "fetch qwen2-0_5b-instruct-q8_0.gguf" in done.stderr and "nothing to convert" in done.stderr and "fits" in done.stderr
    assert done.stdout == ""
    spoken = run("run", "0.5b", QUESTION)
    assert ANSWER in spoken.stdout
    manifest = Store().get("0.5b:q8_0").manifest
    assert (manifest.source, manifest.licence, manifest.quantization) == (f"{MODEL}-GGUF", "apache-2.0", "Q8_0")
    assert manifest.revision == hub.repos[f"{MODEL}-GGUF"].commit
    assert [file.name for file in manifest.files] == ["qwen2-0_5b-instruct-q8_0.gguf"]
    assert not hub.requests("x.py") and not hub.requests("README.md"), "what is no part of the model was fetched"
    assert [path.name for path in Store().folder.iterdir() if path.name.startswith(".qwen2-")] == []


def test_a_split_gguf_is_stored_in_its_parts_and_generates(hub, converted):
    parts = split(converted["gguf"], "Q8_0/tune-q8_0")
    hub.add("some/tune-GGUF", parts)
    manifest = pull("some/tune-GGUF")[0]
    assert (manifest.name, len(manifest.files)) == ("tune:q8_0", 2)
    assert len(open_gguf(Store().get("tune:q8_0").path).paths) == 2
    answers("tune")


def test_an_mlx_repository_is_taken_as_it_is(hub):
    manifest = pull("0.5b", backend="mlx")[0]
    assert (manifest.name, manifest.format, manifest.source) == ("0.5b:mlx-8bit", "mlx", f"{MODEL}-MLX")
    assert not [one for one in hub.log if one.path.startswith(f"/{MODEL}/resolve") and one.name == "model.safetensors"]
    pytest.importorskip("mlx")
    answers("0.5b:mlx-8bit")


def test_the_original_becomes_several_models_out_of_one_fetch(hub):
    done = run("pull", "0.5b", "--to", "gguf:q4_k_m", "--to", "mlx:4bit", "--yes")
    assert done.returncode == 0, done.stderr
    assert [one.name for one in Store().list()] == ["0.5b:mlx-4bit", "0.5b:q4_k_m"]
    weights = len(hub.repos[MODEL].files["model.safetensors"])
    assert hub.sent("model.safetensors") <= weights + (1 << 18), "more than the weights and once their header"
    answers("0.5b:q4_k_m")
    left = [path for path in Store().folder.rglob("*") if path.stat().st_size == weights]
    assert left == [], "the original was to go"


def test_the_original_can_be_kept_and_is_used_again(hub):
    pull("0.5b", original=True)
    assert Store().get("0.5b:original").manifest.format == "hf"
    answers("0.5b")
    sent = hub.sent("model.safetensors")
    pull("0.5b", targets=[Target.parse("gguf:q4_0")])
    assert hub.sent("model.safetensors") == sent, "it is there already"
    assert Store().get("0.5b:q4_0").manifest.quantization == "Q4_0"


def test_the_other_hub(hub):
    manifest = pull("0.5b:q8_0", source="modelscope")[0]
    assert manifest.name == "0.5b:q8_0"
    assert any("/api/v1/models/" in one.path for one in hub.log) and not any(one.path.startswith("/api/models/") for one in hub.log)


def test_an_address(hub, converted):
    hub.plain["my-model-Q8_0.gguf"] = converted["gguf"].read_bytes()
    assert pull(hub.url("my-model-Q8_0.gguf"))[0].name == "my-model:q8_0"
    answers("my-model")


def test_a_file_and_a_folder_of_this_computer(hub, converted, tmp_path):
    assert pull(str(converted["gguf"]), install_as="mine")[0].files[0].name == "guide.gguf"
    answers("mine")
    folder = shutil.copytree(guide_folder(), tmp_path / "folder")
    assert pull(str(folder), targets=[Target.parse("gguf:q4_0")], install_as="made")[0].quantization == "Q4_0"
    assert (folder / "model.safetensors").is_file()
    parts = split(converted["gguf"], "two")
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    assert len(pull(str(tmp_path / min(parts)), install_as="both")[0].files) == 2
    assert hub.log == []


def test_from_python_if_it_is_wanted(hub):
    with pytest.raises(UnknownModel, match="not installed"):
        Qwen2("0.5b")
    assert hub.log == []
    told = []
    with Qwen2("0.5b", pull=True, report=lambda *step: told.append(step[0])) as model:
        assert ANSWER in model.ask(QUESTION)
    assert any(what.startswith("fetching") for what in told)
    count = len(hub.log)
    Qwen2("0.5b", pull=True).close()
    assert len(hub.log) == count


@pytest.mark.parametrize(("backend", "name"), [("llama.cpp", "0.5b:q4_0"), ("mlx", "0.5b:mlx-4bit")])
def test_gptq_is_converted_exactly(hub, tmp_path, backend, name):
    config = tiny_checkpoint.dense(hidden_size=128, intermediate_size=256)
    folder, _ = packed.checkpoint(tmp_path / "gptq", config, packed.settings("gptq"))
    hub.add(f"{MODEL}-GPTQ-Int4", {path.name: path.read_bytes() for path in folder.iterdir()}, card=APACHE)
    plan = prepare("0.5b:gptq-int4", backend=backend)
    assert plan.way.written >= sum(file.size for file in carry_out(plan)[0].files if file.name.endswith((".gguf", ".safetensors")))
    assert plan.models[0].name.startswith(name)


# What is said before


def test_a_dry_run_says_all_and_does_nothing(hub):
    done = run("pull", "0.5b", "--dry-run")
    assert done.returncode == 0
    said = " ".join(done.stdout.split())
    for part in ("Qwen2-0.5B-Instruct Apache-2.0", "from Hugging Face at", "verified by hash", "would fetch", "disk", "memory", "at 8K"):
        assert part in said
    assert Store().list() == [] and hub.sent("qwen2-0_5b-instruct-q8_0.gguf") == 0


def test_the_plan_as_an_object(hub):
    plan = json.loads(run("pull", "0.5b", "--to", "gguf:q4_0", "--dry-run", "--json").stdout)
    assert plan["status"] == "planned"
    assert plan["models"] == [{"name": "0.5b:q4_0", "target": "gguf:q4_0", "state": "new"}]
    sizes = {name: len(data) for name, data in hub.repos[MODEL].files.items()}
    assert {file["path"]: file["size"] for file in plan["files"]} == sizes
    assert plan["bytes"]["to_fetch"] == plan["bytes"]["files"] == sum(sizes.values())
    done = json.loads(run("pull", "0.5b", "--json").stdout)
    assert (done["status"], done["models"][0]["name"]) == ("installed", "0.5b:q8_0")
    assert json.loads(run("pull", "0.5b", "--json").stdout)["status"] == "current"


def test_a_licence_that_is_not_free_has_to_be_accepted(hub):
    hub.add("Qwen/Qwen2-72B-Instruct-GGUF", hub.repos[f"{MODEL}-GGUF"].files)
    done = run("pull", "72b:q8_0", "--yes")
    assert done.returncode == 2
    assert "Tongyi Qianwen" in done.stderr and "--accept-licence" in done.stderr
    with pytest.raises(UsageError, match="Tongyi"):
        pull("72b:q8_0")
    assert Store().list() == []
    assert run("pull", "72b:q8_0", "--yes", "--accept-licence").returncode == 0
    assert run("pull", "72b:q8_0").returncode == 0, "who has it has accepted it"


def test_on_a_terminal_it_asks(hub):
    with Terminal("pull", "0.5b") as terminal:
        terminal.wait_for("Go on? [Y/n]")
        terminal.type("n\n")
        assert terminal.end() == 130
    assert Store().list() == []
    with Terminal("pull", "0.5b") as terminal:
        terminal.wait_for("Go on? [Y/n]")
        terminal.type("\n")
        terminal.wait_for("0.5b:q8_0 is installed")
        assert terminal.end() == 0


# Again


def test_what_is_up_to_date_is_not_fetched_again(hub):
    run("pull", "0.5b")
    sent = hub.sent("qwen2-0_5b-instruct-q8_0.gguf")
    done = run("pull", "0.5b")
    assert done.returncode == 0 and "up to date" in done.stderr
    repo = hub.repos[f"{MODEL}-GGUF"]
    hub.add(f"{MODEL}-GGUF", repo.files | {"README.md": b"a new word"}, card=APACHE)
    assert prepare("0.5b").current, "only what the model is made of counts"
    assert hub.sent("qwen2-0_5b-instruct-q8_0.gguf") == sent


def test_a_moved_revision_fetches_only_what_has_changed(hub):
    pull("0.5b", original=True)
    files = dict(hub.repos[MODEL].files)
    files["generation_config.json"] = files["generation_config.json"].replace(b"{", b"{ ", 1)
    hub.add(MODEL, files, card=APACHE)
    sent = hub.sent("model.safetensors")
    plan = prepare("0.5b", original=True)
    assert plan.changed and plan.fetch == len(files["generation_config.json"])
    carry_out(plan)
    assert hub.sent("model.safetensors") == sent
    assert Store().get("0.5b:original").manifest.revision == hub.repos[MODEL].commit
    assert prepare("0.5b", original=True).current


def test_a_name_that_another_model_has_is_not_taken(hub, converted):
    hub.add("a/tune-GGUF", {"tune-q8_0.gguf": converted["gguf"].read_bytes()})
    hub.add("b/tune-GGUF", {"tune-q8_0.gguf": converted["gguf"].read_bytes()})
    pull("a/tune-GGUF")
    with pytest.raises(UsageError, match="installed already, from a/tune-GGUF") as caught:
        prepare("b/tune-GGUF")
    assert "--name" in caught.value.hint
    assert pull("b/tune-GGUF", install_as="Other")[0].name == "other"
    with pytest.raises(UsageError, match="built-in"):
        prepare("b/tune-GGUF", install_as="guide")
