"""MLX as a backend: Apple's GPU where there is one, else the CPU (slow, but the same numbers).

MLX's arrays belong to the thread that made them: load, step and close on one thread; `cancel` may come from any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qwen2_local.backends.base import BackendInfo, Choice, Chosen, Chunk, Layout, LoadOptions, Row, RowResult, Scores
from qwen2_local.backends.mlx_adapter import open_adapter
from qwen2_local.backends.mlx_kv import LayerKv, Rope
from qwen2_local.backends.mlx_qwen2 import Piece, Qwen2, load_model
from qwen2_local.errors import BackendError, BadFile, Cancelled, ContextOverflow, DoesNotFit, Qwen2LocalError, UnsupportedModel
from qwen2_local.formats.checkpoint import Checkpoint, open_checkpoint
from qwen2_local.formats.config import Qwen2Config, Yarn
from qwen2_local.sampling import choose

STEP_TOKENS = 512

_GPU_SPEED, _CPU_SPEED = 1e12, 5e8
"""Weights times tokens per second, of slow devices. Ran: 1e9 on an idle core of a Xeon, 3e8 on a busy one, for one token as for many (MLX has
no fast CPU kernels), so that small steps cost nothing there. The GPU's is a guess from the published speed of the first M1.
"""

_CANCEL_S = 0.15
"""A layer of a step takes no longer than about this, so that a cancel waits no longer."""

_SCORED = 1 << 24
"""Logits that are in memory at once where tokens are scored."""

_KV_FORMAT = 1
"""Part of the fingerprint: raise it when exported KV, or how it is computed, changes."""

_REPORT = "Try again; if it stays, run `qwen2-local doctor`."


def load(path: Path, *, layout: Layout, options: LoadOptions, cancelled: Callable[[], bool] | None = None) -> Mlx:
    """Load the MLX folder at `path`: bfloat16, float16 or float32, or quantized. A dense checkpoint of Hugging Face's has the same layout.

    It computes in the type of the file's floats on a GPU, and in float32 on a CPU (which has no fast 16-bit code).
    cancelled: asked before each tensor. Raises BadFile, UnsupportedModel, DoesNotFit, BackendError, Cancelled.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    if config.moe is not None and "model.layers.0.mlp.switch_mlp.gate_proj.weight" not in checkpoint.tensors:
        raise UnsupportedModel(f"{path} holds its experts one by one, not stacked as MLX does.", hint="Convert it: `qwen2-local convert`.")
    if options.kv_bits not in (16, 8) or (options.kv_bits == 8 and config.head_dim % 32):
        fault = f"A KV of {options.kv_bits} bits is not made for heads of {config.head_dim} channels."
        raise UnsupportedModel(fault, hint="Leave the KV at 16 bits.")
    adapter = None if options.adapter is None else open_adapter(options.adapter, config)
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    try:
        model = load_model(checkpoint, None if on_gpu else mx.float32, kv_bits=options.kv_bits, adapter=adapter, cancelled=cancelled)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise _load_failed(checkpoint, error) from error
    notes = () if on_gpu else ("MLX has no GPU on this machine and is slow here: a GGUF model and llama.cpp are many times faster.",)
    return Mlx(model, layout, options, speed=_GPU_SPEED if on_gpu else _CPU_SPEED, notes=notes)


@dataclass(slots=True)
class _Sequence:
    kv: list[LayerKv]
    length: int = 0
    lost: str = ""
    """Why its KV is not there any more."""


