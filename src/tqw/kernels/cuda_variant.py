"""What a CUDA module is compiled from: files beside this one after the macros that a variant stands for, and the memory
that its kernels need."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from tqw.codebook import levels

MULTIPROCESSOR_BYTES = 228 << 10  # of shared memory (sm_90)
# level = round(u g(u^2 - 1/2)), u = (2 code + 1) / 2^bits - 1: the coefficients of g, computed in fp16
POLYNOMIALS = {
    5: (72.75, 28.640625, 42.71875, 72.875),
    6: (72.75, 35.28125, 16.421875, -41.875, 184.5, 519.0),
}


@dataclass(frozen=True)
class Variant:
    """The macros of a module (see the heads of the files): one is compiled for each value."""

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
    turn_tiles: int = 1
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
    dense: bool = False  # the module of dense.cu

    def source(self) -> str:
        macros = {
            "BITS": ",".join(map(str, self.bits)), "PASSES": len(self.bits), "IN_PADDED": self.padded_in,
            "GROUP": self.group, "TILE": self.tile, "BLOCK": self.block, "ROTATE": int(self.rotate),
            "SCALED": int(self.scaled), "X_TYPE": self.x_type, "PLANES": self.planes, "NT": self.column_tiles,
            "FUSED": int(self.fused),
            "CLUSTER": 1 if self.apart else max(self.cluster, self.split), "SPLIT": self.split,
            "WARPS": self.warps, "SHARE": self.share, "TURN_TILES": self.turn_tiles,
            "RING": self.ring, "EARLY": min(self.early, self.ring), "UNROLL": self.unroll, "HALVES": int(self.halves),
            "MIN_CTAS": self.min_ctas,
            "SMALL": int(self.small), "EXPERTS": int(self.experts),
        }  # fmt: skip
        macros |= {f"LEVELS_{bits}": ",".join(map(str, levels(bits))) for bits in (2, 3, 4, 5, 6)}
        for bits, coefficients in POLYNOMIALS.items():
            words = struct.unpack(f"<{len(coefficients)}H", struct.pack(f"<{len(coefficients)}e", *coefficients))
            macros[f"POLYNOMIAL_{bits}"] = ",".join(map(str, words))
        files = ["common.cu", "codes.cu", "inputs.cu"]
        if self.columns:
            macros |= {
                "COLUMNS": self.columns, "WARPGROUPS": self.warpgroups, "STAGES": self.stages, "SPREAD": self.spread,
                "COARSE": int(self.coarse), "APART": int(self.apart), "SPREAD_THREADS": self.spread_threads(),
                "PROMPT": int(self.prompt), "DECODED": self.strip_tiles(),
                "FETCHED": int(self.prompt and self.rows_ahead() > 0), **_wgmma(self.columns, self.coarse, self.prompt),
            }  # fmt: skip
            files += ["wgmma.cu", *["route.cu"] * self.experts, "int8.cu" if self.coarse else "fp16.cu"]
            files += ["prompt.cu" if self.prompt else "middle.cu"]
        else:
            files += ["dense.cu"] if self.dense else ["ring.cu", "decode.cu"]
        return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + "".join(map(_source, files))

    def shared_bytes(self, tokens: int, batch: int) -> int:
        """Dynamic shared memory of the decode kernel: ring, barrier, warp sums, planes, plane scales."""
        scales = 16 * max(4, 2 * self.tile // self.group)
        ring = self.ring * self.warps * sum(16 * self.turn_tiles * self.tile * bits // 8 + scales for bits in self.bits)
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
        """Threads of a CTA that transforms a token, or a part of its inputs, for the middle kernel and for prompts."""
        part = -(-(self.padded_in // self.tile) // self.spread) * self.tile
        if self.prompt:  # 1,024 inputs a warp
            return 32 * -(-part // 1024) if part <= 28672 else 512
        if not self.coarse:
            return 256
        return 128 if part <= 1024 else 256 if part <= 8192 else 512

    def stage_bytes(self) -> int:
        """T(x) of a tile in the middle kernel."""
        return self.columns * self.tile * (1 if self.coarse else 2)

    def prompt_bytes(self) -> int:
        """Dynamic shared memory of the kernel for prompts: stages, barriers; scale and bias of rows, for two cells."""
        return self.stages * (self.stage_bytes() + 256 * self.tile + 16) + 2 * 256 * 8

    def strip_tiles(self) -> int:
        """Of a strip of V that a warp of the kernel for prompts decodes at once: their codes are in registers."""
        if self.bits[0] <= 4:
            return 4
        return 1 if self.bits[0] == 6 and self.padded_in < 1024 else 2  # of few tiles the compiler unrolls all

    def rows_ahead(self) -> int:
        """Dynamic shared memory of the kernel that transforms prompts: two rows of x, their barriers. 0: so few inputs
        that many CTAs on a multiprocessor do as well (H100), or too many for it."""
        size = 4 * self.padded_in + 16
        return size if self.padded_in > 8192 and size <= MULTIPROCESSOR_BYTES - 4096 else 0

    def block_bytes(self) -> int:
        """T(x) of COLUMNS tokens in the middle kernel."""
        return self.padded_in // self.tile * self.stage_bytes()

    def ring_bytes(self) -> int:
        """Dynamic shared memory of the middle kernel: stages, later sums and outputs; barriers; token scales."""
        cluster = 1 if self.apart else self.split
        owned = -(-self.columns // 8 // cluster)  # eights of columns of each CTA of a cluster
        end = owned * ((cluster - 1) * 2048 * self.warpgroups + 8 * (128 * self.warpgroups + 16))
        return max(self.stages * self.stage_bytes(), end) + 16 * self.stages + 4 * self.columns


@dataclass(frozen=True)
class Combine:
    """The macros of combine.cu."""

    y_type: int
    weight_type: int
    count: int  # outputs of a thread

    def source(self) -> str:
        macros = {"Y_TYPE": self.y_type, "W_TYPE": self.weight_type, "COUNT": self.count}
        return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + _source("combine.cu")


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
