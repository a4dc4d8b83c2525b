"""From a model's name to something an engine can load: the file found, checked, converted if it must be, and shown to fit.

This is the one place between the store and the backends: nothing reaches a backend that has not been validated here.
"""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2_local import backends, files, fit, paths
from qwen2_local.backends.base import Backend
from qwen2_local.catalog import defaults_of
from qwen2_local.errors import BadFile, DoesNotFit, UnknownModel, UsageError
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import open_checkpoint
from qwen2_local.formats.strict_json import read_object
from qwen2_local.generation import GenerationDefaults, from_config, from_gguf
from qwen2_local.store import GUIDE, ModelRef, resolve
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Sampling

if TYPE_CHECKING:
    from qwen2_converters.target import Target

DEFAULT_CONTEXT = 8192
"""Tokens, where a model has as many and the caller names no other number."""

_UNQUANTIZED = {"llama.cpp": "gguf:f16", "mlx": "mlx:bf16"}
_SMALL = 200_000_000
"""Bytes of weights that are converted anew for each process where the conversion cannot be kept."""
_LAYOUT = 1
"""Raise it when a change to the converters makes earlier conversions stale."""

Report = Callable[[str, int, int], None]
"""Progress of preparing a model: what is done in a word, bytes done, bytes in all."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked model, ready to load.

    sampling: its own; stops: ids that end a reply; load: makes the backend (on the calling thread); notes: sentences for the user.
    """

    tokenizer: Tokenizer
    sampling: Sampling
    stops: frozenset[int]
    load: Callable[[], Backend]
    notes: tuple[str, ...] = ()


def open_model(name: str, *, backend: str | None = None, context: int | None = None, report: Report | None = None) -> Opened:
    """Find, check and, on the first use of a Hugging Face folder, convert a model.

    Raises UnknownModel, BadFile, UnsupportedModel, BackendUnavailable, DoesNotFit, UsageError.
    """
    if context is not None and context < 1:
        raise UsageError(f"The context is {context}, but has to be at least 1 token.")
    if backend is not None and backend not in backends.NAMES:
        raise UsageError(f"There is no backend named {backend!r}.", hint=f"The backends are: {', '.join(backends.NAMES)}.")
    ref = _guide(name) or resolve(name)
    if ref.format == "hf":
        return _open_converted(ref, context, backend, report)
    _require_backend(ref, backend)
    return _open(ref, context)


def _open(ref: ModelRef, context: int | None) -> Opened:
    return _open_gguf(ref, context) if ref.format == "gguf" else _open_mlx(ref, context)


def _require_backend(ref: ModelRef, backend: str | None) -> None:
    fitting = {"gguf": "llama.cpp", "mlx": "mlx"}[ref.format]
    if backend is not None and backend != fitting:
        hint = f"Leave the backend away, or convert the original to {backend}'s format."
        raise UsageError(f"{ref.path} is for {fitting}, not for {backend}.", hint=hint)


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
        hint = "They do not belong together: fetch the model again."
        raise BadFile(f"{path}: the tokenizer has {tokenizer.size:,} tokens, the model only {vocabulary:,}.", hint=hint)


def _open_converted(ref: ModelRef, context: int | None, backend: str | None, report: Report | None) -> Opened:
    """Convert a checkpoint for a backend, once, and open the conversion; a damaged one is made anew."""
    from qwen2_converters.target import Target

    target = Target.parse(ref.target or _UNQUANTIZED[backend or backends.default_backend()])
    ref = replace(ref, format=target.format)
    _require_backend(ref, backend)
    source = ref.path
    note = ""
    try:
        made = _converted(ref, target, paths.cache() / "converted", report)
    except (OSError, DoesNotFit) as error:
        # Small ones can be made anew each time, where the home is read-only or full.
        cause = error.what if isinstance(error, DoesNotFit) else f"{error.filename or paths.cache()}: {error.strerror}."
        if sum(file.stat().st_size for file in source.glob("*.safetensors")) > _SMALL:
            if isinstance(error, DoesNotFit):
                raise
            hint = "Set QWEN2_LOCAL_HOME to a folder that can be written, or convert it with `qwen2-local convert`."
            raise UsageError(f"The model has to be converted, but {cause}", hint=hint) from error
        note = f"The converted model cannot be kept: {cause} It is made anew each time; QWEN2_LOCAL_HOME chooses another folder."
        made = _converted(ref, target, _for_this_process(), report)
    ref = replace(ref, path=made)
    try:
        opened = _open(ref, context)
    except BadFile:
        open_checkpoint(source)  # its own faults come first
        _discard(made)
        opened = _open(replace(ref, path=_converted(replace(ref, path=source), target, made.parent, report)), context)
    return replace(opened, notes=(note,)) if note else opened


def _converted(ref: ModelRef, target: Target, folder: Path, report: Report | None) -> Path:
    """The conversion in `folder`, under a key of what it was made from. Raises OSError where that cannot be written."""
    from qwen2_converters.convert import convert

    key = hashlib.sha256(f"{_LAYOUT} {target}\n".encode())
    for file in sorted((*ref.path.glob("*.json"), *ref.path.glob("*.safetensors"))):
        stat = file.stat()
        key.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    name = re.sub(r"[^A-Za-z0-9._-]|^[.]", "_", ref.label.partition(":")[0])[:80]
    output = folder / f"{name}-{target.label}-{key.hexdigest()[:16]}{'.gguf' if target.format == 'gguf' else ''}"
    if output.exists():
        return output
    folder.mkdir(mode=0o700, exist_ok=True)
    files.sweep(folder)

    def waiting(holder: str) -> None:
        if report is not None:
            report(f"waiting for {holder}, which converts a model", 0, 1)

    with files.lock(folder / ".lock", wait_s=3600.0, on_wait=waiting):
        if not output.exists():  # another process may have made it meanwhile
            convert(ref.path, target, output, progress=None if report is None else lambda p: report(p.phase, p.done, p.total), name=ref.label)
    return output


def _discard(made: Path) -> None:
    """Delete a conversion."""
    if made.is_dir():
        files.remove_folder(made)
    else:
        made.unlink(missing_ok=True)


def _for_this_process() -> Path:
    """A folder that goes when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="qwen2-local-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
