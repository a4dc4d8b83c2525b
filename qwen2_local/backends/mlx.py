"""MLX as a backend: Apple's GPU where there is one, else the CPU (slow, but the same numbers).

MLX's arrays belong to the thread that made them: load, step and close on one thread; `cancel` may come from any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from qwen2_local.backends.base import BackendInfo, Choice, Row, RowResult
from qwen2_local.backends.mlx_qwen2 import LayerKv, Piece, Qwen2, load_model
from qwen2_local.errors import BackendError, BadFile, Cancelled, ContextOverflow, DoesNotFit, Qwen2LocalError, UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint
from qwen2_local.formats.config import Qwen2Config
from qwen2_local.sampling import choose

STEP_TOKENS = 512

_GPU_SPEED, _CPU_SPEED = 1e12, 5e8
"""Weights times tokens per second, of slow devices. Ran: 1e9 on an idle core of a Xeon, 3e8 on a busy one, for one token as for many (MLX has
no fast CPU kernels), so that small steps cost nothing there. The GPU's is a guess from the published speed of the first M1.
"""

_CANCEL_S = 0.15
"""A layer of a step takes no longer than about this, so that a cancel waits no longer."""

_REPORT = "Try again; if it stays, run `qwen2-local doctor`."


def load(path: Path, *, context: int, sequences: int = 1) -> Mlx:
    """Load the MLX folder at `path`: bfloat16, float16 or float32, or quantized. A dense checkpoint of Hugging Face's has the same layout.

    It computes in the type of the file's floats on a GPU, and in float32 on a CPU (which has no fast 16-bit code).
    Raises BadFile, UnsupportedModel, DoesNotFit, BackendError.
    """
    if context < 1 or sequences < 1:
        raise BackendError(f"A context of {context} tokens for {sequences} sequences cannot be made.", hint="Ask for 1 or more.")
    checkpoint = open_checkpoint(path)
    if checkpoint.config.moe is not None and "model.layers.0.mlp.switch_mlp.gate_proj.weight" not in checkpoint.tensors:
        raise UnsupportedModel(f"{path} holds its experts one by one, not stacked as MLX does.", hint="Convert it: `qwen2-local convert`.")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    try:
        model = load_model(checkpoint, None if on_gpu else mx.float32)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise _load_failed(checkpoint, error) from error
    notes = () if on_gpu else ("MLX has no GPU on this machine and is slow here: a GGUF model and llama.cpp are many times faster.",)
    return Mlx(model, context=context, sequences=sequences, speed=_GPU_SPEED if on_gpu else _CPU_SPEED, notes=notes)


@dataclass(slots=True)
class _Sequence:
    kv: list[LayerKv]
    length: int = 0
    lost: bool = field(default=False)


class Mlx:
    """A loaded MLX model; implements `base.Backend`. A refused or cancelled step leaves every sequence as it was."""

    def __init__(self, model: Qwen2, *, context: int, sequences: int, speed: float = _CPU_SPEED, notes: tuple[str, ...] = ()) -> None:
        """context: the most tokens of each sequence. speed: weights times tokens per second, to cut work into pieces that a cancel can wait for."""
        config = model.config
        self._model: Qwen2 | None = model
        self._info = BackendInfo(
            name="mlx",
            version=mx.__version__,  # type: ignore[attr-defined]  # the stubs lack it
            architecture=config.model_type,
            context=context,
            vocabulary=config.vocabulary,
            layers=config.layers,
            kv_bytes_per_token=config.kv_values_per_token * model.dtype.size,
            notes=notes,
        )
        self._sequences: list[_Sequence | None] = [None] * sequences
        self._stop = False
        layer = _weights_per_token(config)
        self._step_tokens = max(1, min(STEP_TOKENS, int(_CANCEL_S * speed / layer)))
        self._long_step = _CANCEL_S * speed / (layer * config.layers)

    @property
    def info(self) -> BackendInfo:
        """What was loaded."""
        return self._info

    @property
    def step_tokens(self) -> int:
        """The most tokens that one `step` takes, all rows together: fewer where a layer of them would keep a cancel waiting."""
        return self._step_tokens

    def open(self) -> int:
        """A new empty sequence. Raises BackendError when all are in use."""
        self._loaded()
        if None not in self._sequences:
            raise BackendError(f"All {len(self._sequences)} sequences are in use.", hint="Free one first, or load with more.")
        index = self._sequences.index(None)
        self._sequences[index] = _Sequence([LayerKv() for _ in range(self._info.layers)])
        return index

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Append each row's tokens to its sequence, in one batch.

        A `cancel` counts from the moment this is called. If MLX itself fails, the KV of the rows' sequences is lost: free them.
        Raises ContextOverflow, Cancelled, DoesNotFit, BackendError.
        """
        self._stop = False
        model = self._loaded()
        tokens, pieces = self._arrange(rows)
        watched = len(tokens) > self._long_step

        def after_layer(x: mx.array) -> None:
            if watched:
                mx.eval(x)
            if self._stop:
                raise Cancelled("Stopped.")

        try:
            results = _results(model, rows, pieces, model.hidden(mx.array(tokens), pieces, after_layer))
        except (RuntimeError, ValueError, MemoryError) as error:
            for row in rows:
                self._sequence(row.sequence).lost = True
            raise _step_failed(error) from error
        if self._stop:
            raise Cancelled("Stopped.")
        for row in rows:
            self._sequence(row.sequence).length += len(row.tokens)
        if len(tokens) > len(rows):
            mx.clear_cache()  # Slices of many sizes leave buffers of many sizes behind.
        return results

    def trim(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        present = self._sequence(sequence)
        if not 0 <= length <= present.length:
            raise BackendError(f"Sequence {sequence} has {present.length} tokens and cannot be cut to {length}.", hint=_REPORT)
        present.length = length

    def free(self, sequence: int) -> None:
        """Give a sequence and its KV back."""
        self._sequence(sequence)
        self._sequences[sequence] = None

    def cancel(self) -> None:
        """Stop the step under way, if any. Callable from any thread; returns at once."""
        self._stop = True

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._sequences = [None] * len(self._sequences)
        if self._model is not None:
            self._model = None
            mx.clear_cache()

    def _arrange(self, rows: Sequence[Row]) -> tuple[list[int], list[Piece]]:
        """Lay the rows' tokens end to end, checked."""
        tokens: list[int] = []
        pieces = []
        for row in rows:
            sequence = self._sequence(row.sequence)
            if sequence.lost:
                raise BackendError(f"Sequence {row.sequence} was lost in a step that failed.", hint=_REPORT)
            after = sequence.length + len(row.tokens)
            if after > self._info.context:
                raise ContextOverflow(
                    f"{after} tokens do not fit into a context of {self._info.context}.",
                    hint="Shorten the text, start a new chat, or load the model with a larger context.",
                )
            begin = len(tokens)
            tokens.extend(row.tokens)
            if len(tokens) == begin:
                raise BackendError("A row without tokens.", hint=_REPORT)
            pieces.append(Piece(sequence.kv, sequence.length, begin, len(tokens)))
        if not 0 < len(tokens) <= self._step_tokens or len({row.sequence for row in rows}) < len(rows):
            raise BackendError(f"A step takes 1 to {self._step_tokens} tokens, and one row for each sequence; got {len(tokens)}.", hint=_REPORT)
        for wrong in (min(tokens), max(tokens)):
            if not 0 <= wrong < self._info.vocabulary:
                raise BackendError(
                    f"Token id {wrong} is outside the vocabulary of {self._info.vocabulary}.",
                    hint="Tokenizer and model may not belong together: fetch the model again.",
                )
        return tokens, pieces

    def _loaded(self) -> Qwen2:
        if self._model is None:
            raise BackendError("The model is closed.", hint="Load it again.")
        return self._model

    def _sequence(self, index: int) -> _Sequence:
        found = self._sequences[index] if 0 <= index < len(self._sequences) else None
        if found is None:
            raise BackendError(f"Sequence {index} is not open.", hint=_REPORT)
        return found


def _results(model: Qwen2, rows: Sequence[Row], pieces: Sequence[Piece], hidden: mx.array) -> list[RowResult]:
    """Evaluate what the rows ask for: the head, which is large, for no other token."""
    wanted: list[int] = []
    spans = []
    for row, piece in zip(rows, pieces, strict=True):
        asked = 0 if row.choose is None and not row.logits else piece.end - piece.begin if row.logits == "all" else 1
        spans.append((len(wanted), len(wanted) + asked))
        wanted.extend(range(piece.end - asked, piece.end))
    if not wanted:
        mx.eval(hidden)
        return [RowResult()] * len(rows)
    logits = model.logits(hidden[mx.array(wanted)])
    greedy = {stop - 1: row.choose for row, (_, stop) in zip(rows, spans, strict=True) if row.choose and _is_plain_greedy(row.choose)}
    best = _greedy(logits, greedy) if greedy else {}
    on_host = any(row.logits or (row.choose and not _is_plain_greedy(row.choose)) for row in rows)
    copied = np.array(logits) if on_host else np.empty((0, 0), np.float32)
    results = []
    for row, piece, (start, stop) in zip(rows, pieces, spans, strict=True):
        token = None
        if row.choose is not None:
            token = best[stop - 1] if stop - 1 in best else choose(copied[stop - 1], row.choose)
        given = copied[start:stop] if row.logits else None
        if token == -1 or (given is not None and not np.isfinite(given).all()):
            raise BackendError(
                f"The model computed values that are no numbers, at token {piece.start + piece.end - piece.begin}.",
                hint="Its file may be damaged: fetch or convert it again. If that does not help, run `qwen2-local doctor`.",
            )
        results.append(RowResult(token, given))
    return results


def _is_plain_greedy(choice: Choice) -> bool:
    return choice.temperature == 0.0 and (choice.repetition_penalty == 1.0 or not len(choice.penalized))


def _greedy(logits: mx.array, choices: dict[int, Choice]) -> dict[int, int]:
    """`sampling.choose` on the device, for choices that need no more than the largest logit; by row of `logits` [rows, vocabulary]."""
    limits = mx.array([choice.limit for choice in choices.values()])[:, None]
    allowed = mx.where(mx.arange(logits.shape[1]) < limits, logits[mx.array(list(choices))], -mx.inf)
    # What argmax makes of a NaN is not defined.
    sound = mx.isfinite(allowed.max(axis=1)) & ~mx.isnan(allowed).any(axis=1)
    tokens = mx.where(sound, mx.argmax(allowed, axis=1).astype(mx.int32), -1)
    return dict(zip(choices, map(int, np.array(tokens)), strict=True))


def _weights_per_token(config: Qwen2Config) -> int:
    """Weights of one layer that a token meets."""
    attention = 2 * config.hidden * (config.heads + config.kv_heads) * config.head_dim
    moe = config.moe
    inner = config.intermediate if moe is None else moe.experts_per_token * moe.expert_size + moe.shared_size
    return attention + 3 * config.hidden * inner


def _load_failed(checkpoint: Checkpoint, error: Exception) -> Qwen2LocalError:
    if _is_memory(error):
        return DoesNotFit(
            f"{checkpoint.folder} does not fit into memory: it holds {checkpoint.weight_bytes / 1e9:.1f} GB of weights ({error}).",
            hint="Choose a smaller model or quantization.",
        )
    return BadFile(f"MLX cannot load {checkpoint.folder}: {error}", hint="Fetch or convert it again.")


def _step_failed(error: Exception) -> Qwen2LocalError:
    if _is_memory(error):
        return DoesNotFit(f"MLX ran out of memory in a step: {error}", hint="Choose a smaller context (--context) or a smaller model.")
    return BackendError(f"MLX failed in a step: {error}", hint=_REPORT)


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "malloc" in text or "memory" in text
