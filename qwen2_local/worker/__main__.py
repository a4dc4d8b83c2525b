"""`python -m qwen2_local.worker`: a worker, which takes orders on its standard input. People have no use for it."""

import os


def _take_pipes() -> tuple[int, int]:
    """Standard input and output, for messages alone: whatever else reads gets nothing, and what else writes goes where errors go."""
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return source, sink


if __name__ == "__main__":
    pipes = _take_pipes()  # before anything is imported that could write

    from qwen2_local.worker.server import serve

    serve(*pipes)
