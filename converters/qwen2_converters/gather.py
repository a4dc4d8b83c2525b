"""Brings the files of a pull together: from this computer where they are here, else over the network."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qwen2_converters import remote
from qwen2_converters.download import download
from qwen2_converters.fetching import is_stub, make_stub
from qwen2_converters.here import link_or_copy, places, take
from qwen2_converters.hub import local, sources
from qwen2_converters.hub.repository import HubFile
from qwen2_converters.hub.speed import Stopwatch
from qwen2_converters.pull_plan import PullPlan
from qwen2_converters.pull_step import OnProgress, Step
from qwen2_converters.remote import RemoteFile


def gather(plan: PullPlan, folder: Path, report: OnProgress, *, late: bool) -> list[RemoteFile]:
    """Brings the files of the way into `folder`, verified: from this computer where they are here, else over the network.

    late: shards that are not here are left as stubs, to be fetched while they are converted; gives those.
    """
    repository, total, done = plan.way.repository, plan.way.fetched, 0
    first: list[RemoteFile] = []
    later: list[RemoteFile] = []
    for file in plan.way.files:
        advance = partial(_verified, report, file, done, total)
        if repository.is_local:
            link_or_copy(local.place(repository, file), folder / file.name, advance)
        elif not take(file, places(repository, file, plan.store, plan.draft), folder / file.name, advance):
            (later if late and file.name.endswith(".safetensors") else first).append(sources.remote(repository, file))
        done += file.size
    if first:
        watch = Stopwatch()

        def advance_all(at: remote.Progress) -> None:
            if at.phase == "fetching":
                watch.at(at.done)
            report(Step(at.phase, at.file, at.done, at.total, at.file_done, at.file_total))

        try:
            download(first, folder, progress=advance_all)
        finally:
            watch.remember()
    for shard in later:
        stub = folder / shard.name
        if not (stub.is_file() and stub.stat().st_size == shard.size and is_stub(stub)):
            report(Step("checking", shard.name, 0, 0))
            make_stub(shard, stub)
    return later


def _verified(report: OnProgress, file: HubFile, done: int, total: int, count: int) -> None:
    report(Step("verifying", file.name, done + count, total, count, file.size))
