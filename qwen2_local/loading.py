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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2_local import backends, files, fit, paths
from qwen2_local.adapter import Found as FoundAdapter
from qwen2_local.adapter import find as find_adapter
from qwen2_local.backends import Stamp
from qwen2_local.backends.base import Layout, LoadOptions
from qwen2_local.catalog import defaults_of, yarn_context_of
from qwen2_local.chatml import for_chats, system_of
from qwen2_local.errors import BadFile, DoesNotFit, UnknownModel, UsageError
from qwen2_local.formats.check_adapter import check_gguf_adapter
from qwen2_local.formats.check_gguf import GgufModel, open_gguf
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
"""Tokens that a model begins with, where it has as many and the caller names no other number."""

_LEAST_CONTEXT = 256
_LONGEST_CONTEXT = 1 << 24

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
class _Wish:
    """How a model is to be loaded; see `open_model`."""

    context: int | None = None
    adapter: Path | None = None
    kv_bits: int = 16
    force: bool = False
    parallel: int = 8
    beside: int = 0
    safe: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A checked model, ready to load.

    sampling: its own; stops: ids that end a reply; notes: sentences for the user.
    default_system: what its chats begin with, if they bring nothing; bos: ids that stand before plain text.
    plan: how to load it. memory: bytes it is estimated to take; kv_memory: bytes that the KV of all sequences at once may take. kv_cache: may
    KV be kept on the disk? label: its full name ("7b:q4_0", where "7b" was asked for), as the store has it; else its file's.
    """

    tokenizer: Tokenizer
    sampling: Sampling
    stops: frozenset[int]
    plan: backends.Plan
    default_system: str | None
    bos: tuple[int, ...]
    memory: int
    kv_memory: int
    notes: tuple[str, ...] = ()
    kv_cache: bool = True
    label: str = ""


def open_model(
    name: str,
    *,
    backend: str | None = None,
    context: int | None = None,
    report: Report | None = None,
    adapter: str | Path | None = None,
    kv_bits: int = 16,
    kv_cache: bool = True,
    parallel: int = 8,
    force: bool = False,
    beside: int = 0,
    safe: bool = False,
) -> Opened:
    """Find, check and, on the first use of a Hugging Face folder, convert a model.

    context: the most tokens of prompt and reply together; None for what the model and the memory allow, which begins with 8,192 at most.
    adapter: a LoRA to put on it: PEFT's folder, or one of the backend's own format. kv_bits: 16, or 8. kv_cache: keep KV on the disk.
    parallel: how many requests at once to have memory for, if there is as much. force: also where it will not fit. beside: bytes of memory
    that something else, not loaded yet, will take. safe: without llama.cpp's code for special processors.
    Raises UnknownModel, BadFile, UnsupportedModel, BackendUnavailable, DoesNotFit, UsageError.
    """
    if context is not None and context < 1:
        raise UsageError(f"The context is {context}, but has to be at least 1 token.")
    if backend is not None and backend not in backends.NAMES:
        raise UsageError(f"There is no backend named {backend!r}.", hint=f"The backends are: {', '.join(backends.NAMES)}.")
    if kv_bits not in (8, 16):
        raise UsageError(f"KV is kept in 16 or 8 bits, not in {kv_bits}.")
    if parallel < 1:
        raise UsageError(f"{parallel} requests at once are none.", hint="Give 1 or more.")
    ref = resolve(name)
    wish = _Wish(context, None if adapter is None else Path(adapter).expanduser(), kv_bits, force, parallel, beside, safe)
    if ref.format == "hf":
        opened = _open_converted(ref, wish, backend, report)
    else:
        _require_backend(ref, backend)
        opened = _open(ref, wish)
    return replace(opened, kv_cache=kv_cache, label=ref.label)


def installed_or_pulled(name: str, *, backend: str | None = None, report: Report | None = None) -> str:
    """`name` if there is such a model here, else the name of that which is fetched and installed for it. Raises as `pull` does."""
    try:
        resolve(name)
        return name
    except UnknownModel:
        from qwen2_converters.pull import pull

        progress = None if report is None else lambda step: report(f"{step.phase} {step.name}", step.done, step.total)
        return pull(name, backend=backend or backends.default_backend(), progress=progress)[0].name


def _open(ref: ModelRef, wish: _Wish, key: str = "") -> Opened:
    """key: what tells a conversion from all others; "" for what is none."""
    return _open_gguf(ref, wish, key) if ref.format == "gguf" else _open_mlx(ref, wish, key)


def _require_backend(ref: ModelRef, backend: str | None) -> None:
    fitting = {"gguf": "llama.cpp", "mlx": "mlx"}[ref.format]
    if backend is not None and backend != fitting:
        hint = f"Leave the backend away, or convert the original to {backend}'s format."
        raise UsageError(f"{ref.path} is for {fitting}, not for {backend}.", hint=hint)


def _open_gguf(ref: ModelRef, wish: _Wish, key: str) -> Opened:
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
    native, stretched = _gguf_contexts(model, names, chats=chats)
    adapter = None if wish.adapter is None else find_adapter(wish.adapter, "gguf")
    extra = 0 if adapter is None else check_gguf_adapter(adapter.path, model)
    shape = _Shape(model.weight_bytes + extra, model.kv_values_per_token, 8.5 if wish.kv_bits == 8 else 16, native, stretched)
    room = _room(shape, wish, ref.path.name)
    weights = tuple(Stamp.of(path) for path in model.paths)
    plan = _plan("llama.cpp", model.paths[0], shape, room, wish, _identity(ref, key, weights), weights, adapter)
    return Opened(
        tokenizer, defaults.sampling, frozenset(defaults.eos), plan, system_of(template), _control(tokenizer, [bos]),
        room.memory, room.kv_memory, room.notes,
    )  # fmt: skip


def _open_mlx(ref: ModelRef, wish: _Wish, key: str) -> Opened:
    model = open_checkpoint(ref.path)
    folder, config = model.folder, model.config
    tokenizer = Tokenizer.from_json(member(folder, "tokenizer.json"))
    _agree(tokenizer, config.vocabulary, ref.path)
    said = _optional_json(folder, "tokenizer_config.json")
    template = _template(folder, said)
    ends = (*config.eos, *_control(tokenizer, [_named(tokenizer, said.get("eos_token"))]))
    names, chats = [folder.name, ref.label], for_chats(tokenizer, ends, template)
    known = defaults_of(config.hidden, config.layers, names, chats=chats)
    fallback = GenerationDefaults(known, (*ends, *_control(tokenizer, map(tokenizer.special.get, _ENDS))))
    defaults = from_config(_optional_json(folder, "generation_config.json"), fallback=fallback, where=str(folder / "generation_config.json"))
    bos = _named(tokenizer, said.get("bos_token")) if said.get("add_bos_token") is True else None
    stretched = 0
    if config.yarn is None:
        stretched = yarn_context_of(config.hidden, config.layers, config.context, names, experts=config.moe is not None, chats=chats)
    weight_bytes, wide = (model.float32_bytes, 32) if fit.MLX_WIDENS else (model.weight_bytes, 16)
    adapter = None if wish.adapter is None else find_adapter(wish.adapter, "mlx")  # the backend checks it against the config
    weight_bytes += 0 if adapter is None else adapter.size * (2 if fit.MLX_WIDENS else 1)
    shape = _Shape(weight_bytes, config.kv_values_per_token, _mlx_kv_bits(wish.kv_bits, wide, config.head_dim), config.context, stretched)
    room = _room(shape, wish, folder.name)
    weights = tuple(Stamp.of(path) for path in (folder / "config.json", *model.shards))
    plan = _plan("mlx", folder, shape, room, wish, _identity(ref, key, weights), weights, adapter)
    return Opened(
        tokenizer, defaults.sampling, frozenset(defaults.eos), plan, system_of(template), _control(tokenizer, [bos]),
        room.memory, room.kv_memory, room.notes,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Shape:
    """What decides the memory. kv_bits: of a value, on average. native, stretched: the longest contexts without YaRN, and with it or 0."""

    weight_bytes: int
    kv_values_per_token: int
    kv_bits: float
    native: int
    stretched: int


@dataclass(frozen=True, slots=True)
class _Room:
    """What memory there is for. begin: the first layout's context. context, yarn_context: as in `LoadOptions`. memory, kv_memory: as in `Opened`."""

    begin: int
    context: int
    yarn_context: int
    memory: int
    kv_memory: int
    notes: tuple[str, ...] = ()


