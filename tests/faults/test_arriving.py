"""Conversions of checkpoints whose shards are still being fetched, and deleted once they are not needed any more."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qwen2_converters import journal
from qwen2_converters.convert import Options, Progress, convert_all
from qwen2_converters.target import Target
from qwen2_local.errors import BadFile, DoesNotFit, Qwen2LocalError
from tests.support import tiny_checkpoint
from tests.support.arriving import LocalArrivals

GGUF, MLX = Target("gguf", "q4_0"), Target("mlx", "4bit")
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


@pytest.fixture(params=["dense", "experts one by one", "experts stacked"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Its tensors are dealt out in turn, so that every stacked matrix comes from several shards."""
    config = tiny_checkpoint.dense() if request.param == "dense" else tiny_checkpoint.moe(num_experts=4)
    weights = tiny_checkpoint.weights(config)
    return tiny_checkpoint.write(tmp_path / "hf", config, tiny_checkpoint.fused(weights) if "stacked" in request.param else weights, shards=4)


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "wanted").mkdir()
    return converted(source, tmp_path / "wanted", Options(name="tiny"))


def converted(source: Path, folder: Path, options: Options, stop_after: float = 1.0) -> dict[str, bytes]:
    def stop(progress: Progress) -> None:
        if progress.done > progress.total * stop_after:
            raise KeyboardInterrupt

    convert_all(source, [(GGUF, folder / "a.gguf"), (MLX, folder / "b")], options=options, progress=stop)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_awaited_and_dropped_in_the_order_of_their_names(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out, stubs = tmp_path / "out", tmp_path / "stubs"
    out.mkdir()
    dropped_before: list[list[str]] = []

    def late(_: Path) -> None:
        dropped_before.append(arrivals.dropped.copy())
        time.sleep(0.01)

    arrivals = LocalArrivals(source, stubs, on_wait=late)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in stubs.glob("*.safetensors")) == size
    assert converted(stubs, out, Options(name="tiny", arrivals=arrivals)) == wanted
    assert arrivals.waited == arrivals.dropped == SHARDS
    assert dropped_before == [SHARDS[:count] for count in range(4)]


@pytest.mark.parametrize("failing", range(4))
@pytest.mark.parametrize("error", [OSError("the network is gone"), BadFile("a wrong hash"), KeyboardInterrupt()], ids=repr)
def test_a_shard_that_does_not_come_costs_nothing_of_the_others(
    source: Path, wanted: dict[str, bytes], failing: int, error: BaseException, tmp_path: Path
) -> None:
    out, stubs = tmp_path / "out", tmp_path / "stubs"
    out.mkdir()

    def fail(file: Path) -> None:
        if file.name == SHARDS[failing]:
            raise error

    first = LocalArrivals(source, stubs, on_wait=fail)
    with pytest.raises(type(error)):
        converted(stubs, out, Options(name="tiny", arrivals=first))
    assert first.dropped == SHARDS[:failing]
    # What was dropped is gone for good.
    for name in SHARDS[:failing]:
        (source / name).rename(tmp_path / name)
    then = LocalArrivals(source, stubs)
    assert then.dropped == []
    made = converted(stubs, out, Options(name="tiny", arrivals=then), stop_after=2)
    assert made == wanted
    assert then.waited == SHARDS[failing:]
    assert then.dropped == SHARDS


def test_a_full_disk_while_fetching_leaves_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fail(file: Path) -> None:
        if file.name == SHARDS[2]:
            raise DoesNotFit("full")

    with pytest.raises(DoesNotFit):
        converted(tmp_path / "stubs", out, Options(arrivals=LocalArrivals(source, tmp_path / "stubs", on_wait=fail)))
    assert list(out.iterdir()) == []


def test_stopped_within_a_shard_only_that_one_comes_again(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_EVERY_BYTES", 1)
    out, stubs = tmp_path / "out", tmp_path / "stubs"
    out.mkdir()
    first = LocalArrivals(source, stubs)
    with pytest.raises(KeyboardInterrupt):
        converted(stubs, out, Options(name="tiny", arrivals=first), stop_after=0.6)
    begun = first.waited[-1]
    assert begun not in first.dropped
    then = LocalArrivals(source, stubs)
    assert converted(stubs, out, Options(name="tiny", arrivals=then), stop_after=2) == wanted
    assert set(then.waited) <= set(SHARDS[SHARDS.index(begun) :])


def test_other_weights_under_the_same_name_start_over(source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    out, stubs = tmp_path / "out", tmp_path / "stubs"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        converted(stubs, out, Options(name="tiny", arrivals=LocalArrivals(source, stubs)), stop_after=0.6)
    other = LocalArrivals(source, stubs)
    other.identity = "tiny@2"
    assert converted(stubs, out, Options(name="tiny", arrivals=other), stop_after=2) == wanted
    assert other.waited == SHARDS


def test_a_stub_that_never_comes_is_no_model(source: Path, tmp_path: Path) -> None:
    """Nobody who converts stubs as they are gets a model of zeros: their fetcher decides."""
    (tmp_path / "out").mkdir()
    arrivals = LocalArrivals(source, tmp_path / "stubs", on_wait=lambda _: (_ for _ in ()).throw(Qwen2LocalError("gone")))
    with pytest.raises(Qwen2LocalError, match="gone"):
        converted(tmp_path / "stubs", tmp_path / "out", Options(arrivals=arrivals))
    assert list((tmp_path / "out").iterdir()) == []
