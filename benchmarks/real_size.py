"""Proof at a real size: a checkpoint of random weights in the exact shapes of Qwen2-0.5B, converted, loaded and run by the public commands.

    python benchmarks/real_size.py [--size 0.5b] [--folder FOLDER]     in the project's environment; 5 GB of disk for 0.5b

The words are noise; shapes, tokenizer, file sizes and speed are those of the real model. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("qwen2-local")
PROMPT = "Why is the sky blue? " * 25
TARGETS = ("gguf:q8_0", "gguf:q4_0", "gguf:f16", "mlx:4bit")


def run(*command: str | Path) -> tuple[str, float, float]:
    """What a command printed, its seconds, and its peak of resident memory in MB."""
    before = time.perf_counter()
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return text, time.perf_counter() - before, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def generate(model: Path, tokens: int, *more: str) -> dict[str, Any]:
    text, seconds, memory = run(COMMAND, "run", model, PROMPT, "--json", "--max-tokens", str(tokens), "--seed", "1", *more)
    usage = json.loads(text.splitlines()[-1])["usage"]
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "prefill_tokens_per_s": round(usage["prompt_tokens"] / usage["prefill_s"], 1),
        "decode_tokens_per_s": usage["decode_tokens_per_s"],
        "completion_tokens": usage["completion_tokens"],
        "whole_command_s": round(seconds, 2),
        "peak_mb": round(memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or will be made")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    options = parser.parse_args()
    report: dict[str, Any] = {"size": options.size}
    with tempfile.TemporaryDirectory() as work:
        source = options.folder or Path(work) / f"Qwen2-{options.size}"
        if not (source / "config.json").exists():
            run(sys.executable, HERE / "random_checkpoint.py", options.size, source)
        for target in options.targets:
            output = Path(work) / target.replace(":", "-") if target.startswith("mlx") else Path(work) / f"{target.replace(':', '-')}.gguf"
            _, seconds, memory = run(COMMAND, "convert", source, "--to", target, "-o", output)
            size = sum(file.stat().st_size for file in output.rglob("*")) if output.is_dir() else output.stat().st_size
            row: dict[str, Any] = {"convert_s": round(seconds, 1), "convert_peak_mb": round(memory), "output_mb": round(size / 1e6)}
            # MLX has no GPU on Linux: a few tokens show that it works.
            row |= generate(output, 4 if target.startswith("mlx") and sys.platform != "darwin" else options.tokens)
            report[target] = row
            print(target, json.dumps(row), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
