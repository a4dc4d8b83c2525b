"""Makes outputs out of a checkpoint: planned, written aside with a journal, published whole; taken up again where a crash has ended it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from qwen2_converters.arriving import Arrivals
from qwen2_converters.blocks import convert_blocks
from qwen2_converters.companions import check_companions
from qwen2_converters.gguf import gguf_job
from qwen2_converters.imatrix import Importance, read_importance
from qwen2_converters.job import Job
from qwen2_converters.lora import open_adapter
from qwen2_converters.merge import Merge
from qwen2_converters.mlx import mlx_job
from qwen2_converters.plan import make_plan
from qwen2_converters.planned import Plan
from qwen2_converters.staging import Staging, opened, staged
from qwen2_converters.target import Target
from qwen2_local import __version__, cpu, files
from qwen2_local.errors import BadFile, DoesNotFit, UnsupportedModel
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint

_MOST_THREADS = 16  # each has some 12 MB under way


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion is. done, total: bytes of the outputs' tensors. tensor: the one under way, in its output's names.

    "hashing" is for models of the store alone: each is read once more, and the bytes are those of its files.
    """

    phase: Literal["checking", "converting", "publishing", "hashing"]
    done: int
    total: int
    tensor: str = ""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How to convert, beyond the targets.

    name, url: what to call the model in a GGUF file, by default as the source's folder, and where it is from. imatrix: the file of an
    importance matrix; this and pad_ffn, yarn (see `make_plan`) are for GGUF targets. lora: the folder of a PEFT adapter to merge.
    arrivals: fetches the weights meanwhile.
    """

    name: str = ""
    url: str = ""
    imatrix: Path | None = None
    pad_ffn: bool = False
    yarn: bool = False
    lora: Path | None = None
    arrivals: Arrivals | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output to make.

    final: where it will be. file: the name of its GGUF file, or "" for MLX. bare: `final` is to be that file, not a folder with it.
    refuse: raises UsageError where `final` must not be written. overwrite: replace what is there.
    seal: the last to write into the folder that becomes `final`.
    """

    target: Target
    final: Path
    file: str
    bare: bool
    refuse: Callable[[], None]
    overwrite: bool = False
    seal: Callable[[Checkpoint, Path], None] = lambda _checkpoint, _folder: None


@dataclass(frozen=True, slots=True)
class _Making:
    wanted: Wanted
    job: Job
    staging: Staging


def make(source: Path, wanted: Sequence[Wanted], options: Options, report: OnProgress) -> None:
    """Makes all that is `wanted` of the checkpoint in the folder `source`, which is read once. What an earlier run has finished is not done again.

    Killed or stopped, the same call goes on. Damaged weights and a full disk leave nothing. Raises as `convert` does.
    """
    own = {files.partial_of(one.final) for one in wanted}
    for folder in {one.final.parent for one in wanted}:
        files.sweep(folder, keep=own)
    if not any(path.exists() for path in own):
        for one in wanted:
            one.refuse()  # before any work
    checkpoint, plans = _checked(source, [one.target for one in wanted], options)
    importance = read_importance(options.imatrix, checkpoint.config) if options.imatrix else None
    merge = _merge(checkpoint, options.lora) if options.lora else None
    total = sum(plan.nbytes for plan in plans)
    report(Progress("checking", 0, total))
    jobs = [_job(checkpoint, plan, one, options, importance) for one, plan in zip(wanted, plans, strict=True)]
    origin = _origin(checkpoint, options, merge)
    with ExitStack() as stack:
        makings: list[_Making] = []
        with _tidied(makings):
            for one, job in zip(wanted, jobs, strict=True):
                staging = stack.enter_context(staged(one.final, job, _fingerprint(origin, job), file=one.bare))
                makings.append(_Making(one, job, staging))
        left = _left(makings)
        with _tidied(left):
            for making in left:
                making.wanted.refuse()
            _require_free(left)
        arrivals = _Watched(options.arrivals) if options.arrivals else None
        with _tidied(left, DoesNotFit, BadFile, unless=arrivals), _disk_errors(left):
            _write(checkpoint, left, arrivals, merge, report)
            if left and _origin(checkpoint, options, merge) != origin:
                fault = f"{checkpoint.folder}, or a file that goes with it, changed while it was converted."
                raise BadFile(fault, hint="Run the same command again, and let nothing change it meanwhile.")
        with _tidied(left):
            for making in left:
                if making.wanted.overwrite:  # hours may have gone by
                    making.wanted.refuse()
                making.staging.publish(overwrite=making.wanted.overwrite)
        for making in makings:
            making.staging.discard()


def check(source: Path, target: Target, options: Options | None = None) -> tuple[Checkpoint, Plan]:
    """The validated checkpoint in the folder `source`, and what converting it will write. Reads no weights; raises as `convert` does."""
    checkpoint, plans = _checked(source, [target], options or Options())
    return checkpoint, plans[0]


def name_of(source: Path) -> str:
    """What to call the checkpoint in the folder `source`: as the folder, or as the hub does if it lies in its cache."""
    folder = source.resolve()
    if folder.parent.name == "snapshots":  # huggingface_hub's cache: models--Qwen--Qwen2-0.5B/snapshots/REVISION
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _checked(source: Path, targets: Sequence[Target], options: Options) -> tuple[Checkpoint, list[Plan]]:
    if source.is_file():
        kind = "a GGUF file" if source.suffix == ".gguf" else "a file"
        raise UnsupportedModel(f"{source} is {kind}; conversions start from a Hugging Face folder.", hint="Fetch the original checkpoint.")
    checkpoint = open_checkpoint(source)
    gguf = any(target.format == "gguf" for target in targets)
    plans = []
    for target in targets:
        # What is for GGUF alone is refused where there is no such target.
        for_gguf = target.format == "gguf" or not gguf
        plans.append(make_plan(
            checkpoint, target,
            imatrix=options.imatrix is not None and for_gguf, pad_ffn=options.pad_ffn and for_gguf, yarn=options.yarn and for_gguf,
        ))  # fmt: skip
    check_companions(checkpoint)
    return checkpoint, plans


