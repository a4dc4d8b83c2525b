"""ggml's own quantizers, bound with ctypes from the library that llama-cpp-python brings: the same bytes as llama.cpp's quantizer.

The functions let go of Python's lock, so threads run them side by side.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen2_converters.lanes import Kernel
from qwen2_local.backends import llamalib
from qwen2_local.errors import BackendUnavailable
from qwen2_local.formats.ggml_types import GgmlType

Bytes: TypeAlias = "npt.NDArray[np.uint8]"

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")


def prepare(kind: GgmlType) -> None:
    """Call once before `quantize`, from one thread. Raises BackendUnavailable if the library is missing or lays out `kind` otherwise."""
    lib = _library()
    if lib.ggml_row_size(kind.number, kind.block) != kind.block_bytes:
        raise BackendUnavailable(f"This version of llama.cpp lays out {kind.name} differently.", hint="Install the one qwen2-local asks for.")
    lib.ggml_quantize_init(kind.number)


def to_float32(raw: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    """The weights in `raw`, little-endian "BF16", "F16" or "F32", as float32; exact."""
    if dtype == "F32":
        return raw.view(np.float32)
    convert = {"BF16": _library().ggml_bf16_to_fp32_row, "F16": _library().ggml_fp16_to_fp32_row}[dtype]
    weights = np.empty(raw.size // 2, np.float32)
    convert(raw.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def quantize(
    weights: npt.NDArray[np.float32],
    columns: int,
    kind: GgmlType,
    importance: npt.NDArray[np.float32] | None = None,
    *,
    kernel: Kernel | None = None,
) -> Bytes:
    """Whole rows of `columns` weights as ggml keeps them. `columns` have to be whole blocks of `kind`.

    importance: of each column, where it is known; raises ValueError if numbers in it are so large that scales come out as none.
    kernel: for `kind`, where there is one. It makes the same bytes, faster.
    """
    if kind.name == "F32":
        return weights.view(np.uint8)
    rows = weights.size // columns
    packed = np.empty(rows * kind.row_bytes(columns), np.uint8)
    assert importance is None or importance.size == columns
    guide = None if importance is None else importance.ctypes.data
    if kernel:
        kernel(weights.ctypes.data, packed.ctypes.data, packed.size // kind.block_bytes, guide, columns // kind.block)
    else:
        written = _library().ggml_quantize_chunk(kind.number, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, guide)
        assert written == packed.size
    # Without an importance, finite weights give finite scales.
    if guide is not None and not _library().ggml_validate_row_data(kind.number, packed.ctypes.data, packed.size):
        raise ValueError("the importance makes scales that are no finite numbers")
    return packed


def dequantize(packed: Bytes, kind: GgmlType) -> npt.NDArray[np.float32]:
    """The weights in whole blocks of `kind`, as llama.cpp reads them. Raises BackendUnavailable if the library does not know the type."""
    if kind.name == "F32":
        return packed.view(np.float32)
    traits = _library().ggml_get_type_traits(kind.number).contents
    if (traits.block, traits.block_bytes) != (kind.block, kind.block_bytes) or not traits.to_float:
        raise BackendUnavailable(f"This version of llama.cpp does not read {kind.name}.", hint="Install the one qwen2-local asks for.")
    weights = np.empty(packed.size // kind.block_bytes * kind.block, np.float32)
    traits.to_float(packed.ctypes.data, weights.ctypes.data, weights.size)
    return weights


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@functools.cache
def _library() -> Any:
    # It brings OpenMP, which reads its settings from the environment once: llamalib has to load it first, with those that it wants.
    llamalib.library()
    path = llamalib.folder() / "lib" / _LIBRARY
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_row_size": (ctypes.c_size_t, [number, whole]),
        "ggml_quantize_init": (None, [number]),
        "ggml_quantize_chunk": (ctypes.c_size_t, [number, pointer, pointer, whole, whole, whole, pointer]),
        "ggml_validate_row_data": (ctypes.c_bool, [number, pointer, ctypes.c_size_t]),
        "ggml_bf16_to_fp32_row": (None, [pointer, pointer, whole]),
        "ggml_fp16_to_fp32_row": (None, [pointer, pointer, whole]),
        "ggml_get_type_traits": (ctypes.POINTER(_Traits), [number]),
    }
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"llama.cpp's library for conversions does not load: {error}", hint="See `qwen2-local doctor`.") from error
    return lib
