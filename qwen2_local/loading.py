"""From a model's name to something an engine can load: the file found, checked, converted if it must be, and shown to fit.

This is the one place between the store and the backends: nothing reaches a backend that has not been validated here.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qwen2_local import backends, files, fit, paths
from qwen2_local.backends.base import Backend
from qwen2_local.catalog import defaults_of
from qwen2_local.errors import BadFile, UnknownModel, UsageError
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.strict_json import read_object
from qwen2_local.generation import GenerationDefaults, from_config, from_gguf
from qwen2_local.store import GUIDE, ModelRef, resolve
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Sampling

DEFAULT_CONTEXT = 8192
"""Tokens, where a model has as many and the caller names no other number."""

_UNQUANTIZED = {"llama.cpp": "gguf:f16", "mlx": "mlx:bf16"}
_LAYOUT = 1
"""Raise it when a change to the converters makes earlier conversions stale."""

Report = Callable[[str, int, int], None]
"""Progress of preparing a model: what is done in a word, bytes done, bytes in all."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked model, ready to load. sampling: its own; stops: ids that end a reply; load: makes the backend (on the calling thread)."""

    tokenizer: Tokenizer
    sampling: Sampling
    stops: frozenset[int]
    load: Callable[[], Backend]


def open_model(name: str, *, backend: str | None = None, context: int | None = None, report: Report | None = None) -> Opened:
    """Find, check and, on the first use of a Hugging Face folder, convert a model.

    Raises UnknownModel, BadFile, UnsupportedModel, BackendUnavailable, DoesNotFit, UsageError.
    """
    if context is not None and context < 1:
        raise UsageError(f"The context is {context}, but has to be at least 1 token.")
    ref = _guide(name) or resolve(name)
    if ref.format == "hf":
        ref = _converted(ref, backend, report)
    fitting = {"gguf": "llama.cpp", "mlx": "mlx"}[ref.format]
    if backend is not None and backend != fitting:
        raise UsageError(f"{ref.path} is for {fitting}, not for {backend}.", hint=f"Leave --backend away, or convert the original to {backend}'s format.")
    return _open_gguf(ref, context) if ref.format == "gguf" else _open_mlx(ref, context)


def _guide(name: str) -> ModelRef | None:
    """The built-in guide in a given quantization: "guide:q4_0", "guide:mlx-4bit"."""
    start, colon, label = name.lower().partition(":")
    if start != GUIDE or not colon:
        return None
    from qwen2_converters.target import VALID, Target

    targets = {Target.parse(text).label: text for text in VALID}
    if label not in targets:
        raise UnknownModel(f'there is no "{name[:60]}".', hint=f"The guide comes as {GUIDE}, or as {GUIDE}: and one of {', '.join(targets)}.")
    return replace(resolve(GUIDE), label=name.lower(), target=targets[label])


def _open_gguf(ref: ModelRef, context: int | None) -> Opened:
    model = open_gguf(ref.path)
    tokenizer = Tokenizer.from_gguf(model.header.keys, where=str(ref.path))
    _agree(tokenizer, model.vocabulary, ref.path)
    known = defaults_of(model.hidden, model.layers, model.header.text("general.name") or ref.path.name)
    defaults = from_gguf(model.header.keys, tokenizer.special, fallback=known, where=str(ref.path))
    return _opened("llama.cpp", model.paths[0], context, model.context, tokenizer, defaults, model.weight_bytes, model.kv_values_per_token)


def _open_mlx(ref: ModelRef, context: int | None) -> Opened:
    model = open_checkpoint(ref.path)
    tokenizer = Tokenizer.from_json(ref.path / "tokenizer.json")
    _agree(tokenizer, model.config.vocabulary, ref.path)
    known = defaults_of(model.config.hidden, model.config.layers, ref.path.name) or Sampling()
    ends = [tokenizer.special[mark] for mark in ("<|im_end|>", "<|endoftext|>") if mark in tokenizer.special]
    defaults = GenerationDefaults(known, tuple(dict.fromkeys((*model.config.eos, *ends))))
    file = ref.path / "generation_config.json"
    if file.is_file():
        defaults = from_config(read_object(file, 1_000_000), fallback=defaults, where=str(file))
    return _opened("mlx", ref.path, context, model.config.context, tokenizer, defaults, model.weight_bytes, model.config.kv_values_per_token)


def _opened(
    backend: str,
    path: Path,
    context: int | None,
    longest: int,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    weight_bytes: int,
    kv_values_per_token: int,
) -> Opened:
    if context is not None and context > longest:
        raise UsageError(f"The context is {context:,} tokens, but this model has {longest:,}.", hint=f"Give --context {longest} or less.")
    length = context or min(longest, DEFAULT_CONTEXT)
    fit.require(weight_bytes, kv_values_per_token, length, what=path.name)
    return Opened(tokenizer, defaults.sampling, frozenset(defaults.eos), lambda: backends.load(backend, path, context=length))


def _agree(tokenizer: Tokenizer, vocabulary: int, path: Path) -> None:
    if tokenizer.size > vocabulary:
        raise BadFile(
            f"{path}: the tokenizer has {tokenizer.size:,} tokens, the model only {vocabulary:,}.", hint="They do not belong together: fetch the model again."
        )


def _converted(ref: ModelRef, backend: str | None, report: Report | None) -> ModelRef:
    """The model converted for a backend, once: kept in the cache folder under a key of what it was made from."""
    from qwen2_converters.convert import convert
    from qwen2_converters.target import Target

    target = Target.parse(ref.target or _UNQUANTIZED[backend or backends.default_backend()])
    key = hashlib.sha256(f"{_LAYOUT} {target}\n".encode())
    for file in sorted((*ref.path.glob("*.json"), *ref.path.glob("*.safetensors"))):
        stat = file.stat()
        key.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    folder = paths.cache() / "converted"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not paths.writable(folder):
        folder = _for_this_process()
    suffix = ".gguf" if target.format == "gguf" else ""
    output = folder / f"{ref.label.partition(':')[0]}-{target.label}-{key.hexdigest()[:16]}{suffix}"
    if not output.exists():
        files.sweep(folder)
        with files.lock(folder / ".lock", wait_s=3600.0):
            if not output.exists():  # another process may have made it meanwhile
                convert(ref.path, target, output, progress=None if report is None else lambda p: report(p.phase, p.done, p.total), name=ref.label)
    return replace(ref, format=target.format, path=output)


def _for_this_process() -> Path:
    """A folder that goes when this process ends, for a home that cannot be written."""
    folder = Path(tempfile.mkdtemp(prefix="qwen2-local-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
