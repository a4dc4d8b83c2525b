"""Adds a LoRA adapter to a model's weights while they are converted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from qwen2_converters.lora import CONFIG, Adapter, Floats
from qwen2_local import files
from qwen2_local.errors import UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint, member


@dataclass(frozen=True, slots=True)
class Merge:
    """The sum of a model and an adapter that was opened for it."""

    adapter: Adapter

    @property
    def identity(self) -> str:
        """A hash of the adapter's two files."""
        both = (files.sha256(path) for path in (member(self.adapter.folder, CONFIG), self.adapter.file))
        return hashlib.sha256("".join(both).encode()).hexdigest()

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedModel unless every adapted matrix lies in `checkpoint` by itself and unquantized."""
        if checkpoint.config.packed or checkpoint.config.quantization:
            raise UnsupportedModel(f"{checkpoint.folder} is quantized: nothing can be merged into it.", hint="Take the plain checkpoint.")
        for module in self.adapter.pairs:
            if f"{module}.weight" not in checkpoint.tensors:
                fault = f"{checkpoint.folder} holds no {module}, which the adapter changes; its experts are stacked."
                raise UnsupportedModel(fault, hint="Take the checkpoint as transformers 4 wrote it, expert by expert.")

    def add(self, source_name: str, first_row: int, weights: Floats) -> None:
        """Adds to `weights` [rows, columns], in place, what the adapter has for rows of the checkpoint's tensor `source_name`.

        Reads that much of the adapter, from any thread. Raises BadFile for values that are no finite numbers.
        """
        pair = self.adapter.pairs.get(source_name.removesuffix(".weight"))
        if pair is None or not source_name.endswith(".weight"):
            return
        row_bytes = (pair.b.end - pair.b.begin) // pair.b.shape[0]
        begin = pair.b.begin + first_row * row_bytes
        some = replace(pair.b, shape=(len(weights), pair.rank), begin=begin, end=begin + len(weights) * row_bytes)
        a, b = self.adapter.read(pair.a), self.adapter.read(some)
        weights += (np.float32(pair.scale) * b) @ a
