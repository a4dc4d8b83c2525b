"""Feeds the readers of strangers' files with mutated and random ones: each is read, or refused by name, and nothing else.

    python -m tests.faults.fuzz --minutes 5            a child process that may not hang, nor take more than 200 MB
    python -m tests.faults.fuzz --minutes 1 --seed 7   the same files again

What broke the law is kept in the folder that the last line names. `test_fuzz_headers` runs the same for seconds, through hypothesis.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2_local.cli.inspect import _as_json, _show
from qwen2_local.errors import BadFile
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.config import read_config
from qwen2_local.formats.gguf import read_gguf
from qwen2_local.formats.safetensors import read_header
from qwen2_local.formats.summarize import summarize
from qwen2_local.manifest import Manifest
from tests.support.checkpoints import CONFIG, write_checkpoint
from tests.support.gguf_bytes import BOOL, F32, F64, I8, I32, STRING, U16, U32, U64, array, info, key, model, whole

LIMIT_MB = 200
HANG_S = 10
"""A case that takes longer is a hang. All files are small."""

Change = tuple[str, int, int, int]
"""What to do, where, and two more numbers, whose meaning depends on it."""

WAYS = ("bit", "byte", "length", "cut", "repeat", "drop", "number", "text", "random")
HUGE = (0, 1, 2**7, 2**8, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
NUMBERS = (
    "-1",
    "0",
    "1",
    "65536",
    "2147483648",
    "18446744073709551616",
    "1e308",
    "-1e999",
    "0.5",
    "NaN",
    "Infinity",
    "null",
    "true",
    "[]",
    "{}",
    '"x"',
)
NUMBERS += ("9" * 5000, "[[[[[[[[]]]]]]]]", "-0", "1e-999")
TEXTS = ('""', '"\\u0000"', '"\\ud800"', '"../../etc/passwd"', '"/etc/passwd"', '"a\\u001b[31m"', '"model.safetensors"', '"qwen2"', "1", "null", "[]")
TEXTS += ('"' + "x" * 5000 + '"', '"con"', '"U8"', '"U32"', '"F4"', '"yarn"', '"gptq"')


def mutated(content: bytes, changes: Sequence[Change]) -> bytes:
    """`content` after `changes`, one after the other."""
    for way, where, first, second in changes:
        content = _mutated(bytearray(content), way, where, first, second)
    return content


def _mutated(content: bytearray, way: str, where: int, first: int, second: int) -> bytes:
    size = len(content)
    if way == "random":
        return (
            random.Random(first).randbytes(second % 4096)
            if where % 2
            else bytes(content[: where % 64]) + random.Random(first).randbytes(second % 4096)
        )
    if not size:
        return b""
    at = where % size
    match way:
        case "bit":
            content[at] ^= 1 << first % 8
        case "byte":
            content[at] = first % 256
        case "length":
            # Where a small number stands in eight bytes, or four: lengths, counts, types, dimensions, offsets.
            fields = _fields(bytes(content), 8 if first % 2 else 4)
            if fields:
                place, width = fields[where % len(fields)], 8 if first % 2 else 4
                content[place : place + width] = (HUGE[second % len(HUGE)] % (1 << 8 * width)).to_bytes(width, "little")
        case "cut":
            del content[at:]
        case "repeat":
            length = first % 400
            content[at:at] = content[second % size : second % size + length]
        case "drop":
            del content[at : at + first % 400]
        case "number" | "text":
            literal = rb"-?\d+(\.\d+)?" if way == "number" else rb'"[^"\\]{0,60}"'
            found = list(re.finditer(literal, content))
            if found:
                match, choices = found[where % len(found)], NUMBERS if way == "number" else TEXTS
                content[match.start() : match.end()] = choices[first % len(choices)].encode()
                _relength(content, second)
    return bytes(content)


def _relength(content: bytearray, wish: int) -> None:
    """A safetensors header that has changed its length says so, three times out of four."""
    if len(content) > 8 and content[8:9] == b"{" and wish % 4:
        end = content.find(b"}}", 8)
        if end > 0:
            content[:8] = struct.pack("<Q", end + 2 - 8)


def _fields(content: bytes, width: int) -> list[int]:
    code = "<Q" if width == 8 else "<I"
    return [at for at in range(len(content) - width + 1) if 0 < struct.unpack_from(code, content, at)[0] < 1 << 12]


# The files to begin with, and who reads them


@dataclass(frozen=True)
class Subject:
    """A kind of file. seeds: sound ones. lay: puts one into an empty folder and gives what the readers are called with."""

    name: str
    seeds: tuple[bytes, ...]
    lay: Callable[[Path, bytes], Path]
    readers: tuple[Callable[[Path], Any], ...]


def inspected(path: Path) -> None:
    """What `qwen2-local inspect --json --tensors --template` does, and the page for people."""
    summary = summarize(path)
    printed = json.dumps(_as_json(path, summary, True, True), allow_nan=False)
    assert printed.isascii()
    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        _show(path, summary)
    assert not set(page.getvalue()) & FORBIDDEN, "control characters reach the terminal"


FORBIDDEN = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x202E, 0x2066)} - {"\n"}

TENSORS = {
    "a.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
    "b.scales": {"dtype": "F32", "shape": [3], "data_offsets": [64, 76]},
    "b.weight": {"dtype": "U32", "shape": [1, 2], "data_offsets": [76, 84]},
}
MANIFEST = {
    "name": "7b:q4_0", "source": "Qwen/Qwen2-7B", "revision": "abc", "format": "gguf", "architecture": "qwen2", "quantization": "Q4_0",
    "licence": "apache-2.0", "context": 32768, "created": "2026-01-01T00:00:00+00:00", "schema": 1,
    "files": [{"name": "m.gguf", "size": 12, "sha256": "0" * 64}, {"name": "tokenizer.json", "size": 5, "sha256": "f" * 64}],
}  # fmt: skip
PACKED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
MOE = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
CONFIGS = (
    CONFIG,
    CONFIG | MOE | {"architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": False, "eos_token_id": [1, 2]},
    CONFIG | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    CONFIG | {"quantization": {"group_size": 64, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}, "x": False}},
    CONFIG | {"quantization_config": PACKED},
    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_parameters": {"rank": 8, "scale": 2.0}},
)


def _split_part() -> bytes:
    part = model(layers=1)
    part.keys |= {"no": key("split.no", U16, 0), "count": key("split.count", U16, 2), "all": key("split.tensors.count", I32, 14)}
    return part.build()


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _as(name: str) -> Callable[[Path, bytes], Path]:
    def lay(folder: Path, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return lay


def _in_folder(name: str) -> Callable[[Path, bytes], Path]:
    """A folder that is sound but for this file."""

    def lay(folder: Path, content: bytes) -> Path:
        if not (folder / "model-00001-of-00002.safetensors").exists():
            write_checkpoint(folder, CONFIG, {"a.weight": ("BF16", (4, 8)), "b.weight": ("F32", (3,))}, shards=2)
        (folder / "adapter_config.json").unlink(missing_ok=True)
        for other, sound in (("config.json", json.dumps(CONFIG).encode()), ("model.safetensors.index.json", INDEX)):
            (folder / other).write_bytes(sound)
        (folder / name).write_bytes(content)
        return folder

    return lay


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"metadata": {"total_size": 76}, "weight_map": {"a.weight": SHARDS[0], "b.weight": SHARDS[1]}}).encode()
EVERY = [key(f"k{kind}", kind, 1) for kind in (*range(8), 10, 11, 12)] + [array(f"a{kind}", kind, [1, 0]) for kind in (*range(8), 10, 11, 12)]

SUBJECTS = (
    Subject(
        "gguf",
        (
            model(layers=1).build(), model("qwen2moe", layers=1).build(), _split_part(), whole(EVERY, []),
            whole([key("general.alignment", U32, 64), array("t", STRING, ["a", "é"]), key("f", F64, 0.5), key("b", BOOL, 1), key("u", U64, 2**63)],
                  [info("t", (32, 2), 8, 0), info("u", (256,), 12, 128), info("v", (4,), I8 + 23, 320)], bytes(400)),
            whole([key("general.architecture", STRING, "qwen2"), key("general.type", STRING, "adapter"), key("adapter.lora.alpha", F32, 1)], []),
        ),
        _as("m-00001-of-00002.gguf"),
        (read_gguf, open_gguf, inspected),
    ),
    Subject(
        "safetensors",
        (_safetensors({"__metadata__": {"format": "mlx"}, **TENSORS}, bytes(84)), _safetensors(TENSORS, bytes(84)), _safetensors({}, b"")),
        _as("model.safetensors"),
        (read_header, inspected),
    ),
    Subject("config", tuple(json.dumps(config).encode() for config in CONFIGS), _as("config.json"), (read_config,)),
    Subject("folder", tuple(json.dumps(config).encode() for config in CONFIGS), _in_folder("config.json"), (open_checkpoint, inspected)),
    Subject("adapter", tuple(json.dumps(config).encode() for config in CONFIGS), _in_folder("adapter_config.json"), (inspected,)),
    Subject("index", (INDEX,), _in_folder("model.safetensors.index.json"), (open_checkpoint, inspected)),
    Subject("manifest", (json.dumps(MANIFEST).encode(),), _as("manifest.json"), (Manifest.read,)),
)  # fmt: skip


def obey(subject: Subject, folder: Path, content: bytes) -> int:
    """Lets all readers of `subject` look at `content`; how many took it. Raises what is no BadFile, and AssertionError for a useless one."""
    path = subject.lay(folder, content)
    taken = 0
    for reader in subject.readers:
        try:
            reader(path)
            taken += 1
        except BadFile as error:
            assert error.what
            assert len(str(error)) < 3000, "a fault of such length hides what it says"
    return taken


# For longer than a test may take


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=5)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(2**32)
    if given.child:
        return _work(given.minutes * 60, seed, given.child)
    folder = Path(tempfile.mkdtemp(prefix="qwen2-fuzz-"))
    command = [sys.executable, "-m", "tests.faults.fuzz", "--minutes", str(given.minutes), "--seed", str(seed), "--child", str(folder)]
    done = subprocess.run(command, check=False).returncode
    if done:
        print(f"seed {seed}: broken with {done}; the file is in {folder}")
        return 1
    return 0


def _work(seconds: float, seed: int, folder: Path) -> int:
    chance = random.Random(seed)
    cases = {subject.name: [0, 0] for subject in SUBJECTS}
    slowest = 0.0
    folders = {subject.name: folder / subject.name for subject in SUBJECTS}
    for place in folders.values():
        place.mkdir()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        subject = chance.choice(SUBJECTS)
        changes = [(chance.choice(WAYS), *(chance.randrange(2**32) for _ in range(3))) for _ in range(chance.randrange(5))]
        content = mutated(chance.choice(subject.seeds), changes)
        # The file lies there if this process ends now.
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        started = time.monotonic()
        cases[subject.name][1] += obey(subject, folders[subject.name], content) > 0
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.monotonic() - started)
        cases[subject.name][0] += 1
    peak = peak_mb()
    figures = {name: {"files": tried, "taken": taken} for name, (tried, taken) in cases.items()}
    print(
        json.dumps({"seed": seed, "files": sum(tried for tried, _ in cases.values()), "of": figures, "slowest_s": round(slowest, 3), "peak_mb": peak})
    )
    return 0 if peak < LIMIT_MB else 3


def peak_mb() -> int:
    """The most memory that this process has had. VmHWM: unlike getrusage's figure it begins anew with exec."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) // 1000
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_000_000


if __name__ == "__main__":
    sys.exit(main())
