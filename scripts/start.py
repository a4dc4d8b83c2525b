"""Start qwen2-local from a clone: `python3 scripts/start.py [ARGUMENTS]`. The first start sets it up, with a build of llama.cpp for this CPU."""

from __future__ import annotations

import os
import sys

from environment import Environment, SetupError, newer_python, say


def main() -> None:
    """Never returns: becomes the program, or exits with 1 (130 for Ctrl-C)."""
    environment = Environment()
    try:
        newer_python()
        if not environment.ready():
            environment.set_up()
    except SetupError as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on")
        sys.exit(130)
    os.execv(environment.program, [str(environment.program), *sys.argv[1:]])


if __name__ == "__main__":
    main()