@dataclass(frozen=True, slots=True)
class _Plain:
    """A row of one token, at the position `start` of its sequence, after which the likeliest id below `limit` is wanted."""

    sequence: int
    start: int
    token: int
    limit: int


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A decoding step that runs before it is asked for, as nearly always it will be: each sequence's next token after the one just chosen.

    asked: the rows that it answers, as `_plain` gives them. chosen [rows]: what comes of it, perhaps still being computed.
    """

    asked: tuple[_Plain, ...]
    chosen: mx.array


class Mlx:
    """A loaded MLX model; implements `base.Backend`. A refused or cancelled step leaves every sequence as it was."""

    def __init__(self, model: Qwen2, layout: Layout, options: LoadOptions, *, speed: float = _CPU_SPEED, notes: tuple[str, ...] = ()) -> None:
        """speed: weights times tokens per second, to cut work into pieces that a cancel can wait for."""
        config = model.config
        self._model: Qwen2 | None = model
        self._options = options
        self._kv_bytes = config.layers * config.kv_heads * sum(channels * dtype.size for channels, dtype in model.kv.parts)
        self._info = BackendInfo(
            name="mlx",
            version=mx.__version__,  # type: ignore[attr-defined]  # the stubs lack it
            architecture=config.model_type,
            context=options.context,
            vocabulary=config.vocabulary,
            layers=config.layers,
            kv_bytes_per_token=self._kv_bytes,
            yarn_context=options.yarn_context,
            notes=notes,
        )
        self._sequences: list[_Sequence | None] = []
        self._ahead: _Ahead | None = None
        self._stop = False
        layer = _weights_per_token(config)
        self._step_tokens = max(1, min(STEP_TOKENS, int(_CANCEL_S * speed / layer)))
        self._long_step = _CANCEL_S * speed / (layer * config.layers)
        self.arrange(layout)

    @property
    def info(self) -> BackendInfo:
        """What was loaded."""
        return self._info

    @property
    def layout(self) -> Layout:
        """How many sequences there are at most, and how long. Their memory grows as they do."""
        return self._layout

    @property
    def fingerprint(self) -> str:
        """Of all that changes the numbers; see `base.Backend`."""
        return self._fingerprint

    @property
    def step_tokens(self) -> int:
        """The most tokens that one `step` takes, all rows together: fewer where a layer of them would keep a cancel waiting."""
        return self._step_tokens

    def arrange(self, layout: Layout) -> None:
        """Forget all sequences, and have room for others. Raises BackendError for a layout that cannot be."""
        model = self._loaded()
        if layout.sequences < 1 or layout.context < 1:
            raise BackendError(f"A context of {layout.context} tokens for {layout.sequences} sequences cannot be made.", hint="Ask for 1 or more.")
        if layout.yarn and not self._options.yarn_factor:
            raise BackendError("This model is not made for YaRN.", hint="Ask for a context without it.")
        yarn = Yarn(self._options.yarn_factor, self._options.yarn_original) if layout.yarn else model.config.yarn
        self._model = replace(model, rope=Rope(model.config, yarn))
        self._fingerprint = _fingerprint(model, self._options, yarn)
        self._layout = layout
        self._ahead = None
        self._sequences = [None] * layout.sequences
        mx.clear_cache()

    def open(self) -> int:
        """A new empty sequence. Raises BackendError when all are in use."""
        return self._add([LayerKv() for _ in range(self._info.layers)], 0)

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """Append each row's tokens to its sequence, in one batch.

        If MLX itself fails, the KV of the rows' sequences is lost: free them.
        Raises ContextOverflow, Cancelled, DoesNotFit, BackendError.
        """
        try:
            return self._step(rows)
        finally:
            # At the end, so that a `cancel` just before a step ends that step; nothing of it is left for the next.
            self._stop = False

    def _step(self, rows: Sequence[Row]) -> list[RowResult]:
        model = self._loaded()
        ahead, self._ahead = self._ahead, None
        tokens, pieces = self._arrange_rows(rows)
        try:
            plain = self._plain(rows, pieces)
            if plain:
                results = self._decode(model, plain, pieces, ahead)
            else:
                results = _results(model, rows, pieces, self._hidden(model, mx.array(tokens), pieces))
        except (RuntimeError, ValueError, MemoryError) as error:
            failed = _step_failed(error)
            for row in rows:
                self._sequence(row.sequence).lost = failed.what
            raise failed from error
        if self._stop:
            self._ahead = None
            raise Cancelled("Stopped.")
        for row in rows:
            self._sequence(row.sequence).length += len(row.tokens)
        if len(tokens) > len(rows):
            mx.clear_cache()  # Slices of many sizes leave buffers of many sizes behind.
        return results

    def fork(self, sequence: int, length: int) -> int:
        """A new sequence that begins with the first `length` tokens of another; they share memory until one of them grows."""
        present = self._sound(sequence, length)
        return self._add([layer.fork(length) for layer in present.kv], length)

    def trim(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        present = self._sequence(sequence)
        if not 0 <= length <= present.length:
            raise BackendError(f"Sequence {sequence} has {present.length} tokens and cannot be cut to {length}.", hint=_REPORT)
        self._ahead = None
        present.length = length

    def free(self, sequence: int) -> None:
        """Give a sequence and its KV back."""
        self._sequence(sequence)
        self._ahead = None
        self._sequences[sequence] = None

    def export_kv(self, sequence: int, ranges: Sequence[tuple[int, int]]) -> list[Chunk]:
        """The KV of ranges (from, up to) of a sequence's tokens: by layer each array of its format, [kv_heads, tokens, channels], byte by byte."""
        end = 0
        for start, stop in ranges:
            if not end <= start < stop:
                raise BackendError(f"The range {start} to {stop} cannot follow token {end}.", hint=_REPORT)
            end = stop
        present = self._sound(sequence, end)
        return [Chunk(stop - start, _raw(present.kv, start, stop)) for start, stop in ranges]

    def import_kv(self, sequence: int, chunks: Sequence[Chunk]) -> None:
        """Append the KV of tokens. Raises BackendError for data of a wrong size, ContextOverflow; the sequence is then as before."""
        model, present = self._loaded(), self._sound(sequence, 0)
        for chunk in chunks:
            expected = chunk.tokens * self._kv_bytes
            flat = isinstance(chunk.data, (bytes, memoryview)) and memoryview(chunk.data).c_contiguous
            size = memoryview(chunk.data).nbytes if flat else 0
            if chunk.tokens < 1 or size != expected:
                fault = f"A chunk of the KV of {chunk.tokens} tokens has {size:,} bytes instead of {expected:,}."
                raise BackendError(fault, hint="Clear the KV cache: `qwen2-local cache clear`.")
        after = present.length + sum(chunk.tokens for chunk in chunks)
        self._require_room(after)
        self._ahead = None
        try:
            read = [_parsed(model, chunk) for chunk in chunks]
            # A fork, so that nothing of a failure shows.
            kv = [layer.fork(present.length) for layer in present.kv]
            for index, layer in enumerate(kv):
                if read:
                    layer.write(present.length, [mx.concatenate(list(parts), axis=2) for parts in zip(*(one[index] for one in read), strict=True)])
            mx.eval([layer.arrays for layer in kv])
        except (RuntimeError, ValueError, MemoryError) as error:
            raise _step_failed(error) from error
        present.kv, present.length = kv, after

    def cancel(self) -> None:
        """Stop the step under way, else the next. Callable from any thread; returns at once."""
        self._stop = True

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._sequences = [None] * len(self._sequences)
        self._ahead = None
        if self._model is not None:
            self._model = None
            mx.clear_cache()

    def _hidden(self, model: Qwen2, tokens: mx.array, pieces: Sequence[Piece]) -> mx.array:
        """The forward pass, in pieces that a cancel can wait for."""
        watched = tokens.size > self._long_step

        def after_layer(x: mx.array) -> None:
            if watched:
                mx.eval(x)
            if self._stop:
                raise Cancelled("Stopped.")

        return model.hidden(tokens, pieces, after_layer)

    def _plain(self, rows: Sequence[Row], pieces: Sequence[Piece]) -> tuple[_Plain, ...]:
        """The rows of a step of plain greedy decoding that is so fast that one more may go unused; else none."""
        if len(rows) > self._long_step:
            return ()
        found = []
        for row, piece in zip(rows, pieces, strict=True):
            if len(row.tokens) > 1 or len(row.choose) != 1 or row.logits or row.targets or not _is_plain_greedy(row.choose[0]):
                return ()
            found.append(_Plain(row.sequence, piece.start, row.tokens[0], row.choose[0].limit))
        return tuple(found)

    def _decode(self, model: Qwen2, rows: tuple[_Plain, ...], pieces: Sequence[Piece], ahead: _Ahead | None) -> list[RowResult]:
        """A step of plain greedy decoding. While its tokens come back, and the caller makes something of them, the next one runs."""
        limits = [row.limit for row in rows]
        if ahead is not None and ahead.asked == rows:
            chosen = ahead.chosen
        else:
            chosen = _greedy(model.logits(self._hidden(model, mx.array([row.token for row in rows]), pieces)), limits)
            mx.async_eval(chosen)  # type: ignore[no-untyped-call]
        following = None
        if all(row.start + 2 <= self._layout.context for row in rows):
            later = [replace(piece, start=piece.start + 1) for piece in pieces]
            following = _greedy(model.logits(model.hidden(chosen, later)), limits)
            mx.async_eval(following)  # type: ignore[no-untyped-call]
        tokens = np.array(chosen).tolist()
        if following is not None:
            asked = (_Plain(row.sequence, row.start + 1, token, row.limit) for row, token in zip(rows, tokens, strict=True))
            self._ahead = _Ahead(tuple(asked), following)
        for row, token in zip(rows, tokens, strict=True):
            _require_numbers(token >= 0, row.start + 1)
        return [RowResult((Chosen(token),)) for token in tokens]

    def _arrange_rows(self, rows: Sequence[Row]) -> tuple[list[int], list[Piece]]:
        """Lay the rows' tokens end to end, checked."""
        tokens: list[int] = []
        pieces = []
        ids: list[int] = []
        for row in rows:
            sequence = self._sound(row.sequence, 0)
            self._require_room(sequence.length + len(row.tokens))
            begin = len(tokens)
            tokens.extend(row.tokens)
            ids.extend(row.targets)
            if len(tokens) == begin:
                raise BackendError("A row without tokens.", hint=_REPORT)
            if len(row.choose) > len(row.tokens) or len(row.targets) not in (0, len(row.tokens)):
                fault = f"{len(row.choose)} choices and {len(row.targets)} targets do not belong to {len(row.tokens)} tokens."
                raise BackendError(fault, hint=_REPORT)
            pieces.append(Piece(sequence.kv, sequence.length, begin, len(tokens)))
        if not 0 < len(tokens) <= self._step_tokens or len({row.sequence for row in rows}) < len(rows):
            raise BackendError(f"A step takes 1 to {self._step_tokens} tokens, and one row for each sequence; got {len(tokens)}.", hint=_REPORT)
        ids.extend(tokens)
        for wrong in (min(ids), max(ids)):
            if not 0 <= wrong < self._info.vocabulary:
                raise BackendError(
                    f"Token id {wrong} is outside the vocabulary of {self._info.vocabulary}.",
                    hint="Tokenizer and model may not belong together: fetch the model again.",
                )
        return tokens, pieces

    def _require_room(self, length: int) -> None:
        if length > self._layout.context:
            raise ContextOverflow(
                f"{length} tokens do not fit into a context of {self._layout.context}.",
                hint="Shorten the text, start a new chat, or load the model with a larger context.",
            )

    def _loaded(self) -> Qwen2:
        if self._model is None:
            raise BackendError("The model is closed.", hint="Load it again.")
        return self._model

    def _add(self, kv: list[LayerKv], length: int) -> int:
        self._loaded()
        if None not in self._sequences:
            raise BackendError(f"All {len(self._sequences)} sequences are in use.", hint="Free one first, or arrange for more.")
        index = self._sequences.index(None)
        self._sequences[index] = _Sequence(kv, length)
        return index

    def _sequence(self, index: int) -> _Sequence:
        found = self._sequences[index] if 0 <= index < len(self._sequences) else None
        if found is None:
            raise BackendError(f"Sequence {index} is not open.", hint=_REPORT)
        return found

    def _sound(self, index: int, length: int) -> _Sequence:
        """A sequence whose KV is there, and at least `length` tokens of it."""
        found = self._sequence(index)
        if found.lost:
            raise BackendError(f"Sequence {index} was lost in a step that failed. {found.lost}", hint=_REPORT)
        if not 0 <= length <= found.length:
            raise BackendError(f"Sequence {index} has {found.length} tokens, not {length}.", hint=_REPORT)
        return found


