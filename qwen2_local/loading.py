"""From a model's name to something an engine can load: the file found, checked, converted if it must be, and shown to fit.

This is the one place between the store and the backends: nothing reaches a backend that has not been validated here.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_local import backends, files, fit, paths
from qwen2_local.backends.base import Backend
from qwen2_local.catalog import defaults_of
from qwen2_local.chatml import for_chats, system_of
from qwen2_local.errors import BadFile, DoesNotFit, UnknownModel, UsageError
from qwen2_local.formats.check_gguf import open_gguf
from qwen2_local.formats.checkpoint import member, open_checkpoint
from qwen2_local.formats.magic import open_regular
from qwen2_local.formats.strict_json import read_object
from qwen2_local.generation import GenerationDefaults, from_config, from_gguf
from qwen2_local.store import ModelRef, resolve
from qwen2_local.tokens import Tokenizer
from qwen2_local.types import Sampling

if TYPE_CHECKING:
    from qwen2_converters.target import Target

DEFAULT_CONTEXT = 8192
"""Tokens, where a model has as many and the caller names no other number."""

_MAX_JSON = 4_000_000
_MAX_TEMPLATE = 1_000_000
_ENDS = ("<|im_end|>", "<|endoftext|>")
_UNQUANTIZED = {"llama.cpp": "gguf:f16", "mlx": "mlx:bf16"}
_SMALL = 200_000_000
"""Bytes of weights that are converted anew for each process where the conversion cannot be kept."""
_LAYOUT = 2
"""Raise it when a change to the converters makes earlier conversions stale."""

Report = Callable[[str, int, int], None]
"""Progress of preparing a model: what is done, bytes done, bytes in all (0 where that is not known)."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked model, ready to load.

    sampling: its own; stops: ids that end a reply; load: makes the backend (on the calling thread); notes: sentences for the user.
    default_system: what its chats begin with, if they bring nothing; bos: ids that stand before plain text.
    """

    tokenizer: Tokenizer
    sampling: Sampling
    stops: frozenset[int]
    load: Callable[[], Backend]
    default_system: str | None
    bos: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def open_model(name: str, *, backend: str | None = None, context: int | None = None, report: Report | None = None) -> Opened:
    """Find, check and, on the first use of a Hugging Face folder, convert a model.

    Raises UnknownModel, BadFile, UnsupportedModel, BackendUnavailable, DoesNotFit, UsageError.
    """
    if context is not None and context < 1:
        raise UsageError(f"The context is {context}, but has to be at least 1 token.")
    if backend is not None and backend not in backends.NAMES:
        raise UsageError(f"There is no backend named {backend!r}.", hint=f"The backends are: {', '.join(backends.NAMES)}.")
    ref = resolve(name)
    if ref.format == "hf":
        return _open_converted(ref, context, backend, report)
    _require_backend(ref, backend)
    return _open(ref, context)


def installed_or_pulled(name: str, *, backend: str | None = None, report: Report | None = None) -> str:
    """`name` if there is such a model here, else the name of that which is fetched and installed for it. Raises as `pull` does."""
    try:
        resolve(name)
        return name
    except UnknownModel:
        from qwen2_converters.pull import pull

        progress = None if report is None else lambda step: report(f"{step.phase} {step.name}", step.done, step.total)
        return pull(name, backend=backend or backends.default_backend(), progress=progress)[0].name


def _open(ref: ModelRef, context: int | None) -> Opened:
    return _open_gguf(ref, context) if ref.format == "gguf" else _open_mlx(ref, context)


def _require_backend(ref: ModelRef, backend: str | None) -> None:
    fitting = {"gguf": "llama.cpp", "mlx": "mlx"}[ref.format]
    if backend is not None and backend != fitting:
        hint = f"Leave the backend away, or convert the original to {backend}'s format."
        raise UsageError(f"{ref.path} is for {fitting}, not for {backend}.", hint=hint)


def _open_gguf(ref: ModelRef, context: int | None) -> Opened:
    model = open_gguf(ref.path)
    keys, where = model.header.keys, str(ref.path)
    tokenizer = Tokenizer.from_gguf(keys, where=where)
    _agree(tokenizer, model.vocabulary, ref.path)
    template = model.header.text("tokenizer.chat_template")
    end = keys.get("tokenizer.ggml.eos_token_id")
    names = [model.header.text("general.name") or "", ref.path.name, ref.label]
    chats = for_chats(tokenizer, [end] if isinstance(end, int) else [], template)
    defaults = from_gguf(keys, tokenizer.special, fallback=defaults_of(model.hidden, model.layers, names, chats=chats), where=where)
    bos = keys.get("tokenizer.ggml.bos_token_id") if keys.get("tokenizer.ggml.add_bos_token") is True else None
    length = _length(context, model.context)
    fit.require(model.weight_bytes, model.kv_values_per_token, length, what=ref.path.name)
    load = partial(backends.load, "llama.cpp", model.paths[0], context=length)
    return Opened(tokenizer, defaults.sampling, frozenset(defaults.eos), load, system_of(template), _control(tokenizer, [bos]))


def _open_mlx(ref: ModelRef, context: int | None) -> Opened:
    model = open_checkpoint(ref.path)
    folder, config = model.folder, model.config
    tokenizer = Tokenizer.from_json(member(folder, "tokenizer.json"))
    _agree(tokenizer, config.vocabulary, ref.path)
    said = _optional_json(folder, "tokenizer_config.json")
    template = _template(folder, said)
    ends = (*config.eos, *_control(tokenizer, [_named(tokenizer, said.get("eos_token"))]))
    known = defaults_of(config.hidden, config.layers, [folder.name, ref.label], chats=for_chats(tokenizer, ends, template))
    fallback = GenerationDefaults(known, (*ends, *_control(tokenizer, map(tokenizer.special.get, _ENDS))))
    defaults = from_config(_optional_json(folder, "generation_config.json"), fallback=fallback, where=str(folder / "generation_config.json"))
    bos = _named(tokenizer, said.get("bos_token")) if said.get("add_bos_token") is True else None
    length = _length(context, config.context)
    weight_bytes, kv_bits = (model.float32_bytes, 32) if fit.MLX_WIDENS else (model.weight_bytes, 16)
    fit.require(weight_bytes, config.kv_values_per_token, length, kv_bits=kv_bits, what=folder.name)
    load = partial(backends.load, "mlx", folder, context=length)
    return Opened(tokenizer, defaults.sampling, frozenset(defaults.eos), load, system_of(template), _control(tokenizer, [bos]))


def _length(context: int | None, longest: int) -> int:
    if context is not None and context > longest:
        raise UsageError(f"The context is {context:,} tokens, but this model has {longest:,}.", hint=f"Give --context {longest} or less.")
    return context or min(longest, DEFAULT_CONTEXT)


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    path = member(folder, name)
    return read_object(path, _MAX_JSON) if path.exists() else {}


def _template(folder: Path, said: Mapping[str, Any]) -> str | None:
    """The chat template, to be looked at only: of chat_template.jinja, where transformers 5 keeps it, or of a tokenizer_config.json."""
    path = member(folder, "chat_template.jinja")
    if path.is_file():
        with open_regular(path) as file:
            return file.read(_MAX_TEMPLATE).decode(errors="replace")
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _named(tokenizer: Tokenizer, value: object) -> int | None:
    """The id of a control token as a tokenizer_config.json names it: its text, or a table with it."""
    text = value.get("content") if isinstance(value, dict) else value
    return tokenizer.special.get(text) if isinstance(text, str) else None


def _control(tokenizer: Tokenizer, ids: Iterable[object]) -> tuple[int, ...]:
    """Those of `ids` that are control tokens."""
    known = frozenset(tokenizer.special.values())
    return tuple(number for number in ids if type(number) is int and number in known)


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
        from qwen2_converters.convert import check

        check(source, target)  # its own faults come first: converting it again would not mend them
        _discard(made)
        opened = _open(replace(ref, path=_converted(replace(ref, path=source), target, made.parent, report)), context)
    return replace(opened, notes=(note,)) if note else opened


def _converted(ref: ModelRef, target: Target, folder: Path, report: Report | None) -> Path:
    """The conversion in `folder`, under a key of what it was made from. Raises OSError where that cannot be written."""
    key = hashlib.sha256(f"{_LAYOUT} {target}\n".encode())
    for file in sorted(file for kind in ("json", "jinja", "safetensors") for file in ref.path.glob(f"*.{kind}")):
        stat = file.stat()
        key.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    name = re.sub(r"[^A-Za-z0-9._-]|^[.]", "_", ref.label.partition(":")[0])[:80]
    place = f"{target.label}-{hashlib.sha256(os.fsencode(ref.path.resolve())).hexdigest()[:16]}"
    output = folder / f"{name}-{place}-{key.hexdigest()[:16]}{'.gguf' if target.format == 'gguf' else ''}"
    if output.exists():
        return output
    from qwen2_converters.convert import convert

    folder.mkdir(mode=0o700, exist_ok=True)

    def waiting(holder: str) -> None:
        if report is not None:
            report(f"waiting for {holder}, which converts {ref.label}", 0, 0)

    with files.lock(folder / f".{place}.lock", what=f"The conversion of {ref.label}", wait_s=3600.0, on_wait=waiting):
        if not output.exists():  # another process may have made it meanwhile
            progress = None if report is None else lambda p: report(p.phase, p.done, p.total)
            convert(ref.path, target, output, progress=progress, name=ref.label, cache=True)
            for stale in folder.glob(f"*-{place}-*"):  # made of what the source was before
                if stale != output:
                    with suppress(OSError):
                        _discard(stale)
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
