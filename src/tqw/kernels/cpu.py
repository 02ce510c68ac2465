"""C kernels for the CPU: int8 activations, one scale for each chunk of at most 128 inputs, on the stored layout.

    y[n] = sum over chunks of weight_scale[n, group] * sx[chunk] * sum_k level[code[n, k]] * q[k] + b[n]
    q    = round(T(x) / sx),  sx = max |T(x)| / 127 over the chunk

For weights of 6 bits and more (all passes together) what that rounding leaves is quantized and multiplied too.

cpu.c is built with the package where there is a C compiler (setup.py) and loaded here with ctypes on first use.
Two environment variables are for tests and ablations: TQW_CPU_ISA (portable, neon, avx2, avxvnni, avx512, amx) picks
a lesser instruction set, TQW_CPU_ACTIVATIONS=float keeps the activations in float32.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqw.codebook import levels
from tqw.errors import TqwError
from tqw.weight import QuantizedWeight

ISAS = ("portable", "neon", "avx2", "avxvnni", "avx512", "amx")  # the order of cpu.c
_ROTATIONS = ("none", "hadamard", "qr")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_PASSES = 4
_LIBRARY = Path(__file__).with_name("_cpu.so")
_Size = ctypes.c_int64
_Pointer = ctypes.c_void_p


class _Pass(ctypes.Structure):
    _fields_ = [(name, _Pointer) for name in ("packed", "scale", "channel", "levels")] + [("bits", _Size)]


class _Weight(ctypes.Structure):
    _fields_ = [
        *((name, _Size) for name in ("out", "in", "padded", "group", "block", "rotation", "passes")),
        ("matrix", _Pointer),
        ("pass", _Pass * _MAX_PASSES),
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    if not _LIBRARY.is_file():
        return f"{_LIBRARY.name} was not built (no C compiler at install time?): reinstall tqw where gcc or clang is"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    library.tqw_isa.restype = library.tqw_linear.restype = _Size
    library.tqw_threads.argtypes = [_Pointer]
    library.tqw_threads(_openmp())
    library.tqw_dense.restype = library.tqw_linears.restype = _Size
    library.tqw_linears.argtypes = [_Pointer, _Size, _Pointer, _Pointer, _Pointer] + [_Size] * 6
    library.tqw_linear.argtypes = [_Pointer] * 4 + [_Size] * 6
    library.tqw_dense.argtypes = [_Pointer] * 3 + [_Size] * 4
    return library


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself is linked with; None: one thread only."""
    for path in Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, _Pointer).value
        except (OSError, AttributeError):
            continue
    return None


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, slowest first; empty without the library."""
    library = _library()
    if isinstance(library, str):
        return ()
    best = library.tqw_isa()
    x86 = ISAS[best].startswith(("avx", "amx"))
    return tuple(
        name
        for index, name in enumerate(ISAS[: best + 1])
        if not (x86 and name == "neon") and not (name == "avxvnni" and best != index)
    )


@lru_cache(maxsize=1)
def settings() -> tuple[int, bool]:
    """(instruction set, float activations) from the environment. `settings.cache_clear()` reads it again."""
    isas = available_isas()
    wanted = os.environ.get("TQW_CPU_ISA", isas[-1])
    if wanted not in isas:
        raise TqwError(f"expected TQW_CPU_ISA to be one of {', '.join(isas)} on this machine, got {wanted!r}")
    activations = os.environ.get("TQW_CPU_ACTIVATIONS", "int8")
    if activations not in ("int8", "float"):
        raise TqwError(f"expected TQW_CPU_ACTIVATIONS to be int8 or float, got {activations!r}")
    return ISAS.index(wanted), activations == "float"


@lru_cache(maxsize=8)
def _levels(bits: int) -> ctypes.Array[ctypes.c_int8]:
    return (ctypes.c_int8 * 2**bits)(*levels(bits))


class _Arguments:
    """The C view of one weight: addresses and sizes, no reference to the tensors."""

    def __init__(self, qw: QuantizedWeight) -> None:
        passes = [
            _Pass(packed.data_ptr(), scale.data_ptr(), qw.scale_of_pass(index).data_ptr(),
                  ctypes.addressof(_levels(bits)), bits)
            for index, (packed, scale, bits) in enumerate(zip(qw.packed, qw.weight_scale, qw.bits, strict=True))
        ]  # fmt: skip
        self.weight = _Weight(
            qw.out_features, qw.in_features, qw.padded_in, qw.group_size, qw.block, _ROTATIONS.index(qw.rotation),
            len(passes), None if qw.rotation_matrix is None else qw.rotation_matrix.data_ptr(),
            (_Pass * _MAX_PASSES)(*passes),
        )  # fmt: skip
        self.pointer = ctypes.addressof(self.weight)
        self.in_features, self.out_features = qw.in_features, qw.out_features


class _Kept:
    """The view that a QuantizedWeight keeps, valid while its tensors stay where they were."""

    def __init__(self, tensors: list[Tensor], arguments: _Arguments) -> None:
        self.tensors, self.arguments = tensors, arguments
        self.addresses = [tensor.data_ptr() for tensor in tensors]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy or in another process


_PLAIN = (Tensor, torch.nn.Parameter)
_MAX_VIEWS = 1 << 14
_views: dict[tuple[Any, ...], _Arguments] = {}  # the torch op gets tensors anew at each call: found by where they lie


def _tensors(qw: QuantizedWeight) -> list[Tensor]:
    matrix = () if qw.rotation_matrix is None else (qw.rotation_matrix,)
    return [*qw.packed, *qw.weight_scale, *qw.channel_scale, *matrix]


def _unsuitable(qw: QuantizedWeight, tensors: list[Tensor]) -> str | None:
    if len(qw.packed) > _MAX_PASSES or qw.packed[0].ndim != 2:
        return f"expected a weight [out, in] of at most {_MAX_PASSES} passes"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "expected contiguous weights"
    if any(scale.dtype != torch.float16 for scale in qw.weight_scale):
        return "expected float16 weight scales"
    if qw.rotation_matrix is not None and qw.rotation_matrix.dtype != torch.float32:
        return "expected a float32 rotation matrix"
    return None


def _arguments(qw: QuantizedWeight) -> _Arguments | str:
    """The kept C view of `qw`, made anew when a tensor's memory has moved; or why there can be none."""
    kept = qw.__dict__.get("_cpu_arguments")
    if kept is not None and kept.addresses == [tensor.data_ptr() for tensor in kept.tensors]:
        return kept.arguments
    tensors = _tensors(qw)
    if not all(type(tensor) in _PLAIN and tensor.is_cpu for tensor in tensors):
        return "expected plain tensors on the CPU"
    place = (len(qw.packed), qw.rotation, *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors])
    made = _views.get(place)
    if made is None:
        reason = _unsuitable(qw, tensors)
        if reason is not None:
            return reason
        if len(_views) >= _MAX_VIEWS:  # of weights long gone
            _views.clear()
        made = _views[place] = _Arguments(qw)
    qw.__dict__["_cpu_arguments"] = _Kept(tensors, made)  # not a field: equality and replace() do not see it
    return made


