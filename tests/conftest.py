"""What every test gets: a home of its own making, and no network."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of this session; what is converted once stays there. Child processes get it too.

    The temporary folder is its own as well: tests that run at the same time in another process may look at what lies in theirs.
    """
    folder, temporary = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2_LOCAL_HOME", str(folder))
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses connections of this process to anything but itself."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo))
        yield


def _guarded(real):
    def call(self, *args):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(args[-1][0]):
            raise OSError(f"a test may not reach {args[-1]}")
        return real(self, *args)

    return call


def _guarded_lookup(real):
    def call(host, *args, **more):
        if not _is_loopback(host):
            raise OSError(f"a test may not look up {host}")
        return real(host, *args, **more)

    return call


def _is_loopback(host) -> bool:
    return host in (None, "", "localhost", "::1", b"localhost") or str(host).startswith("127.")
