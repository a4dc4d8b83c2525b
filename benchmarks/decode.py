"""How fast tokens come, beside the least that any program must do: a bare loop of `llama_decode` and argmax, through ctypes.

    python benchmarks/decode.py [--models guide q4_0 q4_k_m q8_0] [--what greedy sampling prefill eight-64 eight-3000] [--folder FOLDER]

Each row is a ratio to the bare loop of tokens per second, both in one process, in turns, the median of several rounds (lowest and highest
behind it). backend: llama.cpp as this program uses it, alone; engine: with the scheduler and its thread; api: `Qwen2.write`, with the worker
process and text; llama-cpp-python: its `Llama.create_completion`. The models are the guide and the exact shape of Qwen2-0.5B in random
weights; `--folder` keeps those (1 GB of checkpoint, 0.3 to 0.5 GB each). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from qwen2_local import cpu, sampling
from qwen2_local.backends import checked, llamalib
from qwen2_local.backends.base import Choice, Layout, LoadOptions, Row
from qwen2_local.engine import Engine, Request, Token
from qwen2_local.kvcache import KvCache
from qwen2_local.loading import open_model
from qwen2_local.types import Sampling

HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("qwen2-local")
PARTS = ("greedy", "sampling", "prefill", "eight-64", "eight-3000")
SLICE = 512
QUESTION = "How do I convert a model to GGUF?"
DEFAULTS = Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1, seed=1)
"""What the generation_config of Qwen2's Instruct models says; the 0.5B's penalty."""
GREEDY = Sampling()


_clocks = [time.perf_counter]


def clock() -> float:
    return _clocks[0]()


class Contender(Protocol):
    """One way to get tokens."""

    def tokens(self, prompt: Sequence[int], count: int, how: Sampling) -> Iterator[object]:
        """Something for each token of a reply, when it comes."""
        ...

    def close(self) -> None: ...


class Bare:
    """The least: a batch, `llama_decode`, argmax. Always greedy."""

    def __init__(self, path: Path, context: int, sequences: int = 1) -> None:
        self.lib = lib = llamalib.library()
        self.model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = context * sequences, sequences, False
        params.n_threads_batch = cpu.cores()
        params.n_threads = min(cpu.cores(), max(1, lib.llama_model_size(self.model) >> 23))  # as the backend has it: see llama_native
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(SLICE, 0, 1)

    def feed(self, rows: Sequence[tuple[int, int, int]], wanted: int) -> None:
        """Decode (token, position, sequence) rows; logits of the last `wanted`."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = i >= len(rows) - wanted
        assert self.lib.llama_decode(self.context, batch) == 0

    def best(self, row: int) -> int:
        return int(np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, row), shape=(self.vocabulary,)).argmax())

    def read(self, prompt: Sequence[int]) -> int:
        """A prompt into sequence 0; the token after it."""
        self.lib.llama_memory_clear(self.memory, False)
        for start in range(0, len(prompt), SLICE):
            rows = [(token, start + i, 0) for i, token in enumerate(prompt[start : start + SLICE])]
            self.feed(rows, 1)
        return self.best(len(rows) - 1)

    def tokens(self, prompt: Sequence[int], count: int, how: Sampling) -> Iterator[object]:
        token = self.read(prompt)
        yield token
        lib, context, best = self.lib, self.context, self.best
        one = (ctypes.c_int32 * 1)()
        for _ in range(count - 1):
            one[0] = token
            assert lib.llama_decode(context, lib.llama_batch_get_one(one, 1)) == 0
            token = best(-1)
            yield token

    def together(self, length: int, steps: int) -> float:
        """Tokens per second of all sequences, each behind `length` tokens."""
        if self.lib.llama_memory_seq_pos_max(self.memory, 0) < length - 1:
            self.read(random_tokens(length, self.vocabulary, 1))
            for sequence in range(1, 8):
                self.lib.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        tokens = list(range(8))
        self.feed([(token, length, i) for i, token in enumerate(tokens)], 8)
        began = clock()
        for step in range(1, steps):
            self.feed([(token, length + step, i) for i, token in enumerate(tokens)], 8)
            tokens = [self.best(i) for i in range(8)]
        took = clock() - began
        for sequence in range(8):
            self.lib.llama_memory_seq_rm(self.memory, sequence, length, -1)
        return 8 * (steps - 1) / took

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


