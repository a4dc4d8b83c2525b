"""Makes llama.cpp's own objects: a model, an adapter, a context; and maps what goes wrong to our errors."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen2_local import cpu
from qwen2_local.backends import llamalib
from qwen2_local.backends.base import BackendInfo, Layout, LoadOptions
from qwen2_local.backends.llama_state import StateFormat
from qwen2_local.errors import BackendError, BadFile, Cancelled, DoesNotFit, UnsupportedModel

STEP_TOKENS = 512
MOST_OUTPUTS = 128
"""Rows of logits in one `llama_decode`. Of 152,064 floats each: a scored text of 512 tokens would take 311 MB twice."""
MOST_SEQUENCES = 256
"""llama.cpp's own limit (LLAMA_MAX_SEQ)."""
MOST_CELLS = 2**22
"""Of all sequences together. llama.cpp takes and writes 50 bytes for each at once, before it asks for the memory of their KV."""

_BYTES_PER_THREAD = 8 << 20
"""Of weights. Below it threads wait for each other longer than they compute (ran: 9 MB decode no faster on two threads than on one)."""

_F16, _Q8_0 = 1, 8
_Q8_0_BLOCK, _Q8_0_BYTES = 32, 34


def open_model(lib: Any, path: Path, *, safe: bool, cancelled: Callable[[], bool] | None) -> Any:
    """A llama_model. Raises BadFile, UnsupportedModel, DoesNotFit, Cancelled."""
    if not path.is_file():
        raise BadFile(f"{path} is not a file.", hint="Give a GGUF file.")
    llamalib.take_log(lib)
    params = lib.llama_model_default_params()
    params.load_mode = lib.LLAMA_LOAD_MODE_MMAP
    params.use_extra_bufts = not safe
    if cancelled is not None:
        params.progress_callback = lib.llama_progress_callback(lambda _progress, _data: not cancelled())
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    said = llamalib.last_errors()
    if cancelled is not None and cancelled():
        if model:
            lib.llama_model_free(model)
        raise Cancelled("Stopped.")
    if model:
        return model
    if "unknown model architecture" in said:
        raise UnsupportedModel(f"{path.name}: {said}", hint="This program runs Qwen2 models.")
    if "allocate" in said:
        raise DoesNotFit(f"{path.name} does not fit into memory: {said}", hint="Choose a smaller model or quantization.")
    raise BadFile(
        f"llama.cpp cannot load {path.name}: {said or 'it does not say why'}",
        hint="Fetch or convert it again.",
    )


def open_adapter(lib: Any, model: Any, path: Path) -> Any:
    """A LoRA adapter for this model, which owns it from then on. Raises BadFile."""
    if not path.is_file():
        raise BadFile(f"{path} is not a file.", hint="Give an adapter as a GGUF file.")
    llamalib.last_errors()
    adapter = lib.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise BadFile(
            f"llama.cpp cannot load the adapter {path.name}: {llamalib.last_errors() or 'it does not say why'}",
            hint="Is it for this model? Convert it again.",
        )
    return adapter


def open_context(lib: Any, model: Any, layout: Layout, options: LoadOptions, *, adapter: Any, threads: int | None) -> Any:
    """A llama_context: one unified cache for one sequence and a scratch, else a stream for each. Raises DoesNotFit, BackendError.

    Flash attention is fixed, not llama.cpp's guess: it decides how V lies in memory.
    """
    if layout.context < 1 or not 1 <= layout.sequences <= MOST_SEQUENCES:
        raise BackendError(
            f"A context of {layout.context} tokens for {layout.sequences} sequences cannot be made.", hint=f"Ask for 1 to {MOST_SEQUENCES}."
        )
    if layout.yarn and not options.yarn_factor:
        raise BackendError("This model has no YaRN.", hint="Ask for a context that it has without.")
    too_much = f"llama.cpp could not make a context of {layout.context} tokens x {layout.sequences}"
    if layout.context * layout.sequences > MOST_CELLS:
        raise DoesNotFit(f"{too_much}: it counts to {MOST_CELLS}.", hint="Choose a smaller context (--context).")
    params = lib.llama_context_default_params()
    params.n_ctx = layout.context * layout.sequences
    params.kv_unified = layout.sequences == 1
    params.n_seq_max = 2 if params.kv_unified else layout.sequences
    params.n_batch = params.n_ubatch = STEP_TOKENS
    params.n_outputs_max = max(MOST_OUTPUTS, params.n_seq_max)
    params.n_threads_batch = threads or cpu.cores()
    params.n_threads = threads or min(cpu.cores(), max(1, lib.llama_model_size(model) // _BYTES_PER_THREAD))
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = _kv_type(lib, model, options)[0]
    if layout.yarn:
        params.rope_scaling_type = lib.LLAMA_ROPE_SCALING_TYPE_YARN
        params.rope_freq_scale = 1 / options.yarn_factor
        params.yarn_orig_ctx = options.yarn_original
    llamalib.last_errors()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise DoesNotFit(f"{too_much}: {llamalib.last_errors()}", hint="Choose a smaller context (--context) or a smaller model.")
    if adapter:
        adapters, scales = (type(adapter) * 1)(adapter), (ctypes.c_float * 1)(1.0)
        if lib.llama_set_adapters_lora(context, adapters, 1, scales):
            lib.llama_free(context)
            raise BackendError("llama.cpp does not take the adapter.", hint="Convert it again.")
    return context


def state_format(lib: Any, model: Any, layout: Layout, options: LoadOptions) -> StateFormat:
    """How the KV of this model, laid out so, is written down."""
    kind, row = _kv_type(lib, model, options)
    return StateFormat(lib.llama_model_n_layer(model), row, kind, layout.sequences)


def describe(lib: Any, model: Any, options: LoadOptions, notes: tuple[str, ...]) -> BackendInfo:
    """What a model says of itself."""
    buffer = ctypes.create_string_buffer(128)
    lib.llama_model_meta_val_str(model, b"general.architecture", buffer, len(buffer))
    layers = lib.llama_model_n_layer(model)
    return BackendInfo(
        name="llama.cpp",
        version=llamalib.version(),
        architecture=buffer.value.decode("utf-8", "replace"),
        context=options.context,
        vocabulary=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)),
        layers=layers,
        kv_bytes_per_token=2 * layers * _kv_type(lib, model, options)[1],
        yarn_context=options.yarn_context,
        notes=notes,
    )


def _kv_type(lib: Any, model: Any, options: LoadOptions) -> tuple[int, int]:
    """The ggml type of K and V, and the bytes of a token in one of them."""
    head = lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)
    width = lib.llama_model_n_head_kv(model) * head
    if options.kv_bits == 16:
        return _F16, 2 * width
    if options.kv_bits != 8 or head % _Q8_0_BLOCK:
        raise BackendError(f"A KV cache of {options.kv_bits} bits is not possible for heads of {head} numbers.", hint="Use 16 bits.")
    return _Q8_0, width // _Q8_0_BLOCK * _Q8_0_BYTES