def _raw(kv: Sequence[LayerKv], start: int, stop: int) -> memoryview:
    """The tokens from `start` to `stop` of each array, byte by byte."""
    parts = [array[:, :, start:stop].reshape(-1).view(mx.uint8) for layer in kv for array in layer.arrays]
    data: npt.NDArray[np.uint8] = np.array(mx.concatenate(parts))
    return memoryview(data)  # type: ignore[arg-type]  # NumPy says so from Python 3.12 on


def _parsed(model: Qwen2, chunk: Chunk) -> list[list[mx.array]]:
    """By layer, the arrays that `_raw` wrote. The size has been checked."""
    raw = mx.array(np.frombuffer(chunk.data, np.uint8))
    at, layers = 0, []
    for _ in range(model.config.layers):
        arrays = []
        for channels, dtype in model.kv.parts:
            end = at + model.config.kv_heads * chunk.tokens * channels * dtype.size
            arrays.append(raw[at:end].view(dtype).reshape(1, model.config.kv_heads, chunk.tokens, channels))
            at = end
        layers.append(arrays)
    return layers


def _results(model: Qwen2, rows: Sequence[Row], pieces: Sequence[Piece], hidden: mx.array) -> list[RowResult]:
    """Evaluate what the rows ask for: the head, which is large, for no other token."""
    wanted: list[int] = []
    spans = []
    for row, piece in zip(rows, pieces, strict=True):
        asked = max(len(row.choose), piece.end - piece.begin if row.logits == "all" else bool(row.logits))
        spans.append((len(wanted), len(wanted) + asked))
        wanted.extend(range(piece.end - asked, piece.end))
    if not wanted:
        mx.eval(hidden)
    logits = model.logits(hidden[mx.array(wanted)]) if wanted else mx.zeros((0, 0))
    greedy = {
        stop - len(row.choose) + number: choice.limit
        for row, (_, stop) in zip(rows, spans, strict=True)
        for number, choice in enumerate(row.choose)
        if _is_plain_greedy(choice)
    }
    best: dict[int, int] = {}
    if greedy:
        best = dict(zip(greedy, np.array(_greedy(logits[mx.array(list(greedy))], list(greedy.values()))).tolist(), strict=True))
    on_host = any(row.logits for row in rows) or len(greedy) < sum(len(row.choose) for row in rows)
    copied = np.array(logits) if on_host else np.empty((0, 0), np.float32)
    results = []
    for row, piece, (_, stop) in zip(rows, pieces, spans, strict=True):
        length = piece.start + piece.end - piece.begin
        chosen = []
        for at, choice in enumerate(row.choose, stop - len(row.choose)):
            chosen.append(Chosen(best[at]) if at in best else choose(copied[at], choice))
            _require_numbers(chosen[-1].token >= 0, length - stop + at + 1)
        given = None
        if row.logits:
            given = copied[stop - (len(row.tokens) if row.logits == "all" else 1) : stop]
            _require_numbers(bool(np.isfinite(given).all()), length)
        scores = _scores(model, hidden[piece.begin : piece.end], row) if row.targets else None
        if scores is not None:
            _require_numbers(not np.isnan(scores.logprobs).any(), length)
        results.append(RowResult(tuple(chosen), scores, given))
    return results


