"""`qwen2-local completion`: a script for the shell."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL: `eval "$(qwen2-local completion bash)"`."""
    from click.shell_completion import get_completion_class

    from qwen2_local.cli import qwen2_local

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(qwen2_local, {}, "qwen2-local", "_QWEN2_LOCAL_COMPLETE").source())