class Alone:
    """The backend without an engine."""

    def __init__(self, path: Path, context: int, sequences: int = 1) -> None:
        self.backend = checked.load(path, layout=Layout(sequences, context), options=LoadOptions("", context))
        self.opened = False

    def read(self, prompt: Sequence[int], choice: Choice) -> int:
        backend = self.backend
        if self.opened:
            backend.free(0)
        sequence, self.opened = backend.open(), True
        for start in range(0, len(prompt), SLICE):
            wanted = [choice] if start + SLICE >= len(prompt) else []
            (result,) = backend.step([Row(sequence, prompt[start : start + SLICE], wanted)])
        return result.chosen[0].token

    def tokens(self, prompt: Sequence[int], count: int, how: Sampling) -> Iterator[object]:
        vocabulary, window = self.backend.info.vocabulary, sampling.Window(prompt, how)

        def choice(number: int) -> Choice:
            return window.choice(vocabulary, sampling.uniform(1, number))

        token = self.read(prompt, choice(0))
        yield token
        for number in range(1, count):
            window.add(token)
            token = self.backend.step([Row(0, (token,), (choice(number),))])[0].chosen[0].token
            yield token

    def together(self, length: int, steps: int) -> float:
        backend, choice = self.backend, Choice(self.backend.info.vocabulary)
        if not self.opened:
            self.read(random_tokens(length, backend.info.vocabulary, 1), choice)
            for _ in range(7):
                backend.fork(0, length)
        tokens = list(range(8))
        backend.step([Row(i, (token,), (choice,)) for i, token in enumerate(tokens)])
        began = clock()
        for _ in range(steps - 1):
            results = backend.step([Row(i, (token,), (choice,)) for i, token in enumerate(tokens)])
            tokens = [result.chosen[0].token for result in results]
        took = clock() - began
        for sequence in range(8):
            backend.trim(sequence, length)
        return 8 * (steps - 1) / took

    def close(self) -> None:
        self.backend.close()


class WithEngine:
    """The engine, without the worker process; its KV cache in memory."""

    def __init__(self, path: Path, context: int, sequences: int = 1) -> None:
        self.kv = KvCache(None, memory=1 << 30)
        options = LoadOptions("benchmark", context)
        per_token = 1 << 20  # more than any here needs
        self.engine = Engine(
            lambda: checked.load(path, layout=Layout(1, context), options=options),
            kv=self.kv,
            parallel=sequences,
            kv_memory=sequences * context * per_token if sequences > 1 else None,
        )

    def request(self, prompt: Sequence[int], count: int, how: Sampling) -> Request:
        return Request(tuple(prompt), how, frozenset(), self.engine.info.vocabulary, count)

    def tokens(self, prompt: Sequence[int], count: int, how: Sampling) -> Iterator[object]:
        return (event for event in self.engine.generate(self.request(prompt, count, how)) if isinstance(event, Token))

    def together(self, length: int, steps: int) -> float:
        prompt = random_tokens(length - 1, self.engine.info.vocabulary, 1)
        if length > SLICE:
            list(self.tokens(prompt, 1, GREEDY))  # what they have in common is read once
        stamps: list[list[float]] = [[] for _ in range(8)]

        def reader(number: int) -> None:
            stamps[number].extend(clock() for _ in self.tokens([*prompt, number], steps, GREEDY))

        readers = [threading.Thread(target=reader, args=(number,)) for number in range(8)]
        for one in readers:
            one.start()
        for one in readers:
            one.join()
        begin, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
        return sum(begin < stamp <= end for times in stamps for stamp in times) / (end - begin)

    def close(self) -> None:
        self.engine.close()
        self.kv.close()


class Api:
    """What a program gets that says `Qwen2(path)`."""

    def __init__(self, path: Path, context: int, sequences: int = 1) -> None:
        from qwen2_local import Qwen2

        self.model = Qwen2(str(path), context=context, kv_cache=False)

    def tokens(self, prompt: Sequence[int], count: int, how: Sampling) -> Iterator[object]:
        return self.model.write(
            prompt,
            max_tokens=count,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            repetition_penalty=how.repetition_penalty,
            seed=1,
        )

    def close(self) -> None:
        self.model.close()


class Peer:
    """llama-cpp-python's own class, as many threads as we have."""

    def __init__(self, path: Path, context: int, sequences: int = 1) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(str(path), n_ctx=context, n_threads=cpu.cores(), n_threads_batch=cpu.cores(), verbose=False)

    def tokens(self, prompt: Sequence[int], count: int, how: Sampling) -> Iterator[object]:
        self.llama.reset()
        return self.llama.create_completion(
            list(prompt),
            max_tokens=count,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k or 1,
            min_p=0.0,
            repeat_penalty=how.repetition_penalty,
            seed=1,
            stream=True,
        )

    def close(self) -> None:
        self.llama.close()