def _require_numbers(sound: bool, length: int) -> None:
    if not sound:
        raise BackendError(
            f"The model computed values that are no numbers, at token {length}.",
            hint="Its file may be damaged: fetch or convert it again. If that does not help, run `qwen2-local doctor`.",
        )


def _is_plain_greedy(choice: Choice) -> bool:
    """Is nothing needed but which logit is the largest?"""
    return (
        choice.temperature == 0.0
        and (choice.repetition_penalty == 1.0 or not len(choice.penalized))
        and not (len(choice.counted) and (choice.presence_penalty or choice.frequency_penalty))
        and not choice.logit_bias
        and choice.mask is None
        and choice.top_logprobs is None
    )


def _greedy(logits: mx.array, limits: list[int]) -> mx.array:
    """`sampling.choose` on the device, for choices that need no more than the largest logit: ids [rows] of logits [rows, vocabulary]."""
    allowed = logits[:, : max(limits)]
    if len(set(limits)) > 1:
        allowed = mx.where(mx.arange(allowed.shape[1]) < mx.array(limits)[:, None], allowed, -mx.inf)
    # What argmax makes of a NaN is not defined. This sum is no number if one of them is none.
    sound = mx.isfinite(mx.logsumexp(allowed, axis=1))
    return mx.where(sound, mx.argmax(allowed, axis=1).astype(mx.int32), -1)


