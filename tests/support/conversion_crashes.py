"""Ends conversions at their writes, and runs the same command again: what comes out has to be the same each time.

    python -m tests.support.conversion_crashes kill|lose SCENARIO [--points N]

kill: the process is killed before or within a write. lose: the system fails, and takes all with it that was not synced. By default at every
write; the last line says at how many. A process of its own, with one thread, so that it may fork.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_converters import install as installing
from qwen2_converters import journal
from qwen2_converters.convert import Options, convert, convert_all
from qwen2_converters.install import install_all
from qwen2_converters.target import Target
from qwen2_local.errors import UsageError
from qwen2_local.store import Store
from tests.support import crashes, tiny_checkpoint
from tests.support.arriving import LocalArrivals

GGUF, MLX = Target("gguf", "q4_0"), Target("mlx", "4bit")
SCENARIOS: dict[str, Callable[[Path, Path], object]] = {
    "gguf": lambda source, out: convert(source, GGUF, out / "out"),
    "mlx": lambda source, out: convert(source, MLX, out / "out"),
    "replaced": lambda source, out: convert_all(source, [(GGUF, out / "a"), (MLX, out / "b")], overwrite=True),
    "both": lambda source, out: convert_all(source, [(GGUF, out / "a"), (MLX, out / "b")]),
    "installed": lambda source, out: install_all(source, [(GGUF, "tiny:q4_0"), (MLX, "tiny:mlx-4bit")], Store(out)),
    "arriving": lambda source, out: _arriving(source, out),
}


def _arriving(source: Path, out: Path) -> None:
    stubs = out.parent / "stubs"
    arrivals = LocalArrivals(source, stubs)
    convert_all(stubs, [(GGUF, out / "a"), (MLX, out / "b")], options=Options(name="tiny", arrivals=arrivals))


def content(folder: Path) -> dict[str, bytes]:
    """All that lies in `folder`, but for locks, which stay."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.match(".*.lock")}


class Bench:
    """A checkpoint, what a scenario finds in the output folder, and what it has to make of that."""

    def __init__(self, work: Path, scenario: str) -> None:
        config = tiny_checkpoint.moe(num_hidden_layers=1, num_experts=4) if scenario == "arriving" else tiny_checkpoint.dense(num_hidden_layers=1)
        self.source = tiny_checkpoint.write(work / "hf", config, tiny_checkpoint.weights(config), shards=3)
        self.place = work / "place"
        self.run: Callable[[], object] = lambda: SCENARIOS[scenario](self.source, self.place / "out")
        self.before = work / "before"
        self.before.mkdir()
        if scenario == "replaced":
            other = tiny_checkpoint.write(work / "other", config, tiny_checkpoint.weights(config, seed=2))
            convert_all(other, [(GGUF, self.before / "a"), (MLX, self.before / "b")])
        self.fresh()
        self.run()
        self.wanted = content(self.place / "out")

    def fresh(self) -> Path:
        """Makes the output folder what it is before the scenario."""
        shutil.rmtree(self.place, ignore_errors=True)
        return Path(shutil.copytree(self.before, self.place / "out"))

    def again(self, where: str) -> None:
        """The same command once more. It may also find that it had been done."""
        try:
            self.run()
        except UsageError as error:
            assert "exist" in str(error), f"{where}: {error}"
        made = content(self.place / "out")
        assert made == self.wanted, f"{where}: {sorted(made)} differ in {[name for name in made if made[name] != self.wanted.get(name)]}"


def points(count: int, sample: int) -> list[int]:
    """`sample` of `count` points, spread; all for 0."""
    return list(range(count)) if not sample or sample >= count else sorted({round(number * (count - 1) / (sample - 1)) for number in range(sample)})


def kill(bench: Bench, sample: int) -> int:
    """Kills it at its writes; at how many."""
    out = bench.fresh()
    with crashes.counted(out) as changes:
        bench.run()
    chosen = points(len(changes), sample)
    for point in chosen:
        for torn in {False, changes[point] in ("write", "pwrite")}:
            out = bench.fresh()
            # Syncs are on a thread of their own, so their number varies a little.
            if crashes.killed(out, point, bench.run, torn=torn) or point > 0.9 * len(changes):
                bench.again(f"killed at {point} of {len(changes)}, {changes[point]}{', torn' if torn else ''}")
            else:
                raise AssertionError(f"it was not killed at {point} of {len(changes)}")
    return len(chosen)


def lose(bench: Bench, sample: int) -> int:
    """Takes away what was not synced, after each of its writes; after how many."""
    out = bench.fresh()
    log = crashes.recorded(out, bench.run)
    chosen = points(len(log.changes) + 1, sample)
    for point in chosen:
        for names in (False, True):
            out = bench.fresh()
            shutil.rmtree(out)
            out.mkdir()
            log.rebuild(point, out, names=names)
            last = log.changes[point - 1][0] if point else "nothing"
            bench.again(f"failed after {point} of {len(log.changes)}, {last}, names {'kept' if names else 'lost'}")
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=["kill", "lose"])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--points", type=int, default=0)
    options = parser.parse_args()
    # So small a model would be made before anything is due.
    journal._EVERY_BYTES = 10_000
    installing.now = lambda: "2024-06-07T00:00:00+00:00"  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work), options.scenario)
        hows: dict[str, Any] = {"kill": kill, "lose": lose}
        print(f"{options.how} {options.scenario}: {hows[options.how](bench, options.points)} points")


if __name__ == "__main__":
    sys.exit(main())
