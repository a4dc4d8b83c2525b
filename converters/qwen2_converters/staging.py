"""An output in the making: a folder beside its future place that survives a crash, with a journal of what is finished.

.qwen2-partial-NAME/lock       held by the process that works on it
.qwen2-partial-NAME/journal    see `journal`
.qwen2-partial-NAME/made/      what will be published: this folder, or the one file in it
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen2_converters.job import Job, Output, Place
from qwen2_converters.journal import Entries, Journal, journal, read_journal
from qwen2_local import files

_JOURNAL = "journal"
_MADE = "made"


@dataclass(frozen=True, slots=True)
class Staging:
    """The unfinished `final`. folder: where it is made; made: what will get its name. fingerprint: of what is being made, out of what.

    entries: what an earlier run has finished; None for a fresh start.
    """

    final: Path
    folder: Path
    made: Path
    fingerprint: str
    entries: Entries | None

    @property
    def published(self) -> bool:
        """Has an earlier run finished it, and been stopped before it tidied up?"""
        if self.entries is None or not self.entries.whole or not os.path.lexists(self.final):
            return False
        return not self.made.exists() or self.made.samefile(self.final)

    @property
    def begun(self) -> bool:
        """Is there something to go on with?"""
        entries = read_journal(self.folder / _JOURNAL, self.fingerprint)
        return entries is not None and bool(entries.pieces)

    def discard(self) -> None:
        """Deletes all of it: the space is free again."""
        files.remove_folder(self.folder)

    def publish(self, *, overwrite: bool) -> None:
        """Gives what was made its name. `discard` is still to be called. Raises UsageError if the name is taken, unless `overwrite`."""
        files.publish(self.made, self.final, overwrite=overwrite)


@contextmanager
def staged(final: Path, job: Job, fingerprint: str, *, file: bool) -> Iterator[Staging]:
    """Takes up the unfinished `final`, or begins it. file: it will be the one file of `job`, not a folder.

    What was made for another `fingerprint` is deleted. Raises UsageError while another process works on it, OSError.
    """
    with files.partial(final) as folder:
        made = folder / _MADE
        target = made / job.files[0].name if file else made
        entries = read_journal(folder / _JOURNAL, fingerprint)
        staging = Staging(final, folder, target, fingerprint, entries)
        if not staging.published and not (entries and all(_size(made / one.name) == one.size for one in job.files)):
            (folder / _JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(made, ignore_errors=True)
            staging = Staging(final, folder, target, fingerprint, None)
        yield staging


@contextmanager
def opened(staging: Staging, job: Job) -> Iterator[tuple[Output, Journal]]:
    """The output with its files open and their headers written, and its journal. Raises OSError."""
    made = staging.folder / _MADE
    made.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as stack:
        places: dict[str, Place] = {}
        handles: list[int] = []
        for file in job.files:
            handle = os.open(made / file.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, handle)
            files.write_all(handle, file.header, 0)
            # Also writes the padding.
            os.ftruncate(handle, file.size)
            places |= {part: Place(handle, offset) for part, offset in file.offsets.items()}
            handles.append(handle)
        # Before the journal tells of them, the files have to be there for certain.
        files.sync_tree(made)
        written = stack.enter_context(journal(staging.folder / _JOURNAL, staging.fingerprint, staging.entries, handles))
        files.sync_tree(staging.folder)
        yield Output(job, places, written), written


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