def _job(checkpoint: Checkpoint, plan: Plan, wanted: Wanted, options: Options, importance: Importance | None) -> Job:
    if wanted.target.format == "mlx":
        return mlx_job(checkpoint, plan)
    name = options.name or name_of(checkpoint.folder)
    return gguf_job(checkpoint, plan, name=name, file=wanted.file, importance=importance, url=options.url)


def _merge(checkpoint: Checkpoint, folder: Path) -> Merge:
    merge = Merge(open_adapter(folder, checkpoint.config))
    merge.check(checkpoint)
    return merge


def _origin(checkpoint: Checkpoint, options: Options, merge: Merge | None) -> list[str]:
    """All that decides the bytes of an output, but for the plan and the header."""
    origin = [__version__, _version("llama-cpp-python")]
    for shard in checkpoint.shards:
        state = shard.stat()
        # One that is fetched meanwhile may come and go.
        origin.append(f"{shard.name} {options.arrivals.identity}" if options.arrivals else f"{shard} {state.st_size} {state.st_mtime_ns}")
    return [*origin, files.sha256(options.imatrix) if options.imatrix else "", merge.identity if merge else ""]


def _fingerprint(origin: Sequence[str], job: Job) -> str:
    """Outputs of one fingerprint have the same bytes, whichever runs make them."""
    headers = (f"{file.name} {file.size} {hashlib.sha256(file.header).hexdigest()}" for file in job.files)
    return hashlib.sha256("\n".join((*origin, str(job.plan), *headers)).encode("utf-8", "surrogateescape")).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _left(makings: Sequence[_Making]) -> list[_Making]:
    """What is not published yet."""
    left = [making for making in makings if not making.staging.published]
    if len(left) < len(makings) and all(making.staging.entries is None and os.path.lexists(making.wanted.final) for making in left):
        return []  # an earlier run was ended while it tidied up, which comes after all is published
    return left


def _require_free(makings: Sequence[_Making]) -> None:
    needed: dict[Path, int] = {}
    for making in makings:
        place = making.wanted.final.parent
        needed[place] = needed.get(place, 0) + making.job.plan.disk - files.used_bytes(making.staging.folder)
    for place, count in needed.items():
        files.require_free(place, count)


@contextmanager
def _disk_errors(makings: Sequence[_Making]) -> Iterator[None]:
    if not makings:
        yield
        return
    final = makings[0].wanted.final
    with files.disk_errors(final if len(makings) == 1 else final.parent, sum(making.job.plan.disk for making in makings)):
        yield


def _write(checkpoint: Checkpoint, makings: Sequence[_Making], arrivals: Arrivals | None, merge: Merge | None, report: OnProgress) -> None:
    total = sum(making.job.plan.nbytes for making in makings)
    done = 0

    def advance(tensor: str, count: int) -> None:
        nonlocal done
        done += count
        report(Progress("converting", done, total, tensor))

    with ExitStack() as stack:
        outputs, journals = [], []
        for making in makings:
            output, journal = stack.enter_context(opened(making.staging, making.job))
            outputs.append(output)
            journals.append(journal)
            done += _finished_bytes(making.job.plan, journal.finished)
        convert_blocks(checkpoint, outputs, advance, threads=min(cpu.cores(), _MOST_THREADS), arrivals=arrivals, delta=merge)
        report(Progress("publishing", total, total))
        for making, journal in zip(makings, journals, strict=True):
            _finish(checkpoint, making)
            journal.whole()


def _finish(checkpoint: Checkpoint, making: _Making) -> None:
    """Writes what lies beside the weights, and reads the headers back."""
    folder = making.staging.made.parent if making.wanted.bare else making.staging.made
    making.job.finish(folder)
    if making.wanted.target.format == "gguf":
        open_gguf(folder / making.wanted.file)
    else:
        open_checkpoint(folder)
    making.wanted.seal(checkpoint, folder)
    files.sync_tree(folder)


def _finished_bytes(plan: Plan, finished: frozenset[int]) -> int:
    """Bytes of the pieces in `finished`, which are counted as `Ledger` does."""
    pieces = ((tensor.nbytes // tensor.row_count * rows.count) for tensor in plan.tensors for rows in tensor.rows)
    return sum(nbytes for number, nbytes in enumerate(pieces) if number in finished)


@contextmanager
def _tidied(makings: Sequence[_Making], *spoilt: type[Exception], unless: _Watched | None = None) -> Iterator[None]:
    """Deletes what an error leaves if nothing of it is finished, or it is one of `spoilt`: then it could not be used again.

    unless: what they have raised spoils nothing but for a full disk.
    """
    try:
        yield
    except BaseException as error:
        late = unless is not None and error is unless.error and not isinstance(error, DoesNotFit)
        useless = isinstance(error, spoilt) and not late
        for making in makings:
            if useless or not making.staging.begun:
                with suppress(OSError):
                    making.staging.discard()
        raise


class _Watched:
    """Arrivals that remember what they have raised."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self.identity = arrivals.identity
        self.error: BaseException | None = None

    def wait(self, file: Path) -> None:
        try:
            self._arrivals.wait(file)
        except BaseException as error:
            self.error = error
            raise

    def consumed(self, file: Path) -> None:
        self._arrivals.consumed(file)
