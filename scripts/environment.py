"""Makes `.venv` beside the project: a virtual environment, uv in it, and what pyproject.toml asks for. Needs Python's own library only.

pip fetches uv, so pip's settings (PIP_*, pip.conf) hold there; uv fetches and builds the rest, with its own (UV_*, uv.toml). A stamp in
`.venv` says what was set up and from what; as long as that is so, nothing is run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv>=0.9"  # hands pyproject's config-settings-package on to the build

COMPILER = """llama.cpp is built for this CPU, and that takes a C and C++ compiler:
  Debian, Ubuntu   sudo apt install g++
  Fedora           sudo dnf install gcc-c++
  Arch             sudo pacman -S gcc
  macOS            xcode-select --install
Then run the same command again."""

NO_PIP = """this Python has no pip to begin with.
  Debian, Ubuntu   sudo apt install python3-venv
  elsewhere        python3 -m ensurepip
Then run the same command again. Or, with uv (https://docs.astral.sh/uv): uv run qwen2-local"""


class SetupError(Exception):
    """What only a person can mend. The text says what, and how."""


class Environment:
    """The virtual environment of one checkout."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.program = self.folder / "bin" / "qwen2-local"
        self._uv = self.folder / "bin" / "uv"
        self._log = self.folder / "set-up.log"
        self._stamp_file = self.folder / "set-up.json"

    def ready(self, *, dev: bool = False) -> bool:
        """Is all there that is asked for, made from today's pyproject.toml? Starts no process."""
        stamp = self._stamp()
        if not self.program.exists() or any(stamp.get(name) != value for name, value in self._basis().items()):
            return False
        # What could not be built is tried again once there is another compiler.
        return (not dev or stamp.get("dev") is True) and stamp.get("failed with", compiler()) == compiler()

    def set_up(self, *, dev: bool = False) -> None:
        """Make the environment, or bring it up to date; one process does, others wait. dev: with the tests' needs, and MLX.

        Raises SetupError.
        """
        with self._alone():
            if self.ready(dev=dev):
                return
            say(f"setting up {self.folder}")
            dev = dev or self._stamp().get("dev") is True
            self._make_folder()
            self._install_uv()
            whole = self._install_libraries(dev)
            stamp = {**self._basis(), "dev": dev, **({} if whole else {"failed with": compiler()})}
            aside = self._stamp_file.with_suffix(".new")
            aside.write_text(json.dumps(stamp, indent=1), "utf-8")
            aside.replace(self._stamp_file)

    def _make_folder(self) -> None:
        stamp = self._stamp()
        moved = any(stamp.get(name, value) != value for name, value in self._basis().items() if name != "pyproject")
        if not moved and _works(str(self.python), "-c", "pass"):
            return
        # Debian splits ensurepip off into a package of its own; the system's pip serves then.
        pip = [] if importlib.util.find_spec("ensurepip") else ["--without-pip"]
        code, said = self._run("making the folder", sys.executable, "-m", "venv", "--clear", *pip, str(self.folder))
        if code:
            raise SetupError(f"the virtual environment cannot be made.\n{_end(said)}\nOn Debian and Ubuntu this helps: sudo apt install python3-venv")

    def _install_uv(self) -> None:
        if _works(str(self._uv), "--version"):
            return
        inside, outside = [str(self.python), "-m", "pip"], [sys.executable, "-m", "pip"]
        if _works(*inside, "--version"):
            pip = inside
        elif _works(*outside, "--version"):
            pip = [*outside, "--python", str(self.python)]
        else:
            raise SetupError(NO_PIP)
        code, said = self._run("fetching uv with pip", *pip, "install", UV)
        if code:
            raise SetupError(f"pip cannot install uv.\n{_end(said)}")

    def _install_libraries(self, dev: bool) -> bool:
        """False if llama.cpp could not be built, where MLX serves without it."""
        sync = [str(self._uv), "sync", "--project", str(self.root), "--python", str(self.python)]
        sync += ["--inexact"]  # uv itself stays
        sync += ["--extra", "mlx"] if dev else ["--no-dev"]
        code, said = self._run("fetching libraries; llama.cpp is built for this CPU (some minutes, once)", *sync)
        if code and "UnknownIssuer" in said:
            # A company's proxy, known to the system. pip trusts those by itself.
            os.environ["UV_SYSTEM_CERTS"] = "1"
            code, said = self._run("again, with the system's certificates", *sync)
        if code == 0:
            return True
        if "Failed to build" not in said or "llama-cpp-python" not in said:
            raise SetupError(f"uv cannot install the libraries.\n{_end(said)}\nThe whole story: {self._log}")
        reason = f"llama.cpp cannot be built.\n{_end(said)}\nThe whole story: {self._log}" if compiler() else COMPILER
        if not dev and not (sys.platform == "darwin" and platform.machine() == "arm64"):
            raise SetupError(reason)
        say(f"{reason}\nUntil then: without llama.cpp. MLX runs MLX and Hugging Face folders, but no GGUF files.")
        code, said = self._run("fetching libraries, without llama.cpp", *sync, "--no-install-package", "llama-cpp-python")
        if code:
            raise SetupError(f"uv cannot install the libraries.\n{_end(said)}\nThe whole story: {self._log}")
        return False

    def _basis(self) -> dict[str, str]:
        """What an environment depends on: pyproject.toml, the Python behind it, and where it lies (its scripts name that)."""
        digest = hashlib.sha256((self.root / "pyproject.toml").read_bytes()).hexdigest()
        return {"pyproject": digest, "python": os.path.realpath(self.python), "folder": str(self.folder)}

    def _stamp(self) -> dict[str, object]:
        try:
            stamp = json.loads(self._stamp_file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _run(self, what: str, *command: str) -> tuple[int, str]:
        """One step, its duration shown. Gives its exit code and all it said, which the log keeps too."""
        import subprocess
        import tempfile

        environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(self.folder)}
        environment.pop("VIRTUAL_ENV", None)
        with tempfile.TemporaryFile() as output, Clock(what) as clock:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=self.root)
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5)
                    clock.tick()
            finally:
                if process.poll() is None:  # Ctrl-C
                    process.terminate()
                    process.wait()
            output.seek(0)
            said = output.read().decode("utf-8", "replace").strip()
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n{said}\n\n")
        return process.returncode, said

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds a lock on the checkout's folder: no file is left behind."""
        import fcntl

        folder = os.open(self.root, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another process is setting up; waiting for it")
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


class Clock:
    """Shows on stderr how long a step takes: a running line on a terminal, else a line at the start, each minute and the end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._live = sys.stderr.isatty()

    def __enter__(self) -> Clock:
        self._started = self._said = time.monotonic()
        say(f"  {self._what}", end="" if self._live else "\n")
        return self

    def tick(self) -> None:
        """Call it now and then."""
        if self._live or time.monotonic() - self._said >= 60:
            self._said = time.monotonic()
            self._show("" if self._live else "\n")

    def __exit__(self, *_: object) -> None:
        self._show("\n")

    def _show(self, end: str) -> None:
        seconds = round(time.monotonic() - self._started)
        spent = f"{seconds // 60} min {seconds % 60:02} s" if seconds >= 60 else f"{seconds} s"
        say(f"\r  {self._what}  {spent}" if self._live else f"    {spent}", end=end)


def say(text: str, end: str = "\n") -> None:
    """Speak to the person: stderr, so that stdout stays the program's."""
    print(text, end=end, file=sys.stderr, flush=True)


def compiler() -> str:
    """The C++ compiler that a build would find; empty if there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), "")


def newer_python(minimum: tuple[int, int] = (3, 11)) -> None:
    """Go on in a Python that is new enough: this one, or one beside it (macOS's own is 3.9). Raises SetupError if there is none."""
    if sys.version_info >= minimum:
        return
    for minor in range(14, minimum[1] - 1, -1):
        path = shutil.which(f"python3.{minor}")
        if path:
            os.execv(path, [path, *sys.argv])
    raise SetupError(
        f"Python 3.{minimum[1]} or newer is needed; this is {platform.python_version()}. Get one from https://www.python.org or your system."
    )


def _works(*command: str) -> bool:
    import subprocess

    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _end(said: str) -> str:
    """The last lines: what a tool says last is why it failed."""
    return "\n".join(f"  | {line}" for line in said.splitlines()[-25:])
