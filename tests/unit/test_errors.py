"""Errors: one tree, drawn in its module's docstring; each with an exit code, what is wrong and what to do next."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from qwen2_local import errors
from qwen2_local.cli import EXIT_CODES
from qwen2_local.errors import Qwen2LocalError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Qwen2LocalError)]


def test_there_are_all_of_them() -> None:
    assert len(ALL) >= 12


@pytest.mark.parametrize("kind", ALL)
def test_it_says_what_and_the_next_step(kind: type[Qwen2LocalError]) -> None:
    error = kind("It broke.", hint="Mend it.")
    assert (error.what, error.hint) == ("It broke.", "Mend it.")
    assert str(error) == "It broke.\n  Mend it."
    assert str(kind("It broke.")) == "It broke."
    assert kind.__doc__


@pytest.mark.parametrize("kind", ALL)
def test_it_travels_between_processes(kind: type[Qwen2LocalError]) -> None:
    error = kind("It broke.", hint="修理")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is kind
        assert (twin.what, twin.hint, twin.exit_code) == (error.what, error.hint, error.exit_code)


def test_the_drawing_is_the_tree() -> None:
    """Name, depth and, where its parent has another, the exit code."""
    names = {kind.__name__ for kind in ALL}
    drawn: dict[str, tuple[str, int]] = {}
    above: list[tuple[int, str, int]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([ │├└─]*)([A-Z]\w+) *(?:exit code )?(\d+)?", line)
        if not found or found[2] not in names:
            continue
        depth, name = len(found[1]), found[2]
        above = [entry for entry in above if entry[0] < depth]
        code = int(found[3]) if found[3] else above[-1][2]
        drawn[name] = (above[-1][1] if above else "Exception", code)
        above.append((depth, name, code))
    assert drawn == {kind.__name__: (kind.__base__.__name__, kind.exit_code) for kind in ALL if kind.__base__}


def test_every_exit_code_is_documented_in_the_help() -> None:
    documented = set(map(int, re.findall(r"(\d+) [a-z]", EXIT_CODES)))
    assert {kind.exit_code for kind in ALL} <= documented