def _room(shape: _Shape, wish: _Wish, what: str) -> _Room:
    """The contexts that the model and the memory allow. Raises UsageError, DoesNotFit."""
    longest = max(shape.native, shape.stretched)
    memory = fit.machine_memory()
    memory = replace(memory, available=max(0, memory.available - wish.beside))
    sizes = (shape.weight_bytes, shape.kv_values_per_token)
    notes: tuple[str, ...] = ()
    if wish.context is not None:
        if wish.context > longest:
            hint = f"Give --context {longest} or less."
            raise UsageError(f"The context is {wish.context:,} tokens, but this model has {longest:,}.", hint=hint)
        most = wish.context
        begin = min(most, shape.native)
        if not wish.force:
            fit.require(*sizes, most, kv_bits=shape.kv_bits, what=what, memory=memory)
    else:
        usual = begin = min(shape.native, DEFAULT_CONTEXT)
        most = longest
        if not wish.force:
            # What grows unasked leaves a tenth of the memory alone.
            most = fit.largest_context(*sizes, memory.available * 9 // 10, longest, shape.kv_bits)
            if most < usual:
                most = fit.largest_context(*sizes, memory.available, usual, shape.kv_bits)
            if most < min(usual, _LEAST_CONTEXT):
                fit.require(*sizes, usual, kv_bits=shape.kv_bits, what=what, memory=memory)
            if most < usual:
                begin = most
                notes = (f"There is memory for a context of {most:,} tokens, not for the usual {usual:,}.",)
    context = min(most, shape.native)
    kv = fit.kv_bytes(shape.kv_values_per_token, context, shape.kv_bits)
    spare = memory.available - shape.weight_bytes - fit.OVERHEAD
    longest_kv = fit.kv_bytes(shape.kv_values_per_token, most, shape.kv_bits)
    needed = fit.memory_needed(*sizes, begin, shape.kv_bits)
    return _Room(begin, context, most if most > shape.native else 0, needed, max(longest_kv, min(wish.parallel * kv, spare * 9 // 10)), notes)


def _gguf_contexts(model: GgufModel, names: Sequence[str], *, chats: bool) -> tuple[int, int]:
    """The longest contexts, without YaRN and with it (0: it has none). A file that says how its RoPE is scaled is always scaled so."""
    keys, at = model.header.keys, f"{model.architecture}.rope.scaling."
    scaling, factor = keys.get(f"{at}type"), keys.get(f"{at}factor")
    if scaling == "yarn" and isinstance(factor, float):
        original = keys.get(f"{at}original_context_length") or model.context
        assert isinstance(original, int)
        return min(max(model.context, round(factor * original)), _LONGEST_CONTEXT), 0
    if scaling not in (None, "none"):
        return model.context, 0
    experts = model.architecture == "qwen2moe"
    return model.context, yarn_context_of(model.hidden, model.layers, model.context, names, experts=experts, chats=chats)


def _mlx_kv_bits(asked: int, wide: int, head_dim: int) -> float:
    """Bits of a value: quantized ones have a scale and a zero for 64 of them, or for 32 where a head is no multiple of 64."""
    return wide if asked == 16 else 8 + 2 * wide / (64 if head_dim % 64 == 0 else 32)


def _plan(
    backend: str, path: Path, shape: _Shape, room: _Room, wish: _Wish, identity: str, weights: tuple[Stamp, ...], adapter: FoundAdapter | None
) -> backends.Plan:
    options = LoadOptions(
        identity=identity,
        context=room.context,
        adapter=adapter.path if adapter else None,
        adapter_identity=adapter.identity if adapter else "",
        kv_bits=wish.kv_bits,
        yarn_context=room.yarn_context,
        yarn_factor=shape.stretched / shape.native if room.yarn_context else 0.0,
        yarn_original=shape.native,
        safe=wish.safe,
    )
    return backends.Plan(backend, path, Layout(1, room.begin), options, (*weights, *(adapter.files if adapter else ())))


def _identity(ref: ModelRef, key: str, weights: Iterable[Stamp]) -> str:
    """A hash that is another for other weights: of a conversion's key; of the manifest's hashes; else of where, how large and how old they are."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape"))
    if key:
        return digest.hexdigest()
    if ref.manifest is not None:
        what = [f"{file.sha256} {file.name}" for file in ref.manifest.files]
    else:
        what = [f"{stamp.path.resolve()} {stamp.size} {stamp.changed}" for stamp in weights]
    digest.update("\n".join(what).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


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


def _open_converted(ref: ModelRef, wish: _Wish, backend: str | None, report: Report | None) -> Opened:
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
        opened = _open(ref, wish, made.name)
    except BadFile:
        from qwen2_converters.convert import check

        check(source, target)  # its own faults come first: converting it again would not mend them
        _discard(made)
        opened = _open(replace(ref, path=_converted(replace(ref, path=source), target, made.parent, report)), wish, made.name)
    return replace(opened, notes=(*opened.notes, note)) if note else opened


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