def _ready(qw: QuantizedWeight) -> tuple[ctypes.CDLL, _Arguments]:
    library, arguments = _library(), _arguments(qw)
    if isinstance(library, str) or isinstance(arguments, str):
        reason = library if isinstance(library, str) else arguments
        raise TqwError(f"expected a call that the CPU kernels support, but {reason}")
    return library, arguments


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or the reason why the C kernels cannot compute this call."""
    library = _library()
    if isinstance(library, str):
        return library
    if not x.is_cpu or x.dtype not in _DTYPES:
        return f"expected a float32, bfloat16 or float16 input on the CPU, got {x.dtype} on {x.device}"
    arguments = _arguments(qw)
    return arguments if isinstance(arguments, str) else None


def _bias(bias: Tensor) -> Tensor:
    return bias if bias.dtype in _DTYPES and bias.is_contiguous() else bias.float().contiguous()


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b with int8 activations: [..., in] -> [..., out], in the dtype of x."""
    library, arguments = _ready(qw)
    isa, exact = settings()
    x = x if x.is_contiguous() else x.contiguous()
    y = x.new_empty((*x.shape[:-1], arguments.out_features))
    bias_dtype = 0
    if bias is not None:
        bias = _bias(bias)
        bias_dtype = _DTYPES[bias.dtype]
    failed = library.tqw_linear(
        arguments.pointer, x.data_ptr(), y.data_ptr(), None if bias is None else bias.data_ptr(),
        x.numel() // arguments.in_features, _DTYPES[x.dtype], bias_dtype, torch.get_num_threads(), isa, exact,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"expected memory for the activations of an input {list(x.shape)}")
    return y


MAX_FAMILY = 8  # of cpu.c


def same_transform(first: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether `other` may take T(x) from `first`: everything equal but outputs, codes and weight scales."""
    return (
        (first.in_features, first.bits, first.group_size, first.rotation, len(first.channel_scale))
        == (other.in_features, other.bits, other.group_size, other.rotation, len(other.channel_scale))
        and first.rotation_matrix is other.rotation_matrix
        and all(map(torch.equal, first.channel_scale, other.channel_scale))
    )


def linears(x: Tensor, weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """[linear(x, qw, bias), ...] for at most MAX_FAMILY weights of the `same_transform`: x is transformed once."""
    isa, exact = settings()
    x = x if x.is_contiguous() else x.contiguous()
    ready = [_ready(qw) for qw in weights]
    before, count = x.shape[:-1], len(ready)
    ys = [x.new_empty((*before, arguments.out_features)) for _, arguments in ready]
    addresses = (_Pointer * (3 * count))(*[arguments.pointer for _, arguments in ready], *[y.data_ptr() for y in ys])
    floats = [None if bias is None else bias.float().contiguous() for bias in biases]  # kept until the call is over
    for index, bias in enumerate(floats, 2 * count):
        if bias is not None:
            addresses[index] = bias.data_ptr()
    first = ctypes.addressof(addresses)
    size = ctypes.sizeof(_Pointer) * count
    failed = ready[0][0].tqw_linears(
        first, count, x.data_ptr(), first + size, first + 2 * size, x.numel() // ready[0][1].in_features,
        _DTYPES[x.dtype], 0, torch.get_num_threads(), isa, exact,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"expected memory for the activations of an input {list(x.shape)}")
    return ys


def supports_rows(qw: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """None, or the reason why the C kernel cannot compute rows of the dense weight."""
    return supports(torch.empty(0, dtype=dtype), qw)


def dense_rows(qw: QuantizedWeight, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dense[ids], or all of dense: integer [...] -> [..., in] in `dtype`."""
    library, arguments = _ready(qw)
    shape: tuple[int, ...] = (qw.out_features,)
    if ids is not None:
        shape = tuple(ids.shape)
        ids = ids.to(torch.int64).contiguous()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < qw.out_features:
            raise IndexError(f"expected ids from 0 to {qw.out_features - 1}, got {int(ids.min())} to {int(ids.max())}")
    y = torch.empty((*shape, qw.in_features), dtype=dtype)
    failed = library.tqw_dense(
        arguments.pointer, None if ids is None else ids.data_ptr(), y.data_ptr(), y.numel() // qw.in_features,
        _DTYPES[dtype], torch.get_num_threads(), settings()[0],
    )  # fmt: skip
    if failed:
        raise MemoryError(f"expected memory for a row of {qw.in_features} weights")
    return y
