"""CUDA backend: linear.cu, compiled at run time by NVRTC through cuda.bindings (both come with torch).

Few tokens: one launch that transforms x, decodes and multiplies (see the head of linear.cu). Many tokens:
y = x dense^T by slices of rows, dense from one kernel, the product from cuBLAS; never more than one slice in memory.
T(x) is rounded to 16-bit fixed point with one scale per token and tile of at most 128 inputs:

    |y - exact| <= sum over tiles of (max |T(x)| / 65024) * sum |V|  +  float32 accumulation

Nothing here asks the GPU anything before the first call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqw.codebook import levels
from tqw.errors import TqwError
from tqw.weight import QuantizedWeight, transform

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DECODE_TOKENS = 32  # one launch of the decode kernel
_FUSED_INPUTS = 8192  # tokens * inputs up to here: every block transforms x itself
_DENSE_TOKENS = 192  # from here on dequantize + cuBLAS wins (H100)
_SLICE_BYTES = 32 << 20  # of the dense slice: it stays in the L2 cache of large GPUs


class _Params(ctypes.Structure):
    """`struct Params` of linear.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("channel", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("packed", ctypes.c_void_p * 4),
        ("scale", ctypes.c_void_p * 4),
        ("planes", ctypes.c_void_p),
        ("plane_scale", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("tokens", ctypes.c_int),
        ("out", ctypes.c_int),
        ("in_", ctypes.c_int),
        ("vectors", ctypes.c_int),
        ("batch", ctypes.c_int),
    ]


@dataclass(frozen=True)
class Variant:
    """The macros of linear.cu: one compiled module for each value."""

    bits: tuple[int, ...]
    padded_in: int
    group: int
    tile: int
    block: int
    rotate: bool
    scaled: bool
    x_type: int
    column_tiles: int = 1
    fused: bool = True
    warps: int = 16
    depth: int = 2
    min_ctas: int = 1
    columns: int = 0  # of middle.cu; 0: not part of the module
    warpgroups: int = 1
    split: int = 1
    stages: int = 4

    def source(self) -> str:
        macros = {
            "BITS": ",".join(map(str, self.bits)), "PASSES": len(self.bits), "IN_PADDED": self.padded_in,
            "GROUP": self.group, "TILE": self.tile, "BLOCK": self.block, "ROTATE": int(self.rotate),
            "SCALED": int(self.scaled), "X_TYPE": self.x_type, "NT": self.column_tiles, "FUSED": int(self.fused),
            "WARPS": self.warps, "DEPTH": self.depth, "MIN_CTAS": self.min_ctas,
        }  # fmt: skip
        macros |= {f"LEVELS_{bits}": ",".join(map(str, levels(bits))) for bits in (2, 3, 4, 5, 6)}
        files = ["linear.cu"]
        if self.columns:
            macros |= {
                "COLUMNS": self.columns, "WARPGROUPS": self.warpgroups, "SPLIT": self.split, "STAGES": self.stages,
                **_wgmma(self.columns),
            }  # fmt: skip
            files.append("middle.cu")
        return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + "".join(map(_source, files))

    def shared_bytes(self, tokens: int, batch: int) -> int:
        """Dynamic shared memory of the decode kernel: warp sums, planes, plane scales."""
        sums = 2 * batch * self.warps * 16 * tokens * 4
        return sums + tokens * (2 * (self.padded_in + 16) + 4 * (self.padded_in // self.tile))


    def ring_bytes(self) -> int:
        """Dynamic shared memory of the middle kernel: the ring of stages, reused for the sums; barriers."""
        return max(self.stages * self.columns * 256, self.columns * (64 * self.warpgroups + 4) * 4) + 16 * self.stages


def _wgmma(columns: int) -> dict[str, str]:
    """Macros of the wgmma for 64 rows and `columns` tokens, A in registers, which names each of its accumulators."""
    count = columns // 2
    sums = ",".join(f"%{i}" for i in range(count))
    a = ",".join(f"%{count + i}" for i in range(4))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{sums}}}, {{{a}}}, %{count + 4}, p, 1, 1, 0;"
    return {
        "WGMMA": f'"{{\\n.reg .pred p;\\nsetp.eq.u32 p, 0, 0;\\n{instruction}\\n}}\\n"',
        "WGMMA_SUMS": ",".join(f'"+f"(d[{i}])' for i in range(count)),
    }


@lru_cache(maxsize=2)
def _source(name: str) -> str:
    return resources.files("tqw.kernels").joinpath(name).read_text()


# ------------------------------------------------------------------------------------------------ compile and cache


def _checked(result: tuple[Any, ...], what: str) -> Any:
    error, *values = result
    if int(error) != 0:
        raise TqwError(f"expected {what} to succeed, got {error!r}: try another backend, and report this with the GPU")
    return values[0] if len(values) == 1 else values or None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/tqw or ~/.cache/tqw."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqw"


def compile_source(source: str, arch: str) -> bytes:
    """CUDA C++ to a cubin. Needs no GPU. arch: for example "sm_90"."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"linear.cu", 0, [], []), "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"-default-device"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(error) != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise TqwError(f"expected linear.cu to compile for {arch}, got {error!r}:\n{log.decode()}")
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@contextmanager
def _locked(path: Path):
    """One compiling process at a time; where files cannot be locked, the atomic rename still keeps the cache whole."""
    with open(path, "a") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cubin(variant: Variant, arch: str) -> bytes:
    """The compiled module, from the disk cache when it is there."""
    nvrtc = import_module("cuda.bindings.nvrtc")
    source = variant.source()
    version = _checked(nvrtc.nvrtcVersion(), "nvrtcVersion")
    key = hashlib.sha256(f"{arch} {version}\n{source}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.cubin"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.read_bytes()
        with _locked(path.with_suffix(".lock")):
            with suppress(FileNotFoundError):
                return path.read_bytes()
            data = compile_source(source, arch)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(data)
            temporary.replace(path)
            return data
    except OSError:  # a read-only or full disk costs only the cache
        return compile_source(source, arch)


@dataclass(frozen=True)
class _Device:
    index: int
    arch: str
    multiprocessors: int
    shared_bytes: int
    clusters: bool


@lru_cache(maxsize=64)
def _device(index: int) -> _Device:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    return _Device(
        index,
        f"sm_{major}{minor}" + "a" * (major == 9),  # "a": wgmma
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        major >= 9,
    )


@lru_cache(maxsize=512)
def _function(variant: Variant, name: str, device: _Device) -> Any:
    """The loaded kernel. Loading is allowed while another thread captures a graph."""
    driver = import_module("cuda.bindings.driver")
    with torch.cuda.device(device.index):
        torch.cuda.current_stream()  # makes sure that torch's context is current
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = _checked(driver.cuThreadExchangeStreamCaptureMode(mode), "cuThreadExchangeStreamCaptureMode")
        try:
            module = _checked(driver.cuModuleLoadData(cubin(variant, device.arch)), "cuModuleLoadData")
            function = _checked(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction")
            if name in ("tqw_decode", "tqw_middle"):
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _checked(driver.cuFuncSetAttribute(function, attribute, device.shared_bytes), "cuFuncSetAttribute")
        finally:
            driver.cuThreadExchangeStreamCaptureMode(mode)
    return function


def _launch(
    function: Any, grid: tuple[int, int], threads: int, shared: int, params: _Params, device: _Device, split: int = 1
) -> None:
    driver = import_module("cuda.bindings.driver")
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], grid[1], 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared
    config.hStream = torch.cuda.current_stream(device.index).cuda_stream
    attributes = []
    if device.clusters:
        overlap = driver.CUlaunchAttribute()
        overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        attributes.append(overlap)
    if split > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = split, 1, 1
        attributes.append(cluster)
    config.attrs, config.numAttrs = attributes, len(attributes)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0), "cuLaunchKernelEx")


# ---------------------------------------------------------------------------------------------------------- the op


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why this installation cannot compile kernels, or None. Asks no GPU."""
    for name in ("cuda.bindings.nvrtc", "cuda.bindings.driver"):
        try:
            found = find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{name} is not installed (pip install cuda-bindings)"
    return None


@lru_cache(maxsize=64)
def _too_old(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return f"its GPU is sm_{major}{minor}, older than sm_80" if major < 8 else None


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or why this call needs another backend."""
    if not x.is_cuda:
        return f"x is on {x.device.type}, not on a CUDA device"
    if x.dtype not in _TYPES:
        return f"x is {x.dtype}, not float32, float16 or bfloat16"
    if qw.packed[0].ndim != 2:
        return f"the weight has {qw.packed[0].ndim} dimensions, not 2"
    for tensor in (*qw.packed, *qw.weight_scale, *qw.channel_scale):
        if tensor.device != x.device:
            return f"the weight is on {tensor.device}, x on {x.device}"
        if not tensor.is_contiguous():
            return "the weight is not contiguous"
    if any(tensor.data_ptr() % 16 for tensor in qw.packed):
        return "the packed codes do not start at a multiple of 16 bytes"
    return _missing() or _too_old(x.device.index)


def _variant(qw: QuantizedWeight, dtype: torch.dtype) -> Variant:
    block, group = qw.block, qw.group_size
    rotated = qw.rotation == "hadamard"
    tile = min(block, group & -group, 128)
    return Variant(qw.bits, qw.padded_in, group, tile, block, rotated, qw.rotation != "qr", _TYPES[dtype])


def _params(qw: QuantizedWeight, in_features: int) -> _Params:
    """Everything that the weight decides; in_features: of the x that the kernel reads (padded for `qr`)."""
    params = _Params(out=qw.out_features, in_=in_features, channel=qw.channel_scale[0].data_ptr())
    for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
        params.packed[index], params.scale[index] = packed.data_ptr(), scale.data_ptr()
    return params


@dataclass(frozen=True)
class _Plan:
    """One launch of the decode kernel."""

    variant: Variant
    grid: int
    batch: int
    shared: int


@lru_cache(maxsize=4096)
def _plan(variant: Variant, tokens: int, out: int, device: _Device) -> _Plan | None:
    """How the decode kernel takes at most 32 tokens; None: the transformed tokens do not fit."""
    tiles, bits, strips = variant.padded_in // variant.tile, sum(variant.bits), -(-out // 16)
    variant = replace(
        variant,
        column_tiles=next(n for n in (1, 2, 4, 8) if 4 * n >= tokens),
        fused=tokens * variant.padded_in <= _FUSED_INPUTS,
        warps=next(w for w in (16, 8, 4, 2, 1) if w <= tiles),
        depth=2 if bits <= 8 else 1,
    )
    grid = min(strips, device.multiprocessors)
    return _batched(variant, tokens, strips, grid, device.shared_bytes)


def _batched(variant: Variant, tokens: int, strips: int, grid: int, limit: int) -> _Plan | None:
    """The plan with as few barriers as `limit` bytes of shared memory allow."""
    for batch in range(min(8, -(-strips // grid)), 0, -1):
        shared = variant.shared_bytes(tokens, batch)
        if shared <= limit:
            return _Plan(variant, grid, batch, shared)
    return None


@lru_cache(maxsize=4096)
def _chunk(variant: Variant, tokens: int, out: int, device: _Device) -> int | None:
    """Tokens of one launch: the most that fit, shared out evenly; None: not even one."""
    for chunk in (32, 16, 8, 4, 2, 1):
        if _plan(variant, min(chunk, tokens), out, device) is not None:
            return -(-tokens // -(-tokens // chunk))
    return None


def _input_params(x: Tensor, y: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> _Params:
    params = _params(qw, x.shape[1])
    params.x, params.y, params.x_stride, params.tokens = x.data_ptr(), y.data_ptr(), x.stride(0), x.shape[0]
    params.bias = None if bias is None else bias.data_ptr()
    params.vectors = not (
        params.x % 16
        or x.stride(0) * x.element_size() % 16
        or params.channel % 8
        or (x.shape[1] % 8 and x.shape[1] < qw.padded_in)
    )
    return params


def _few(x: Tensor, y: Tensor, qw: QuantizedWeight, bias: Tensor | None, plan: _Plan) -> None:
    """y = T(x) V^T + b for at most 32 rows of x."""
    device, variant = _device(x.device.index), plan.variant
    tokens, padded = x.shape[0], qw.padded_in
    params = _input_params(x, y, qw, bias)
    params.batch = plan.batch
    planes = plane_scale = None  # alive until the launch
    if not variant.fused:
        planes = torch.empty(2 * tokens * padded, dtype=torch.uint8, device=x.device)
        plane_scale = torch.empty(tokens * padded // variant.tile, dtype=torch.float32, device=x.device)
        params.planes, params.plane_scale = planes.data_ptr(), plane_scale.data_ptr()
        warps = -(-padded // 256) * tokens
        _launch(_function(variant, "tqw_transform", device), (-(-warps // 8), 1), 256, 0, params, device)
    _launch(_function(variant, "tqw_decode", device), (plan.grid, 1), variant.warps * 32, plan.shared, params, device)


def _between(x: Tensor, y: Tensor, qw: QuantizedWeight, bias: Tensor | None, variant: Variant) -> None:
    """y = T(x) V^T + b for tens to hundreds of rows of x (middle.cu)."""
    device, tokens, padded = _device(x.device.index), x.shape[0], qw.padded_in
    blocks = -(-tokens // variant.columns)
    planes = torch.empty(blocks * variant.columns * padded, dtype=torch.float16, device=x.device)
    plane_scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    params = _input_params(x, y, qw, bias)
    params.planes, params.plane_scale = planes.data_ptr(), plane_scale.data_ptr()
    _launch(_function(variant, "tqw_spread", device), (tokens, 1), 256, 0, params, device)
    rows = 64 * variant.warpgroups
    grid = -(-qw.out_features // rows) * variant.split, blocks
    function = _function(variant, "tqw_middle", device)
    _launch(function, grid, 128 * variant.warpgroups, variant.ring_bytes(), params, device, variant.split)


def _dense_rows(
    qw: QuantizedWeight, first: int, rows: int, dtype: torch.dtype, out: Tensor, ids: Tensor | None = None
) -> None:
    """out[r] = dense[first + r], or dense[ids[r]]: [rows, in]; for `qr` rows of V, [rows, padded_in]."""
    device = _device(out.device.index)
    params = _params(qw, out.shape[1])
    params.y, params.first_row, params.tokens = out.data_ptr(), first, rows
    params.ids = None if ids is None else ids.data_ptr()
    params.vectors = out.shape[1] % 8 == 0 and params.y % 16 == 0 and params.channel % 8 == 0
    variant = _variant(qw, dtype)
    function = _function(variant, "tqw_dequantize", device)
    _launch(function, (-(-qw.padded_in // variant.block // 8), -(-rows // 16)), 256, 0, params, device)


def _many(x: Tensor, y: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> None:
    """y = x dense^T + b by slices of rows: for many tokens cuBLAS is the best user of the tensor cores."""
    step = max(256, _SLICE_BYTES // (x.shape[1] * x.element_size()) // 256 * 256)
    slices = -(-qw.out_features // step)
    step = -(-qw.out_features // slices // 256) * 256
    dense = torch.empty(min(step, qw.out_features), x.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, qw.out_features, step):
        rows = min(step, qw.out_features - first)
        _dense_rows(qw, first, rows, x.dtype, dense)
        torch.mm(x, dense[:rows].T, out=y[:, first : first + rows])
    if bias is not None:
        y += bias


def _shared_rotation(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The op on [tokens, in] for passes that share a rotation."""
    tokens = x.shape[0]
    y = torch.empty(tokens, qw.out_features, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    if tokens < _DENSE_TOKENS:
        device, variant = _device(x.device.index), _variant(qw, x.dtype)
        chunk = _chunk(variant, tokens, qw.out_features, device)
        if chunk is not None:
            for first in range(0, tokens, chunk):
                count = min(chunk, tokens - first)
                plan = _plan(variant, count, qw.out_features, device)
                assert plan is not None, "fewer tokens need less shared memory"
                rows = slice(first, first + count)
                _few(x[rows], y[rows], qw, bias, plan)
            return y
    _many(x, y, qw, bias)
    return y


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b: [..., in] -> [..., out], in the dtype of x."""
    shape = (*x.shape[:-1], qw.out_features)
    x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    with torch.cuda.device(x.device):
        if qw.shares_rotation and qw.rotation != "qr":
            return _shared_rotation(x, qw, bias).view(shape)
        return _by_pass(x, qw, bias).view(shape)


def _passes(qw: QuantizedWeight) -> list[QuantizedWeight]:
    """Weights that each have one rotation and sum to `qw`."""
    if qw.shares_rotation:
        return [qw]
    parts = zip(qw.packed, qw.weight_scale, qw.channel_scale, strict=True)
    return [replace(qw, packed=(p,), weight_scale=(s,), channel_scale=(c,)) for p, s, c in parts]


def _by_pass(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The slower way for passes with different rotations and for `qr`: a float32 product for each rotation."""
    wide = x.float()
    total = torch.zeros(x.shape[0], qw.out_features, dtype=torch.float32, device=x.device)
    for part in _passes(qw):
        transformed = transform(wide, part.channel_scale[0], part.matrix(wide)) if qw.rotation == "qr" else wide
        total += _shared_rotation(transformed, part, None)
    return (total if bias is None else total + bias).to(x.dtype)


def embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dense[ids]: integer [...] -> [..., in] in `dtype`, for passes that share a Hadamard rotation or have none."""
    flat = ids.reshape(-1).long()
    y = torch.empty(flat.shape[0], qw.in_features, dtype=dtype, device=qw.device)
    if flat.shape[0]:
        with torch.cuda.device(qw.device):
            _dense_rows(qw, 0, flat.shape[0], dtype, y, flat)
    return y.view(*ids.shape, qw.in_features)


def supports_embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """None, or why this lookup needs another backend."""
    if not qw.shares_rotation or qw.rotation == "qr":
        return "its passes have different rotations or a stored matrix"
    return supports(ids.new_empty(0, dtype=dtype), qw)
