"""Options of the tests that crash the program."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-write", action="store_true", help="crash conversions at each of their writes, not at a sample: takes minutes")
