"""`qwen2-local bench`: how fast a model is here, as it is used: through the engine, not around it."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from qwen2_local.cli import output
from qwen2_local.cli.options import loads
from qwen2_local.errors import UsageError

if TYPE_CHECKING:
    from qwen2_local.model import Qwen2
    from qwen2_local.types import Completion

_PROMPTS = (128, 512, 2048)
_TOKENS = 64
_SHORT = 32
_BATCH = 8
_MOST_TRIES = 8


@dataclass(frozen=True, slots=True)
class Speed:
    """One measurement. tokens_per_s: the median of `runs` runs; slowest, fastest: of them."""

    what: str
    tokens_per_s: float
    slowest: float
    fastest: float
    runs: int


@click.command()
@click.argument("model", default="guide")
@click.option("--prompt", "prompts", type=click.IntRange(2, 1_000_000), multiple=True, metavar="N", help="Read prompts of N tokens; repeatable.")
@click.option("--tokens", type=click.IntRange(2, 100_000), default=_TOKENS, show_default=True, metavar="N", help="Write so many at a time.")
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, metavar="N", help="Measure each so often; the median counts.")
@click.option("--batch", type=click.IntRange(1, 64), default=_BATCH, show_default=True, metavar="N", help="So many requests at once, at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
@loads
def bench(model: str, prompts: tuple[int, ...], tokens: int, runs: int, batch: int, as_json: bool, loads: dict[str, Any]) -> None:
    """Measure MODEL here: the time to its first token, reading and writing in tokens per second, several requests at once, and memory.

    Prompts are random tokens, each another, so that nothing is known of them. Close other programs for a fair result.
    """
    from qwen2_local.model import Qwen2

    began = time.perf_counter()
    with output.Status() as status:
        status.show(f"loading {model}")
        loaded = Qwen2(model, report=status.bytes, **{**loads, "kv_cache": False, "parallel": batch})
    load_s = time.perf_counter() - began
    rows: list[Speed] = []
    with loaded, closing(_Bench(loaded, tokens, runs)) as bench, output.Status() as status:
        for warning in loaded.notes:
            output.note(f"note: {warning}")
        bench.require_room(max(prompts, default=0))
        first_s = bench.first_token() + load_s
        if not as_json:
            print(f"{model} · {loaded.info.name} {loaded.info.version} · loaded in {load_s:.2f} s, first token after {first_s:.2f} s")
        for what, measure in bench.plan(prompts or _PROMPTS, batch):
            if not rows and not as_json:
                print(f"{'':<32}{'tokens/s':>10}  slowest  fastest", flush=True)
            status.show(f"measuring: {what}")
            row = bench.measured(what, measure)
            status.clear()
            if row is None:
                output.note(f"note: {what} was not measured: the model ends its replies at once.")
                continue
            rows.append(row)
            if not as_json:
                print(f"{row.what:<32}{row.tokens_per_s:>10,.1f} {row.slowest:>8,.1f} {row.fastest:>8,.1f}", flush=True)
        memory = _peak_memory()
        if as_json:
            said = {"model": model, "machine": _machine(), "backend": asdict(loaded.info), "load_s": load_s, "first_token_s": first_s,
                    "peak_memory": memory, "speeds": [asdict(row) for row in rows]}  # fmt: skip
            print(json.dumps(said, ensure_ascii=False))
        elif memory:
            print(f"memory: {output.gigabytes(memory)} at most{'' if sys.platform == 'linux' else ', without what only the GPU sees'}")


class _Bench:
    """The measurements, with one model."""

    def __init__(self, loaded: Qwen2, tokens: int, runs: int) -> None:
        self._model = loaded
        self._tokens = tokens
        self._runs = runs
        self._random = random.Random(1)
        control = set(loaded.tokenizer.special.values())
        self._ids = [token for token in range(min(loaded.tokenizer.size, loaded.info.vocabulary)) if token not in control]
        self._streams: list[Any] = []

    def close(self) -> None:
        """Stop what is under way."""
        for stream in self._streams:
            stream.close()

    def require_room(self, prompt: int) -> None:
        """Raises UsageError for a prompt that does not fit into the context."""
        if prompt + self._tokens > self._model.longest:
            hint = f"Prompt and reply together may have {self._model.longest:,}."
            raise UsageError(f"{prompt:,} and {self._tokens:,} tokens do not fit into the context.", hint=hint)

    def first_token(self) -> float:
        """Seconds to the first token of a short prompt, on a model that has computed nothing yet."""
        began = time.perf_counter()
        self._reply(_SHORT, 1)
        return time.perf_counter() - began

    def plan(self, prompts: tuple[int, ...], batch: int) -> Iterator[tuple[str, Callable[[], float | None]]]:
        """What to measure: its name, and a function that gives tokens per second."""
        # A prompt that has been named is there: `require_room` has seen to it.
        sizes = [size for size in prompts if size + self._tokens <= self._model.longest]
        for size in sizes:
            yield f"read {size:,}", lambda size=size: self._read(size)  # type: ignore[misc]
        for size in sorted({_SHORT, max(sizes, default=_SHORT)}):
            yield f"write, {size:,} before", lambda size=size: self._write(size)  # type: ignore[misc]
        if self._model.sampling.temperature > 0:
            yield "write, its own sampling", lambda: self._write(_SHORT, own=True)
        if batch > 1:
            yield f"write, {batch} at once", lambda: self._together(batch)

    def measured(self, what: str, measure: Callable[[], float | None]) -> Speed | None:
        """The median of some runs; the first run, which warms up, does not count."""
        speeds = [speed for speed in [measure() for _ in range(self._runs + 1)][1:] if speed is not None]
        return Speed(what, statistics.median(speeds), min(speeds), max(speeds), len(speeds)) if speeds else None

    def _read(self, size: int) -> float:
        usage = self._reply(size, 1).usage
        return usage.prompt_tokens / usage.prefill_s

    def _write(self, size: int, *, own: bool = False) -> float | None:
        tokens, seconds = 0, 0.0
        for _ in range(_MOST_TRIES):
            usage = self._reply(size, self._tokens - tokens + 1, own=own).usage
            tokens, seconds = tokens + max(0, usage.completion_tokens - 1), seconds + usage.decode_s
            if tokens >= self._tokens - 1:
                break
        return tokens / seconds if tokens and seconds else None

    def _together(self, batch: int) -> float | None:
        self._streams = [self._begin(_SHORT, self._tokens) for _ in range(batch)]
        usages = [stream.finish().usage for stream in self._streams]
        self._streams = []
        tokens, seconds = sum(max(0, usage.completion_tokens - 1) for usage in usages), max(usage.decode_s for usage in usages)
        return tokens / seconds if tokens and seconds else None

    def _begin(self, size: int, tokens: int, *, own: bool = False) -> Any:
        prompt = self._random.choices(self._ids, k=size)
        sampling: dict[str, Any] = {"seed": 1} if own else {"temperature": 0.0, "repetition_penalty": 1.0}
        return self._model.write(prompt, max_tokens=tokens, persist=False, **sampling)

    def _reply(self, size: int, tokens: int, *, own: bool = False) -> Completion:
        stream = self._begin(size, tokens, own=own)
        self._streams = [stream]
        completion: Completion = stream.finish()
        self._streams = []
        return completion


def _machine() -> dict[str, object]:
    import platform

    from qwen2_local import __version__, cpu

    return {"program": __version__, "system": platform.platform(), "processor": cpu.name(), "cores": cpu.cores()}


def _peak_memory() -> int:
    """Bytes that this process has had in memory at most; 0 where that is not known."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