KINDS: dict[str, Callable[..., Any]] = {"bare": Bare, "backend": Alone, "engine": WithEngine, "api": Api, "llama-cpp-python": Peer}


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, min(vocabulary, 150_000), count)]


def decoding(how: Sampling, prompt: Sequence[int], count: int) -> Callable[[str, Contender, int], float]:
    """Tokens per second after the first one."""

    def measure(name: str, contender: Contender, number: int) -> float:
        stamps = [clock() for _ in contender.tokens(prompt, count, how)]
        if len(stamps) < count // 2:
            raise SystemExit(f"{name} ended after {len(stamps)} of {count} tokens")
        return (len(stamps) - 1) / (stamps[-1] - stamps[0])

    return measure


def reading(vocabulary: int, length: int) -> Callable[[str, Contender, int], float]:
    """Tokens of a prompt per second, until the first token of the reply. Every prompt is new."""
    seeds = itertools.count(100)

    def measure(name: str, contender: Contender, number: int) -> float:
        prompt = random_tokens(length, vocabulary, next(seeds))
        began = clock()
        next(iter(contender.tokens(prompt, 1, GREEDY)))
        return length / (clock() - began)

    return measure


def compete(contenders: dict[str, Any], measure: Callable[[str, Any, int], float], rounds: int) -> dict[str, Any]:
    """In turns, each round beginning with another; ratios to `bare` of the same round."""
    names = list(contenders)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first one warms up
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rate = measure(name, contenders[name], number)
            if number >= 0:
                rates[name].append(rate)
    report: dict[str, Any] = {"bare_tokens_per_s": round(statistics.median(rates["bare"]), 2)}
    for name in names[1:]:
        ratios = [ours / bare for ours, bare in zip(rates[name], rates["bare"], strict=True)]
        report[name] = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
    return report


def model_path(name: str, folder: Path) -> Path:
    """The guide's file, or one of random weights in the shape of 0.5B, made where it is missing."""
    if name == "guide":
        plan = open_model("guide", backend="llama.cpp").plan
        assert plan is not None
        return plan.path
    path = folder / f"0.5b-{name}.gguf"
    if not path.exists():
        source = folder / "0.5b"
        if not (source / "config.json").exists():
            subprocess.run([sys.executable, HERE / "random_checkpoint.py", "0.5b", source], check=True)
        subprocess.run([COMMAND, "convert", source, "--to", f"gguf:{name}", "-o", path], check=True, stdout=subprocess.DEVNULL)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["guide", "q4_0", "q4_k_m", "q8_0"], help="guide, or a type of GGUF")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contenders", nargs="+", choices=list(KINDS)[1:], default=list(KINDS)[1:])
    parser.add_argument("--folder", type=Path, help="where the models of random weights are, or will be made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=0, help="of a reply; by default 48 of the guide, 40 of 0.5B")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's processor time, not the clock: for a busy machine")
    options = parser.parse_args()
    if options.cpu_time:
        _clocks[0] = time.process_time
        options.contenders = [name for name in options.contenders if name != "api"]  # it computes in another process
    report: dict[str, Any] = {"processor": cpu.name(), "threads": cpu.cores(), "llama-cpp-python": llamalib.version()}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            path = model_path(name, options.folder or Path(temporary))
            report[name] = rows = {}
            for what in options.what:
                rows[what] = run(what, path, name == "guide", options)
                print(name, what, json.dumps(rows[what]), flush=True)
    print(json.dumps(report))


def run(what: str, path: Path, guide: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One row: loads what takes part in it, and lets it go again."""
    count = options.tokens or (48 if guide else 40)
    length = int(what.removeprefix("eight-")) if what.startswith("eight") else 0
    names = [name for name in ("bare", *options.contenders) if not length or hasattr(KINDS[name], "together")]
    context = length + 256 if length else 2048
    with ExitStack() as stack:
        contenders = {}
        for name in names:
            contenders[name] = KINDS[name](path, context, 8 if length else 1)
            stack.callback(contenders[name].close)
        vocabulary = contenders["bare"].vocabulary
        if length:
            return compete(contenders, lambda _name, contender, _round: contender.together(length, count), options.rounds)
        if what == "prefill":
            return compete(contenders, reading(vocabulary, 1024), options.rounds)
        prompt = question() if guide else random_tokens(16, vocabulary, 0)
        return compete(contenders, decoding(GREEDY if what == "greedy" else DEFAULTS, prompt, count), options.rounds)


def question() -> list[int]:
    from qwen2_local.chatml import render
    from qwen2_local.types import Message

    opened = open_model("guide", backend="llama.cpp")
    return list(render(opened.tokenizer, [Message("user", QUESTION)], default_system=opened.default_system))


if __name__ == "__main__":
    main()
