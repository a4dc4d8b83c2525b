"""Every GGUF type at a real shape, byte by byte: what `qwen2-local convert` writes against llama.cpp's own quantizer, from the same weights.

    python benchmarks/gguf_bytes.py [--size 0.5b] [--folder FOLDER] [--targets q4_k_m ...]     in the project's environment; 6 GB of disk

The weights are random. llama.cpp reads them from our BF16 file, which its F32 file then shows to be the checkpoint's. Both work on all cores.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gguf

from benchmarks.random_checkpoint import write
from qwen2_converters.convert import convert
from qwen2_converters.target import GGUF, Target
from qwen2_local.catalog import SIZES
from tests.support.llama_quantize import quantize


def different(ours: Path, theirs: Path) -> tuple[int, list[str]]:
    """How many tensors there are, and which are not the same in both."""
    have = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    want = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    wrong = set(have) ^ set(want)
    for name in have.keys() & want.keys():
        one, other = have[name], want[name]
        same = one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape) and (one.data == other.data).all()
        wrong |= set() if same else {name}
    return len(want), sorted(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5b", choices=[size.name for size in SIZES])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or will be made")
    parser.add_argument("--targets", nargs="+", default=list(GGUF), choices=GGUF)
    options = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        source = options.folder or work / "checkpoint"
        if not (source / "config.json").exists():
            write(next(size for size in SIZES if size.name == options.size), source)
        plain = convert(source, Target("gguf", "bf16"), work / "plain.gguf")
        for weights in options.targets:
            start = time.perf_counter()
            ours = convert(source, Target("gguf", weights), work / "ours.gguf")
            middle = time.perf_counter()
            theirs = quantize(plain, work / "theirs.gguf", weights, threads=0)
            end = time.perf_counter()
            count, wrong = different(ours, theirs)
            report[weights] = {"tensors": count, "different": len(wrong), "ours_s": round(middle - start, 1), "llama_cpp_s": round(end - middle, 1)}
            print(weights, json.dumps(report[weights]), *wrong[:5], flush=True)
            ours.unlink()
            theirs.unlink()
    print(json.dumps({"size": options.size, "types": len(report), "different": sum(row["different"] for row in report.values()), "each": report}))


if __name__ == "__main__":
    main()