def _scores(model: Qwen2, hidden: mx.array, row: Row) -> Scores:
    """How likely a row's targets are; a few rows of logits at a time."""
    limit = min(row.limit, model.config.vocabulary)
    count = max(1, _SCORED // model.config.vocabulary)
    logprobs, likeliest = [], []
    for start in range(0, len(row.targets), count):
        targets = mx.array(list(row.targets[start : start + count]))
        logits = model.logits(hidden[start : start + count])[:, :limit]
        shifted = logits - logits.max(axis=1, keepdims=True)
        own = mx.take_along_axis(shifted, mx.minimum(targets, limit - 1)[:, None], axis=1)[:, 0]
        own = mx.where(targets < limit, own, -mx.inf) - mx.log(mx.exp(shifted).sum(axis=1))
        logprobs.append(np.array(own).astype(np.float64))
        likeliest.append(np.array(mx.argmax(logits, axis=1) == targets))
    return Scores(np.concatenate(logprobs), np.concatenate(likeliest))


def _fingerprint(model: Qwen2, options: LoadOptions, yarn: Yarn | None) -> str:
    said = {
        "backend": f"mlx {mx.__version__} {_KV_FORMAT} {mx.default_device().type}",  # type: ignore[attr-defined]
        "weights": options.identity,
        "adapter": options.adapter_identity,
        "config": repr(model.config),
        "kv": repr(model.kv),
        "yarn": repr(yarn),
    }
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


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
