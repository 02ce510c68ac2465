"""CUDA backend: linear.cu and what is appended to it, compiled at run time (cuda_launch.py).

Few tokens: one launch or two that transform x, decode and multiply (see the head of linear.cu). Dozens and more, on
Hopper: the tensor cores' larger products (middle.cu). Where V must not be rounded to 8 bits, hundreds and more: y = x
dense^T by slices of rows, dense from one kernel, the product from cuBLAS; never more than one slice in memory.
T(x) is rounded to fixed point with one scale per token and tile of at most 128 inputs, to 16 bits or, for 5 tokens and
more of 16-bit inputs and weights below 6 bits, to 8:

    |y - exact| <= sum over tiles of (max |T(x)| / 65024, or 254) * sum |V|  +  float32 accumulation

From 17 tokens on, weights of up to 4 bits, one scale serves a token or a large part of it, and V is rounded to 8 bits,
too (see the head of int8.cu); for prompts it is decoded so once for all tokens, some rows at a time (prompt.cu).
TQW_CUDA_ACTIVATIONS=exact keeps to 16 bits; docs/kernels.md states what 8 cost.
Nothing here asks the GPU anything before the first call.
"""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tqw.codebook import levels
from tqw.errors import TqwError
from tqw.kernels import gpu
from tqw.kernels.cuda_launch import Device, Launch, borrow, device_at, enter, give_back, launch_all, load, resident
from tqw.weight import QuantizedWeight, transform

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_DECODE_TOKENS = 16  # up to here the decode kernel, where T(x) fits in shared memory (H100)
_WIDE_TOKENS = 12  # or up to here, of many inputs, where both operands may have 8 bits
_ONE_PLANE_TOKENS = 5  # from here on 8 bits of T(x) are less work than 16
_MIDDLE_TOKENS = 1024  # up to here middle.cu with 16 bits of T(x); beyond, dequantize + cuBLAS wins (H100)
_SMALL_WEIGHTS, _SMALL_TOKENS = 3 << 20, 192  # so few weights, of more tokens: dense rows win (H100)
_COARSE_BITS = 4  # for more, what 8 bits of both operands cost counts beside the quantization error (activations.py)
_PROMPT_TOKENS, _PROMPT_PRODUCTS = 1024, 1 << 35  # from so many of both on V is decoded once for all tokens (H100)
_COARSE_BYTES = 64 << 20  # of T(x) in 8 bits in the middle kernel; more are a prompt
_PROMPT_BYTES = 256 << 20  # of T(x) in 8 bits at once, half of what x takes; more tokens come in turns
_ROWS_BYTES = 128 << 20  # of V in 8 bits at once; more rows come in slices
_MULTIPROCESSOR_BYTES = 228 << 10  # of shared memory (sm_90)
_COLUMNS = (8, 16, 32, 64, 96, 128, 192, 256)  # of a CTA of middle.cu
_DENSE_TOKENS = 64  # without middle.cu: from here on dequantize + cuBLAS
_SLICE_BYTES = (
    64 << 20
)  # of the dense slice; smaller ones stay in the L2 cache but leave the last wave of a product thin
_PAIRS_PER_EXPERT = 4  # (token, expert) pairs of one decode launch; with more, each expert's product comes cheaper
_GROUPED_PAIRS = 1.25  # pairs per expert from which an expert's codes are better read once for all (middle.cu, H100)
_GROUPED_PAIRS_OF_FEW_INPUTS = 0.7  # up to 2,048 inputs
_MOST_PAIRS = 1 << 16  # of one call: the outputs of all its pairs are in memory at once
_KEPT_CALLS = 64  # numbers of tokens that a weight remembers: to look a plan up by its variant takes longer
_MOST_GRID = (1 << 16) - 1  # CTAs of a grid but in its first direction
_PLANE_BYTES = 512 << 20  # of T(x) of pairs; more are computed in turns


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
        ("experts", ctypes.c_int),
        ("choices", ctypes.c_int),
        ("arrivals", ctypes.c_int),
        ("arrived", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("slice", ctypes.c_int64),
        ("blocks", ctypes.c_int),
        ("block", ctypes.c_void_p),
        ("pair", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
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
    planes: int = 2
    column_tiles: int = 1
    fused: bool = True
    cluster: int = 1
    split: int = 1
    warps: int = 16
    share: int = 16
    ring: int = 1
    early: int = 1
    unroll: int = 1
    halves: bool = False
    min_ctas: int = 1
    small: bool = False
    experts: bool = False
    columns: int = 0  # of middle.cu; 0: it is no part of the module
    warpgroups: int = 1
    stages: int = 4
    spread: int = 1
    coarse: bool = False
    apart: bool = False
    prompt: bool = False

    def source(self) -> str:
        macros = {
            "BITS": ",".join(map(str, self.bits)), "PASSES": len(self.bits), "IN_PADDED": self.padded_in,
            "GROUP": self.group, "TILE": self.tile, "BLOCK": self.block, "ROTATE": int(self.rotate),
            "SCALED": int(self.scaled), "X_TYPE": self.x_type, "PLANES": self.planes, "NT": self.column_tiles,
            "FUSED": int(self.fused),
            "CLUSTER": 1 if self.apart else max(self.cluster, self.split), "SPLIT": self.split,
            "WARPS": self.warps, "SHARE": self.share,
            "RING": self.ring, "EARLY": min(self.early, self.ring), "UNROLL": self.unroll, "HALVES": int(self.halves),
            "MIN_CTAS": self.min_ctas,
            "SMALL": int(self.small), "EXPERTS": int(self.experts),
        }  # fmt: skip
        macros |= {f"LEVELS_{bits}": ",".join(map(str, levels(bits))) for bits in (2, 3, 4, 5, 6)}
        files = ["linear.cu"]
        if self.columns:
            macros |= {
                "COLUMNS": self.columns, "WARPGROUPS": self.warpgroups, "STAGES": self.stages, "SPREAD": self.spread,
                "COARSE": int(self.coarse), "APART": int(self.apart), "SPREAD_THREADS": self.spread_threads(),
                "PROMPT": int(self.prompt), **_wgmma(self.columns, self.coarse, self.prompt),
            }  # fmt: skip
            files += ["wgmma.cu", *["route.cu"] * self.experts, *["int8.cu"] * self.coarse]
            files += ["prompt.cu" if self.prompt else "middle.cu"]
        return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + "".join(map(_source, files))

    def shared_bytes(self, tokens: int, batch: int) -> int:
        """Dynamic shared memory of the decode kernel: ring, barrier, warp sums, planes, plane scales."""
        scales = 16 * max(4, 2 * self.tile // self.group)
        ring = self.ring * self.warps * sum(16 * self.tile * bits // 8 + scales for bits in self.bits)
        sums = 2 * batch * self.warps * 16 * tokens * 4
        of_rank = self.padded_in // self.split
        planes = tokens * self.planes * (of_rank + 16) + 4 * of_rank // self.tile * self.scale_pitch()
        return ring + 16 + sums + planes

    def scale_pitch(self) -> int:
        """Scales of T(x) for each tile in the decode kernel, with those of columns that no token has."""
        return 8 * self.column_tiles // self.planes

    def transform_ctas(self, tokens: int) -> int:
        """Eight warps each, of a kernel that transforms 256 inputs of a token with each warp."""
        return -(-(-(-self.padded_in // 256) * tokens) // 8)

    def spread_threads(self) -> int:
        """Threads of a CTA that transforms one token, or a part of its inputs, for the middle kernel."""
        part = -(-(self.padded_in // self.tile) // self.spread) * self.tile
        return 256 if not self.coarse else 128 if part <= 1024 else 256 if part <= 8192 else 512

    def stage_bytes(self) -> int:
        """T(x) of a tile in the middle kernel."""
        return self.columns * self.tile * (1 if self.coarse else 2)

    def prompt_bytes(self) -> int:
        """Dynamic shared memory of the kernel for prompts: stages, barriers; scale and bias of rows, for two cells."""
        return self.stages * (self.stage_bytes() + 256 * self.tile + 16) + 2 * 256 * 8

    def block_bytes(self) -> int:
        """T(x) of COLUMNS tokens in the middle kernel."""
        return self.padded_in // self.tile * self.stage_bytes()

    def ring_bytes(self) -> int:
        """Dynamic shared memory of the middle kernel: stages, later sums; barriers; token scales."""
        stages = max(self.stages * self.stage_bytes(), self.columns * (64 * self.warpgroups + 4) * 4)
        return stages + 16 * self.stages + 4 * self.columns


@dataclass(frozen=True)
class _Combine:
    """The macros of combine.cu."""

    y_type: int
    weight_type: int
    count: int  # outputs of a thread

    def source(self) -> str:
        macros = {"Y_TYPE": self.y_type, "W_TYPE": self.weight_type, "COUNT": self.count}
        return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + _source("combine.cu")


class _CombineParams(ctypes.Structure):
    """`struct Params` of combine.cu."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("choices", ctypes.c_int),
        ("out", ctypes.c_int),
        ("experts", ctypes.c_int),
    ]


def _wgmma(columns: int, coarse: bool, prompt: bool) -> dict[str, str]:
    """Macros of the wgmma that names each of its accumulators: 64 rows in registers times `columns` tokens; for prompts
    64 tokens times 256 rows, both in shared memory."""
    columns = 256 if prompt else columns
    count, registers = columns // 2, 1 if prompt else 4
    sums, a = (",".join(f"%{first + i}" for i in range(many)) for first, many in ((0, count), (count, registers)))
    b, add = count + registers, count + registers + 1
    kind, options = ("k32.s32.s8.s8", "p") if coarse else ("k16.f32.f16.f16", "p, 1, 1, 0")
    a = a if prompt else f"{{{a}}}"
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}{kind} {{{sums}}}, {a}, %{b}, {options};"
    register = "r" if coarse else "f"
    return {
        "WGMMA": f'"{{\\n.reg .pred p;\\nsetp.ne.u32 p, %{add}, 0;\\n{instruction}\\n}}\\n"',
        "WGMMA_SUMS": ",".join(f'"+{register}"(d[{i}])' for i in range(count)),
    }


@lru_cache(maxsize=16)
def _source(name: str) -> str:
    return resources.files("tqw.kernels").joinpath(name).read_text()


@lru_cache(maxsize=512)
def _function(variant: Variant | _Combine, name: str, device: Device) -> Any:
    """The loaded kernel."""
    return load(variant.source(), name, device, name in ("tqw_decode", "tqw_middle", "tqw_route", "tqw_prompt"))


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
    reason = gpu.supports(x, qw)
    if reason is not None:
        return reason
    if any(tensor.data_ptr() % 16 for tensor in qw.packed):
        return "the packed codes do not start at a multiple of 16 bytes"
    if any(tensor.data_ptr() % 4 for tensor in qw.weight_scale):
        return "the weight scales do not start at a multiple of 4 bytes"
    return _missing() or _too_old(x.device.index)


def _variant(qw: QuantizedWeight, dtype: torch.dtype) -> Variant:
    block, group = qw.block, qw.group_size
    rotated = qw.rotation == "hadamard"
    tile = min(block, group & -group, 128)
    if block == 128 and group in (32, 64):
        tile = 128  # several groups: as fast as one
    planes = 1 if sum(qw.bits) < 6 and dtype != torch.float32 and _activations() != "exact" else 2
    return Variant(qw.bits, qw.padded_in, group, tile, block, rotated, qw.rotation != "qr", _TYPES[dtype], planes)


def _params(qw: QuantizedWeight, in_features: int) -> _Params:
    """Everything that the weight decides; in_features: of the x that the kernel reads (padded for `qr`)."""
    params = _Params(out=qw.out_features, in_=in_features, channel=qw.channel_scale[0].data_ptr())
    params.experts = qw.packed[0].shape[0] if qw.packed[0].ndim == 3 else 0
    for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
        params.packed[index], params.scale[index] = packed.data_ptr(), scale.data_ptr()
    return params


@dataclass(frozen=True)
class _Plan:
    """How a kernel of this file takes so many tokens: what it needs for T(x), and its launches."""

    plane_bytes: int
    scale_count: int
    launches: tuple[Launch, ...]
    batch: int = 1
    blocks: int = 0  # of pairs of one expert, at most; 0: each pair on its own
    part_bytes: int = 0  # sums that CTAs leave for each other
    arrivals: int = 0  # tiles that they share

    def scratch_bytes(self, pairs: int) -> int:
        """T(x), its scales and, for blocks of pairs, the order of the pairs, or sums of parts of the inputs."""
        order = 8 * self.blocks + 4 * self.scale_count + 4 * pairs if self.blocks else 0
        return self.plane_bytes + 4 * self.scale_count + order + self.part_bytes + 4 * self.arrivals


def _shares(tiles: int, strips: int, each: float = 1) -> tuple[int, int]:
    """Warps of a CTA, about 16, and how many of them share the tiles of each of its `strips` evenly.

    each: strips of a multiprocessor. Few tiles are shared by fewer warps, which take two turns, for more strips at
    once: to add up their sums takes as long as a turn."""
    least, most = 8, 20
    if strips == 1 and tiles <= most:
        strips = next(n for n in (4, 2, 1) if n == 1 or (n < 2 * each and 2 * (most // n) >= tiles))
        share = -(-tiles // -(-tiles // (most // strips)))
        return share * strips, share
    shares = (share for share in range(1, tiles + 1) if least <= share * strips <= most)
    turns = {share: -(-tiles // share) for share in shares}
    share = min(turns, key=lambda s: turns[s] * s / tiles + 0.01 * abs(s * strips - 16), default=tiles)
    return share * strips, share


def _turns(tiles: int, each: float, warps: int, share: int) -> float:
    """Turns of 16 warps that the strips of a multiprocessor take; for 9 to 16 tokens adding up the sums takes 0.4 of
    one, however many strips a CTA works on at once."""
    return -(-each * share // warps) * (-(-tiles // share) * warps / 16 + 0.4)


def _sizes(base: Variant, out: int, device: Device) -> tuple[bool, bool]:
    """Whether outputs are many, more than six strips of 16 for each multiprocessor, and inputs more than 64 tiles."""
    return -(-out // 16) > 6 * device.multiprocessors, base.padded_in > 64 * base.tile


def _decode_variant(base: Variant, tokens: int, out: int, device: Device) -> Variant:
    """The variant of the decode kernel for a few tokens. Measured on one H100 (benchmarks/gpu_settings.py)."""
    tiles, strips = base.padded_in // base.tile, -(-out // 16)
    many, wide = _sizes(base, out, device)
    clustered = device.clusters and strips >= 8
    planes = base.planes if tokens >= _ONE_PLANE_TOKENS else 2
    each = strips / device.multiprocessors
    # one launch, unless it takes too long to transform all tokens in every CTA, or their inputs do not fit in registers
    fused = base.experts or (tokens == 1 and tiles <= 224)
    plain = fused and not base.experts
    # T(x) of all inputs in every CTA, unless each has to compute it or it leaves too little room for codes on their way
    whole = not base.experts and tokens * planes * base.padded_in <= device.shared_bytes // 2
    halved = tiles > 120 and each < 3 if plain else wide and not whole
    split = 2 if halved and clustered and tiles % 2 == 0 else 1
    multicast = device.arch.startswith(("sm_90", "sm_100")) and clustered and not fused
    warps, share = (16, 8) if plain and halved else _shares(tiles // split, split, each)
    if many and split == 1 and tokens > 8 and tiles > 20:
        warps, share = min((warps, share), _shares(tiles, 2), key=lambda shares: _turns(tiles, each, *shares))
    if tokens > 8:
        ring, early = 3 if many else 2, 2
    elif many:
        ring, early = 5, 3
    elif not fused:
        ring, early = (4, 2) if wide else (3, 2)
    elif base.experts or not wide:
        ring, early = (2, 2) if wide else (4, 1)
    else:  # codes on their way delay x: the less, the more multiprocessors the last strips leave idle
        thin = each / math.ceil(each) < 0.83
        ring, early = (5, 3) if thin else (4 if split == 2 else 3, 1)
    return replace(
        base,
        planes=planes,
        column_tiles=next(n for n in (1, 2, 4) if 8 * n >= tokens * planes),
        fused=fused,
        cluster=2 if multicast else 1,
        split=split,
        warps=warps,
        share=share,
        ring=ring,
        early=early,
        unroll=2,
        halves=tokens * planes <= 16,
        small=out < 16,
    )


def _decode_plan(variant: Variant, tokens: int, out: int, device: Device, pairs: int = 1) -> _Plan | None:
    """The decode kernel for a few tokens; None: the transformed tokens do not fit.

    pairs: so many times one token, each with an expert of its own.
    """
    limit = device.shared_bytes
    while variant.shared_bytes(tokens, 1) > limit:
        if variant.ring == 1:
            return None
        variant = replace(variant, ring=variant.ring - 1)
    cluster, function = max(variant.cluster, variant.split), _function(variant, "tqw_decode", device)
    sets = -(-out // 16 // (variant.warps // variant.share))
    places = max(1, resident(function, 32 * variant.warps, cluster, device) // pairs) * cluster // variant.split
    across = min(-(-sets // cluster) * cluster if cluster > variant.split else sets, places)  # CTAs or split CTAs
    batches = range(min(8, -(-sets // across)), 0, -1)  # sets of strips for one barrier: the most that fit
    batch = next(batch for batch in batches if variant.shared_bytes(tokens, batch) <= limit)
    shared, ctas = variant.shared_bytes(tokens, batch), across * variant.split
    if ctas * pairs <= device.multiprocessors:
        shared = max(shared, _to_spread(ctas * pairs, device))
    decode = Launch(function, (ctas, pairs), 32 * variant.warps, shared, device, cluster)
    if variant.fused:
        return _Plan(0, 0, (decode,), batch)
    tiles, grid = variant.padded_in // variant.tile, (variant.transform_ctas(tokens), 1)
    transform_x = Launch(_function(variant, "tqw_transform", device), grid, 256, 0, device)
    scales = tiles * variant.scale_pitch()
    return _Plan(variant.planes * tokens * variant.padded_in, scales, (transform_x, decode), batch)


def _to_spread(ctas: int, device: Device) -> int:
    """Dynamic shared memory with which no multiprocessor takes more CTAs than the even share of them.

    Without it some take two where one is the share, while others are held by the kernel before or not in a cluster's
    reach, and two CTAs on one take twice as long."""
    share = -(-ctas // device.multiprocessors)
    return (device.shared_bytes + 1024) // (share + 1)


def _middle_variant(base: Variant, tokens: int, out: int, device: Device) -> Variant | None:
    """The variant of middle.cu that fills the GPU with the least re-reading; None: not for this GPU or tile.

    Measured on one H100. One CTA should meet all tokens, up to 256: codes are decoded once for each block of them."""
    if not device.arch.startswith("sm_90") or base.tile != 128:
        return None
    small = base.x_type and tokens > _SMALL_TOKENS and out * base.padded_in <= _SMALL_WEIGHTS
    if _takes_8_bits(base, device):
        return None if small and out <= 1024 else _coarse_variant(base, tokens, out, device)
    if small or tokens > _MIDDLE_TOKENS:
        return None
    _, wide = _sizes(base, out, device)
    if wide and tokens <= 128:
        base = replace(base, spread=8)
    units, blocks = device.multiprocessors, -(-tokens // 256)
    groups = -(-out // 64) * blocks  # 64 rows and one block of tokens each
    if tokens > 512 and groups // 2 / units / -(-groups // 2 // units) < 0.8:
        return None  # the last wave would be too thin
    least = 8 if wide else 32  # T(x) of many inputs is read by many: no more of it than there is
    columns = next(c for c in _COLUMNS if c >= max(least, -(-tokens // blocks)))
    few = groups <= (2 if columns <= 128 else 1) * units  # for CTAs of 64 rows, which read T(x) twice as often
    warpgroups = (2, 1) if few and columns > 64 else (1,) if few else (2,)
    divisions = [_divide(base, columns, wg, -(-out // (64 * wg)) * blocks, device) for wg in warpgroups]
    best = min(divisions, key=lambda division: (division.cost, division.split > 2 and division.warpgroups == 2))
    # two CTAs on a multiprocessor hide each other's waits where their registers fit
    pair = columns == 128 and best.warpgroups == 2 and best.split == 1 and sum(base.bits) <= 4
    base = replace(base, columns=columns, warpgroups=best.warpgroups, split=best.split, min_ctas=2 if pair else 1)
    most = 2 if columns <= 64 and (best.ctas >= 4 or (columns == 64 and best.warpgroups == 2)) else 3 if pair else 4
    most = 2 if columns == 256 else most
    each = device.shared_bytes // best.ctas - 1024
    return replace(
        base, stages=next((n for n in range(most, 2, -1) if replace(base, stages=n).ring_bytes() <= each), 2)
    )


def _coarse_variant(base: Variant, tokens: int, out: int, device: Device) -> Variant:
    """The variant of middle.cu with operands of 8 bits: into how many parts the inputs are divided, and by whom.

    The cost is in tiles of 64 rows, fitted to 15 shapes of 32 to 1,024 tokens on one H100."""
    blocks = -(-tokens // 256)
    columns = next(c for c in _COLUMNS if c >= -(-tokens // blocks))
    tiles = base.padded_in // base.tile

    def cost(warpgroups: int, split: int, apart: bool) -> float:
        groups, together = -(-out // (64 * warpgroups)) * blocks, _together(columns) // warpgroups
        each = _of_each(groups * split, 1 if apart else split, device)
        if split > 1 and (each > together or tiles < 2 * split):
            return math.inf
        alone = each if together == 1 else each % together == 1  # CTAs whose waits no other hides
        alone *= (0.55 if warpgroups == 1 else 0.3) * 64 / max(64, columns)
        if columns <= 16 and each * warpgroups == 2:  # of so few tokens two warpgroups wait, too
            alone += 0.15 * each
        adding = 0 if split == 1 else 10 + 2 * split if apart else 3.5 * split
        adding *= min(1, columns / 64) ** 0.5
        fetching = 0.25 * groups * tiles / device.multiprocessors  # T(x)
        return (each + alone) * -(-tiles // split) * warpgroups + adding + fetching

    # a cluster of more than eight is not for every GPU
    shared = [(split, apart) for split in range(2, 13) for apart in (False, True) if apart or split <= 8]
    # on all multiprocessors CTAs of 64 rows would fetch T(x) faster than the L2 cache delivers it
    many = columns > 128 and -(-out // 64) * blocks > device.multiprocessors
    divisions = [(warpgroups, *how) for warpgroups in ((2,) if many else (1, 2)) for how in ((1, False), *shared)]
    return _coarse_of(base, columns, *min(divisions, key=lambda division: cost(*division)))


def _is_prompt(base: Variant, tokens: int, out: int, device: Device) -> bool:
    """Whether V is better decoded once for all tokens (prompt.cu): where T(x) is much, and where products are so many
    that they outweigh the time until the first rows are decoded."""
    weights = out * base.padded_in
    if not _takes_8_bits(base, device) or (out <= 1024 and weights <= _SMALL_WEIGHTS):
        return False
    return tokens * base.padded_in > _COARSE_BYTES or tokens * weights > _PROMPT_PRODUCTS


def _together(columns: int) -> int:
    """Warpgroups of middle.cu with operands of 8 bits whose registers a multiprocessor holds."""
    return 4 if columns <= 64 else 3 if columns <= 128 else 2


def _coarse_of(base: Variant, columns: int, warpgroups: int, split: int = 1, apart: bool = False) -> Variant:
    """As many stages as tiles whose codes are on their way, so that a stage's number is constant, where they fit."""
    ctas = _together(columns) // warpgroups
    variant = replace(
        base, coarse=True, columns=columns, warpgroups=warpgroups, split=split, spread=split, apart=apart, stages=4,
        min_ctas=ctas if columns <= 64 else 1,
    )  # fmt: skip
    fits = (variant.ring_bytes() + 1024) * ctas <= _MULTIPROCESSOR_BYTES
    return variant if fits else replace(variant, stages=3)


@dataclass(frozen=True)
class _Division:
    """How CTAs of the middle kernel share its work."""

    warpgroups: int
    split: int
    ctas: int  # of a multiprocessor at once
    cost: float  # in tiles of 64 rows on a multiprocessor that is full of warps


def _divide(base: Variant, columns: int, warpgroups: int, groups: int, device: Device) -> _Division:
    """How many CTAs share the inputs of each of `groups`: few for many inputs each, many for many warps at once."""
    tiles = base.padded_in // base.tile
    memory = replace(base, columns=columns, warpgroups=warpgroups, stages=2).ring_bytes() + 1024
    fit = max(1, min(device.shared_bytes // memory, 512 // min(64 + columns, 255) // warpgroups))

    def division(split: int) -> _Division:
        ctas = _of_each(groups * split, split, device)
        together = min(ctas, fit)
        warps = 4 * warpgroups * together
        waits = 0.6 if warps <= 4 else 0.15 if warps <= 8 else 0.05 if warps <= 12 else 0
        waits *= (64 / max(64, columns)) ** 0.5
        adding = (2 * split if split > 2 else 2 * split - 2) * max(1, columns / 128)
        return _Division(warpgroups, split, together, ctas * -(-tiles // split) * warpgroups * (1 + waits) + adding)

    splits = (
        split
        for split in range(1, min(8, tiles // 2 or 1) + 1)
        if split == 1 or _of_each(groups * split, split, device) <= fit
    )
    return min(map(division, splits), key=lambda division: division.cost)


def _of_each(ctas: int, cluster: int, device: Device) -> int:
    """CTAs that a multiprocessor takes. Clusters of more than two leave a tenth of the multiprocessors out: not every
    GPC has a multiple of them."""
    return int(-(-ctas // (device.multiprocessors * (1 if cluster <= 2 else 0.9))))


def _middle_plan(
    variant: Variant,
    tokens: int,
    out: int,
    device: Device,
    blocks: int = 0,
    route: Launch | None = None,
    choices: int = 1,
) -> _Plan:
    """T(x) of `tokens` and the product; with `route`, which puts them in order, of pairs in at most so many blocks,
    `choices` of each token."""
    cells, rows = blocks or -(-tokens // variant.columns), -(-out // (64 * variant.warpgroups))
    parts = variant.spread if variant.coarse else 1  # of the inputs, each with its own scales of T(x)
    function, threads = _function(variant, "tqw_spread", device), variant.spread_threads()
    grid = (tokens // (choices if variant.coarse else 1) * variant.spread, 1)
    spread = Launch(function, grid, threads, 0, device, variant.spread // parts)
    function, threads = _function(variant, "tqw_middle", device), 128 * variant.warpgroups
    shared, cluster = variant.ring_bytes(), 1 if variant.apart else variant.split
    if route is None:  # how many blocks of pairs there are is not known
        shared = max(shared, _to_spread(rows * variant.split * cells, device))
    product = Launch(function, (rows * variant.split, cells), threads, shared, device, cluster)
    shared_cells = rows * cells if variant.apart else 0
    sums = shared_cells * variant.split * 256 * variant.warpgroups * variant.columns
    launches = (route, spread, product) if route else (spread, product)
    scales = cells * variant.columns * parts
    return _Plan(cells * variant.block_bytes(), scales, launches, blocks=blocks, part_bytes=sums, arrivals=shared_cells)


def _takes_8_bits(base: Variant, device: Device) -> bool:
    """Whether both operands may have 8 bits. One scale for a token is only for inputs without outliers: rotated."""
    if not device.arch.startswith("sm_90") or base.tile != 128 or base.planes != 1 or len(base.bits) != 1:
        return False
    if not base.rotate or (base.group % 128 and base.group not in (32, 64)):
        return False
    return base.bits[0] <= _COARSE_BITS and 512 <= base.padded_in <= 1 << 17


def _prompt_variant(base: Variant) -> Variant:
    """The variant of prompt.cu."""
    return replace(base, coarse=True, prompt=True, columns=128, cluster=2, stages=4)


@lru_cache(maxsize=4096)
def _prompt_launches(base: Variant, tokens: int, rows: int, out: int, device: Device) -> tuple[Launch, Launch]:
    """T(x) of all tokens and the scales of all rows of V; the product with a slice of rows."""
    variant = _prompt_variant(base)
    function, threads = _function(variant, "tqw_spread", device), variant.spread_threads()
    spread = Launch(function, (tokens + -(-2 * out // threads), 1), threads, 0, device)
    function, cells = _function(variant, "tqw_prompt", device), -(-rows // 256) * -(-tokens // 256)
    clusters = min(cells, resident(function, 384, 2, device))
    return spread, Launch(function, (2 * clusters, 1), 384, variant.prompt_bytes(), device, 2)


@lru_cache(maxsize=4096)
def _grouped_variant(base: Variant, pairs: int, count: int, out: int, device: Device) -> Variant | None:
    """The variant of middle.cu for blocks of pairs of one of `count` experts; None: few pairs, or not for this GPU."""
    most = _GROUPED_PAIRS if base.padded_in > 2048 else _GROUPED_PAIRS_OF_FEW_INPUTS
    if pairs <= most * count or not device.arch.startswith("sm_90") or base.tile != 128:
        return None
    if _route_bytes(count) > device.shared_bytes:
        return None
    # most experts in one block: to decode their codes twice costs more than columns that nobody needs
    columns = next((c for c in _COLUMNS if c * count >= 1.25 * pairs), _COLUMNS[-1])
    if _takes_8_bits(base, device):
        # of few inputs a CTA's start and end take as long as its products: more and smaller ones hide each other's
        columns = min(columns, 96) if base.padded_in <= 1024 else columns
        one = 64 < columns <= 128 or base.padded_in <= 2048
        return _coarse_of(replace(base, experts=True), columns, 1 if one else 2)
    # two CTAs on a multiprocessor hide each other's waits where their registers fit
    most = 128 if base.bits == (4,) else 96 if len(base.bits) == 1 else 64
    pair = sum(base.bits) <= 4 and columns <= most
    stages = {8: 8, 16: 8, 128: 3 if pair else 4, 192: 3, 256: 2}.get(columns, 4)
    return replace(base, experts=True, columns=columns, warpgroups=2, stages=stages, min_ctas=2 if pair else 1)


def _route_bytes(count: int) -> int:
    """Dynamic shared memory of tqw_route for `count` experts."""
    return 4 * (36 * count + 1)


def _most_blocks(pairs: int, count: int, columns: int) -> int:
    """The most blocks of `columns` that so many pairs of `count` experts fill: all experts but one end with a block
    of a single pair."""
    chosen = min(pairs, count)
    return (pairs - chosen) // columns + chosen


def _grouped_plan(variant: Variant, pairs: int, choices: int, count: int, out: int, device: Device) -> _Plan:
    blocks = _most_blocks(pairs, count, variant.columns)
    function, ctas = _function(variant, "tqw_route", device), 8 if pairs > 1024 else 1
    route = Launch(function, (ctas, 1), 1024, _route_bytes(count), device, ctas)
    return _middle_plan(variant, pairs, out, device, blocks, route, choices)


@lru_cache(maxsize=4096)
def _expert_plan(base: Variant, tokens: int, choices: int, count: int, out: int, device: Device) -> _Plan | None:
    """The launches for all pairs (token, expert): by blocks of one of `count` experts, or by one kernel, in which
    each pair reads its expert's codes. None: not even one token fits."""
    pairs = tokens * choices
    grouped = _grouped_variant(base, pairs, count, out, device)
    if grouped is not None:
        return _grouped_plan(grouped, pairs, choices, count, out, device)
    return _decode_plan(_decode_variant(replace(base, experts=True), 1, out, device), 1, out, device, pairs)


@lru_cache(maxsize=4096)
def _expert_tokens(base: Variant, tokens: int, choices: int, count: int, out: int, device: Device) -> int:
    """Tokens of one turn: the fewest turns that keep T(x) of blocks of pairs below _PLANE_BYTES."""

    def fits(step: int) -> bool:
        variant = _grouped_variant(base, step * choices, count, out, device)
        if variant is None:
            return True
        blocks = _most_blocks(step * choices, count, variant.columns)
        return 2 * blocks * variant.columns * variant.padded_in <= _PLANE_BYTES

    steps = (-(-tokens // turns) for turns in range(1, tokens + 1))
    return next((step for step in steps if fits(step)), 1)


@lru_cache(maxsize=4096)
def _plan(base: Variant, tokens: int, out: int, device: Device) -> _Plan | None:
    """The one launch or two that take so many tokens; None: too many for the kernels of this file."""
    _, wide = _sizes(base, out, device)
    if tokens <= (_WIDE_TOKENS if wide and _takes_8_bits(base, device) else _DECODE_TOKENS):
        plan = _decode_plan(_decode_variant(base, tokens, out, device), tokens, out, device)
        if plan is not None:
            return plan
    variant = _middle_variant(base, tokens, out, device)
    return None if variant is None else _middle_plan(variant, tokens, out, device)


class _Call:
    """A plan for a weight and a number of tokens, to which a call adds only the addresses of its tensors."""

    def __init__(self, ready: _Ready, plan: _Plan, tokens: int, choices: int = 0) -> None:
        """choices: experts of each token; 0: the weight is not stacked."""
        self.launches, self.size, self.vectors = plan.launches, ready.size, ready.vectors
        self.outputs, self.choices = ready.out * (choices or 1), choices  # of a token
        pairs = tokens * choices
        self.params = params = _Params.from_buffer_copy(ready.params)
        params.batch, params.arrivals, params.blocks, params.choices = plan.batch, plan.arrivals, plan.blocks, choices
        params.tokens = tokens if not choices else pairs if plan.blocks else 1
        self.scratch_bytes = plan.scratch_bytes(pairs)
        self.places: dict[str, int] = {}  # of what lies in it
        if plan.plane_bytes:
            rest = plan.plane_bytes + 4 * plan.scale_count
            self.places = {"planes": 0, "plane_scale": plan.plane_bytes}
            if plan.arrivals:
                self.places |= {"parts": rest, "arrived": rest + plan.part_bytes}
            if plan.blocks:
                pair = rest + 8 * plan.blocks
                self.places |= {"block": rest, "pair": pair, "column": pair + 4 * plan.scale_count}

    def __call__(
        self, x: Tensor, stride: int, y: Tensor, bias: Tensor | None, ids: Tensor | None = None, first: int = 0
    ) -> None:
        """y = T(x) V^T + b for tokens from `first` on, `stride` inputs apart; with ids by the experts they name."""
        params = _Params.from_buffer_copy(self.params)  # threads share self
        params.x = start = x.data_ptr() + first * stride * self.size
        params.vectors = self.vectors and start % 16 == 0 and stride * self.size % 16 == 0
        params.x_stride, params.y = stride, y.data_ptr() + first * self.outputs * self.size
        if bias is not None:
            params.bias = bias.data_ptr()
        if ids is not None:
            params.ids = ids.data_ptr() + first * self.choices * ids.element_size()
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        if not self.scratch_bytes:
            return launch_all(self.launches, params, stream)
        scratch = borrow(self.scratch_bytes, stream)
        try:
            for name, place in self.places.items():
                setattr(params, name, scratch + place)
            launch_all(self.launches, params, stream)
        finally:
            give_back(scratch)


class _Prompt:
    """Calls of prompt.cu for a weight and a number of tokens: T(x) of so many at once, V of so many rows."""

    def __init__(self, ready: _Ready, tokens: int) -> None:
        self.ready, out, padded = ready, ready.out, ready.padded
        turn, rows = (-(-n // -(-n * padded // most)) for n, most in ((tokens, _PROMPT_BYTES), (out, _ROWS_BYTES)))
        turn, rows = -(-turn // 128) * 128, -(-rows // 256) * 256
        counts = 1 + rows // 256 * (1 + -(-padded // 512))  # of strips of V that are decoded (prompt.cu)
        slices = range(0, out, rows)
        self.params = _Params.from_buffer_copy(ready.params)
        self.params.arrivals, self.count_bytes = counts * len(slices), 4 * counts
        self.turns = [(first, min(turn, tokens - first)) for first in range(0, tokens, turn)]
        self.slices = [(row, min(rows, out - row)) for row in slices]
        sizes = {
            "planes": turn * padded, "rows": rows * padded, "plane_scale": 4 * turn, "row_scale": 4 * out,
            "arrived": self.count_bytes * len(slices),
        }  # fmt: skip
        self.places = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))  # in the scratch memory
        self.scratch_bytes = sum(sizes.values())

    def __call__(self, x: Tensor, stride: int, y: Tensor, bias: Tensor | None) -> None:
        """y = T(x) V^T + b for tokens `stride` inputs apart."""
        ready, params, size = self.ready, _Params.from_buffer_copy(self.params), self.ready.size
        params.x_stride, params.bias = stride, None if bias is None else bias.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())
        scratch = borrow(self.scratch_bytes, stream)
        try:
            for name, place in self.places.items():
                setattr(params, name, scratch + place)
            for first, params.tokens in self.turns:
                params.x, params.y = x.data_ptr() + first * stride * size, y.data_ptr() + first * ready.out * size
                params.vectors = ready.vectors and params.x % 16 == 0 and stride * size % 16 == 0
                params.arrived = scratch + self.places["arrived"]
                for params.first_row, params.slice in self.slices:
                    spread, product = _prompt_launches(ready.base, params.tokens, params.slice, ready.out, ready.device)
                    launch_all((product,) if params.first_row else (spread, product), params, stream)
                    params.arrived += self.count_bytes
        finally:
            give_back(scratch)


class _Ready:
    """What all calls on one weight share: the parameters that it decides, and a call for each number of tokens."""

    def __init__(self, qw: QuantizedWeight, dtype: torch.dtype, in_features: int, device: Device) -> None:
        self.base, self.params, self.device = _variant(qw, dtype), _params(qw, in_features), device
        self.out, self.padded, self.in_features = qw.out_features, qw.padded_in, in_features
        self.dense = replace(self.base, tile=min(self.base.tile, qw.group_size & -qw.group_size))  # one group to a tile
        self.size = dtype.itemsize
        self.vectors = self.params.channel % 8 == 0 and (in_features % 8 == 0 or in_features >= self.padded)
        kept = lru_cache(maxsize=_KEPT_CALLS)
        self.call, self.prompt = kept(self._call), kept(self._prompt)
        self.turn, self.dequantize = kept(self._turn), kept(self._dequantize)

    def _call(self, tokens: int, choices: int = 0) -> _Call | None:
        """None: no kernel takes so many at once. choices: experts of each token, of a stacked weight."""
        if choices:
            plan = _expert_plan(self.base, tokens, choices, self.params.experts, self.out, self.device)
        else:
            plan = _plan(self.base, tokens, self.out, self.device)
        return None if plan is None else _Call(self, plan, tokens, choices)

    def _prompt(self, tokens: int) -> _Prompt | None:
        return _Prompt(self, tokens) if _is_prompt(self.base, tokens, self.out, self.device) else None

    def _turn(self, tokens: int, choices: int) -> tuple[int, int]:
        """Of tokens with `choices` experts each: up to how many pairs a product for each expert is slower, and how
        many tokens are computed at once."""
        count = self.params.experts
        grouped = _grouped_variant(self.base, tokens * choices, count, self.out, self.device) is not None
        most = min(_MIDDLE_TOKENS * count, _MOST_PAIRS) if grouped else _PAIRS_PER_EXPERT * count
        return most, _expert_tokens(self.base, tokens, choices, count, self.out, self.device)

    def _dequantize(self, rows: int) -> Launch:
        return _dequantize_launch(self.dense, rows, self.device)


_READY: dict[tuple, _Ready] = {}


def _key(qw: QuantizedWeight, x: Tensor) -> tuple:
    """All that a prepared weight is made from, so that reused memory cannot make it wrong."""
    tensors = (*qw.packed, *qw.weight_scale, *qw.channel_scale)
    return (
        x.dtype, x.shape[-1], x.get_device(), qw.rotation,
        *map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors), *map(Tensor.is_contiguous, tensors),
    )  # fmt: skip


def _ready(qw: QuantizedWeight, x: Tensor) -> _Ready:
    """The prepared weight."""
    enter(x.device.index)
    key = _key(qw, x)
    ready = _READY.get(key)
    if ready is None:
        if len(_READY) >= 8192:
            _READY.clear()
        ready = _READY[key] = _Ready(qw, x.dtype, x.shape[-1], device_at(x.device.index))
    return ready


@lru_cache(maxsize=4096)
def _dequantize_launch(variant: Variant, rows: int, device: Device) -> Launch:
    across = -(-variant.padded_in // variant.block // 4)
    down = min(-(-rows // 16), max(1, device.multiprocessors * 3 // across))
    return Launch(_function(variant, "tqw_dequantize", device), (across, down), 128, 0, device)


def _dense_rows(ready: _Ready, first: int, rows: int, out: Tensor, ids: Tensor | None = None) -> None:
    """out[r] = dense[first + r], or dense[ids[r]]: [rows, in]; for `qr` rows of V, [rows, padded_in]."""
    params = _Params.from_buffer_copy(ready.params)
    params.y, params.first_row, params.tokens = out.data_ptr(), first, rows
    params.ids = None if ids is None else ids.data_ptr()
    params.vectors = out.shape[1] % 8 == 0 and params.y % 16 == 0 and params.channel % 8 == 0
    launch_all((ready.dequantize(rows),), params, torch._C._cuda_getCurrentRawStream(out.get_device()))


def _many(x: Tensor, y: Tensor, ready: _Ready, bias: Tensor | None) -> None:
    """y = x dense^T + b by slices of rows: for many tokens cuBLAS is the best user of the tensor cores."""
    step = max(256, _SLICE_BYTES // (x.shape[1] * x.element_size()) // 256 * 256)
    slices = -(-ready.out // step)
    step = -(-ready.out // slices // 256) * 256
    dense = torch.empty(min(step, ready.out), x.shape[1], dtype=x.dtype, device=x.device)
    for first in range(0, ready.out, step):
        rows = min(step, ready.out - first)
        _dense_rows(ready, first, rows, dense)
        torch.mm(x, dense[:rows].T, out=y[:, first : first + rows])
    if bias is not None:
        y += bias


@lru_cache(maxsize=1)
def _activations() -> str:
    activations = os.environ.get("TQW_CUDA_ACTIVATIONS", "int8")
    if activations not in ("exact", "int8"):
        raise TqwError(f"expected TQW_CUDA_ACTIVATIONS to be exact or int8, got {activations!r}")
    return activations


_NOTHING = nullcontext()


def _on(x: Tensor) -> AbstractContextManager:
    """With the device of x as torch's current one, which to set costs as much as a launch."""
    return _NOTHING if torch.cuda.current_device() == x.get_device() else torch.cuda.device(x.device)


def _product(x: Tensor, ready: _Ready, bias: Tensor | None) -> Tensor:
    """The op for passes that share a rotation: [..., in] -> [..., out]."""
    y = x.new_empty(*x.shape[:-1], ready.out)
    tokens, stride = x.numel() // ready.in_features, ready.in_features
    if tokens == 0:
        return y
    if not x.is_contiguous():
        x = x.reshape(-1, stride)
        x = x if x.stride(1) == 1 else x.contiguous()
        stride = x.stride(0)
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    call = (ready.prompt(tokens) if tokens >= _PROMPT_TOKENS else None) or ready.call(tokens)
    if call is not None:
        call(x, stride, y, bias)
        return y
    chunk = _chunk(ready, tokens)
    if chunk is None:
        _many(x.reshape(-1, x.shape[-1]), y.view(-1, ready.out), ready, bias)
        return y
    for first in range(0, tokens, chunk):
        call = ready.call(min(chunk, tokens - first))
        assert call is not None, "fewer tokens need less shared memory"
        call(x, stride, y, bias, first=first)
    return y


def _chunk(ready: _Ready, tokens: int) -> int | None:
    """Tokens of one turn when all do not fit in one: the most that fit, shared out evenly. None: by dense rows."""
    if tokens >= _DENSE_TOKENS:
        return None
    chunk = next((chunk for chunk in (32, 16, 8, 4, 2, 1) if chunk < tokens and ready.call(chunk)), None)
    return chunk and -(-tokens // -(-tokens // chunk))


def linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b: [..., in] -> [..., out], in the dtype of x."""
    with _on(x):
        return _by_pass(x, qw, bias) if gpu.supports_rotation(qw) else _product(x, _ready(qw, x), bias)


def linear_again(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """`linear` for a weight that has been through it, without asking again whether it can be; else None."""
    ready = _READY.get(_key(qw, x))
    if ready is None or ready.params.experts or qw.rotation == "qr":
        return None
    enter(x.get_device())
    with _on(x):
        return _product(x, ready, bias)


def experts(x: Tensor, qw: QuantizedWeight, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t, k] = T(x_t) V_e^T + b_e, e = ids[t, k]: [tokens, in] -> [tokens, choices, out], in the dtype of x.

    qw: stacked [experts, out, in]; bias: [experts, out] or None. Nothing waits for the ids, so that a CUDA graph can
    hold it. Ids out of range: any finite y.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    ids = ids.to(torch.int64).contiguous()
    y = x.new_empty(*ids.shape, qw.out_features)
    if ids.numel() == 0:
        return y
    (tokens, choices), bias = ids.shape, bias if bias is None else bias.contiguous()
    with _on(x):
        ready = _ready(qw, x)
        _, turn = ready.turn(tokens, choices)
        for first in range(0, tokens, turn):
            call = ready.call(min(turn, tokens - first), choices)
            assert call is not None, "supports_experts has seen one"
            call(x, x.stride(0), y, bias, ids, first)
    return y


def supports_experts(x: Tensor, qw: QuantizedWeight, ids: Tensor, bias: Tensor | None = None) -> str | None:
    """None, or why `experts` cannot compute this call or is not meant for it."""
    if bias is not None and bias.dtype != x.dtype:
        return f"the bias is {bias.dtype}, x {x.dtype}"
    ready = _READY.get(_key(qw, x))
    if ready is None:
        reason = _supports_stack(x, qw)
        if reason is not None:
            return reason
        ready = _ready(qw, x)
    if ids.numel() == 0:
        return None
    tokens, choices = ids.shape
    pairs, count = tokens * choices, ready.params.experts
    most, turn = ready.turn(tokens, choices)
    if pairs > most and not torch.cuda.is_current_stream_capturing():
        return f"{pairs} pairs for {count} experts: a product for each expert is faster"
    with _on(x):
        call = ready.call(turn, choices)
    return None if call is not None else "one token's inputs do not fit in shared memory"


def _supports_stack(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or why `experts` cannot compute with this weight."""
    reason = gpu.supports_rotation(qw)
    if reason is not None:
        return reason
    if qw.packed[0].ndim != 3:
        return f"the weight has {qw.packed[0].ndim} dimensions, not 3"
    if any(packed[0].numel() % 16 for packed in qw.packed):
        return "an expert's codes do not start at a multiple of 16 bytes"
    return supports(x, qw[0])


@lru_cache(maxsize=4096)
def _combine_launch(variant: _Combine, tokens: int, out: int, device: Device) -> Launch:
    grid = -(-out // (128 * variant.count)), tokens
    return Launch(_function(variant, "tqw_combine", device), grid, 128, 0, device)


def combine(pairs: Tensor, weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """y[t] = sum_k weights[t, k] pairs[t, k] over 0 <= ids[t, k] < experts: [tokens, choices, out] -> [tokens, out].

    Summed in float32 in one pass over the pairs; y in their dtype, float32, float16 or bfloat16.
    """
    weights = weights if weights.dtype in _TYPES else weights.float()
    pairs, weights, ids = pairs.contiguous(), weights.contiguous(), ids.to(torch.int64).contiguous()
    tokens, choices, out = pairs.shape
    y = pairs.new_empty(tokens, out)
    if y.numel() == 0:
        return y
    params = _CombineParams(pairs.data_ptr(), weights.data_ptr(), ids.data_ptr(), y.data_ptr(), choices, out, experts)
    wide = out * y.element_size() % 16 == 0 and params.pairs % 16 == 0 and params.y % 16 == 0
    index = pairs.get_device()
    with _on(pairs):
        enter(index)
        variant = _Combine(_TYPES[y.dtype], _TYPES[weights.dtype], 16 // y.element_size() if wide else 1)
        stream = torch._C._cuda_getCurrentRawStream(index)
        for first in range(0, tokens, _MOST_GRID):
            rows = min(_MOST_GRID, tokens - first)
            launch_all((_combine_launch(variant, rows, out, device_at(index)),), params, stream)
            params.pairs += rows * choices * out * y.element_size()
            params.weights += rows * choices * weights.element_size()
            params.ids += rows * choices * 8
            params.y += rows * out * y.element_size()
    return y


def _passes(qw: QuantizedWeight) -> list[QuantizedWeight]:
    """Weights that each have one rotation and sum to `qw`."""
    if qw.shares_rotation:
        return [qw]
    parts = zip(qw.packed, qw.weight_scale, qw.channel_scale, strict=True)
    return [replace(qw, packed=(p,), weight_scale=(s,), channel_scale=(c,)) for p, s, c in parts]


def _by_pass(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The slower way for passes with different rotations and for `qr`: a float32 product for each rotation."""
    wide = x.float()
    total = wide.new_zeros(*x.shape[:-1], qw.out_features)
    for part in _passes(qw):
        transformed = transform(wide, part.channel_scale[0], part.matrix(wide)) if qw.rotation == "qr" else wide
        total += _product(transformed, _ready(part, transformed), None)
    return (total if bias is None else total + bias).to(x.dtype)


def embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """dense[ids]: integer [...] -> [..., in] in `dtype`, for passes that share a Hadamard rotation or have none."""
    flat = ids.reshape(-1).long()
    y = torch.empty(flat.shape[0], qw.in_features, dtype=dtype, device=qw.device)
    if flat.shape[0]:
        with _on(y):
            _dense_rows(_ready(qw, y), 0, flat.shape[0], y, flat)
    return y.view(*ids.shape, qw.in_features)


def supports_embedding(ids: Tensor, qw: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """None, or why this lookup needs another backend."""
    return gpu.supports_rotation(qw) or supports(ids.new_empty(0, dtype=dtype), qw)
