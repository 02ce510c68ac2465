"""How a call's work is divided on a GPU: the variant of each kernel, and its launches. Every choice here was measured
on one H100; none changes what is computed but for which operands have 8 bits."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from tqw.kernels.cuda_launch import Device, Launch, ctas_at_once, load, resident
from tqw.kernels.cuda_variant import MULTIPROCESSOR_BYTES, Combine, Variant

_DECODE_TOKENS = 16  # up to here the decode kernel, where T(x) fits in shared memory (H100)
_WIDE_TOKENS = 12  # or up to here, of many inputs where both operands may have 8 bits and strips are no even share
_ONE_PLANE_TOKENS = 5  # from here on 8 bits of T(x) are less work than 16
MIDDLE_TOKENS = 1024  # up to here middle.cu with 16 bits of T(x); beyond, dequantize + cuBLAS wins (H100)
_NEVER_DENSE = 192  # up to so many tokens of 16 bits dense rows are no faster
PROMPT_TOKENS = 1024  # from so many on V may be decoded once for all tokens
_COARSE_BYTES = 64 << 20  # of T(x) in 8 bits in the middle kernel; more are a prompt
_COLUMNS = (8, 16, 32, 64, 96, 128, 160, 176, 192, 224, 256)  # tokens of a CTA of middle.cu
_GROUPED_PAIRS = 1.25  # pairs per expert from which an expert's codes are better read once for all (middle.cu, H100)
_GROUPED_PAIRS_OF_FEW_INPUTS = 0.7  # up to 2,048 inputs
_PLANE_BYTES = 512 << 20  # of T(x) of pairs; more are computed in turns


@lru_cache(maxsize=512)
def _function(variant: Variant | Combine, name: str, device: Device) -> Any:
    """The loaded kernel."""
    return load(variant.source(), name, device)


@dataclass(frozen=True)
class Plan:
    """How a kernel of this file takes so many tokens: what it needs for T(x), and its launches."""

    plane_bytes: int
    scale_count: int
    launches: tuple[Launch, ...]
    batch: int = 1
    blocks: int = 0  # of pairs of one expert, at most; 0: each pair on its own
    part_bytes: int = 0  # sums that CTAs leave for each other
    arrivals: int = 0  # tiles that they share

    def scratch(self, pairs: int) -> dict[str, int]:
        """Bytes of T(x), its scales and, where they are, sums of parts of the inputs, and the order of the pairs."""
        scales = 4 * self.scale_count
        sizes = {"planes": self.plane_bytes, "plane_scale": scales} if self.plane_bytes else {}
        if self.arrivals:
            sizes |= {"parts": self.part_bytes, "arrived": 4 * self.arrivals}
        if self.blocks:
            sizes |= {"block": 8 * self.blocks, "pair": scales, "column": 4 * pairs}
        return sizes


def _shares(tiles: int, strips: int, each: float = 1) -> tuple[int, int]:
    """Warps of a CTA, about 16, and how many of them share the tiles, or pairs of them, of each of its `strips` evenly.

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


class _Sizes(NamedTuple):
    """What a layer is to a GPU."""

    each: float  # strips of 16 outputs for each multiprocessor
    wide: bool  # more than 64 tiles of inputs

    @property
    def many(self) -> bool:
        return self.each > 6

    @property
    def busy(self) -> float:
        """How much of the time the average multiprocessor works, where the busiest takes `each` strips, rounded up."""
        return self.each / math.ceil(self.each)

    @property
    def lasts(self) -> bool:
        """Whether one token takes so long that more codes on their way, which delay x, are worth it."""
        return self.each > (2.2 if self.wide else 3)


def _sizes(base: Variant, out: int, device: Device) -> _Sizes:
    return _Sizes(-(-out // 16) / device.multiprocessors, base.padded_in > 64 * base.tile)


def decode_variant(base: Variant, tokens: int, out: int, device: Device) -> Variant:
    """The variant of the decode kernel for a few tokens. Measured on one H100 (benchmarks/gpu_settings.py)."""
    tiles, sizes = base.padded_in // base.tile, _sizes(base, out, device)
    clustered = device.clusters and out > 7 * 16
    planes = base.planes if tokens >= _ONE_PLANE_TOKENS else 2
    # one launch, unless it takes too long to transform all tokens in every CTA, or their inputs do not fit in registers
    alone = not base.experts and tokens == 1 and tiles <= 224
    fused = base.experts or alone
    # T(x) of all inputs in every CTA, unless each has to compute it or it leaves too little room for codes on their way
    whole = not base.experts and tokens * planes * base.padded_in <= device.shared_bytes // 2
    halved = tiles > 120 and sizes.each < 3 if alone else sizes.wide and not whole
    multicast = device.arch.startswith(("sm_90", "sm_100")) and clustered and not fused
    variant = replace(
        base,
        planes=planes,
        column_tiles=next(n for n in (1, 2, 4) if 8 * n >= tokens * planes),
        fused=fused,
        cluster=2 if multicast else 1,
        split=2 if halved and clustered and tiles % 2 == 0 else 1,
        unroll=2,
        halves=tokens * planes <= 16,
        small=out < 16,
    )
    variant = replace(variant, turn_tiles=_turn_tiles(variant, tokens, sizes))
    warps, share = (16, 8) if alone and halved else _layout(variant, tokens, sizes)
    ring, early = _ring(variant, tokens, sizes)
    return replace(variant, warps=warps, share=share, ring=ring, early=early)


def _turn_tiles(variant: Variant, tokens: int, sizes: _Sizes) -> int:
    """How many tiles a warp should take at once: two lie side by side, so that rows come in longer pieces (of 3 and 5
    bits those of one tile are no whole sectors of memory), and a turn takes some time of its own."""
    bits = variant.bits
    odd = variant.padded_in // variant.tile // variant.split % 2
    if odd or variant.tile != 128 or variant.group != 128 or variant.experts:
        return 1
    if tokens > 1:
        return 2 if bits in ((2,), (3,)) else 1
    # of 4 bits one is as good where turns are few, and where the last strips leave many multiprocessors idle
    few = not sizes.lasts and (variant.split == 2 or not sizes.wide or sizes.busy < 0.83)
    return 1 if bits == (4,) and few else 2


def _layout(variant: Variant, tokens: int, sizes: _Sizes) -> tuple[int, int]:
    """Warps of a CTA, and how many of them share a strip."""
    tiles, split = variant.padded_in // variant.tile, variant.split
    turns = tiles // split // variant.turn_tiles
    if variant.turn_tiles == 2 and turns * split > 20 and variant.bits != (2,):
        shares = 16, 16 // split  # four for each scheduler: better than shares that come out even
    else:
        shares = _shares(turns, split, sizes.each)
    if sizes.many and split == 1 and tokens > 8 and tiles > 20:
        return min(shares, _shares(turns, 2), key=lambda shares: _turns(turns, sizes.each, *shares))
    return shares


def _ring(variant: Variant, tokens: int, sizes: _Sizes) -> tuple[int, int]:
    """Turns whose codes are on their way, and those that are asked for before x."""
    bits, wide, split = sum(variant.bits), sizes.wide, variant.split
    if variant.turn_tiles == 2:
        return 3 if tokens == 1 and sizes.lasts and bits <= 4 else 2, 2 if tokens > 1 or sizes.lasts else 1
    if 1 < tokens <= 8 and bits > 4 and variant.bits != (8,):
        return 2, 2  # decoding takes longer than fetching
    if tokens > 8:
        return 3 if sizes.many else 2, 1 if split == 2 and sizes.each < 3 else 2
    if sizes.many:
        return 5, 3
    if not variant.fused:
        return (4, 2) if wide else (3, 2)
    if variant.experts or not wide:
        return (2, 2) if wide else (4, 1)
    # codes on their way delay x: the less, the more multiprocessors the last strips leave idle
    return (5, 3) if sizes.busy < 0.83 else (4 if split == 2 else 3, 1)


def _fitting(variant: Variant, tokens: int, device: Device) -> Variant | None:
    """With as much of the ring as shared memory has room for; None: the transformed tokens do not fit."""
    fitting = (replace(variant, ring=ring) for ring in range(variant.ring, 0, -1))
    return next((v for v in fitting if v.shared_bytes(tokens, 1) <= device.shared_bytes), None)


def decode_plan(variant: Variant, tokens: int, out: int, device: Device, pairs: int = 1) -> Plan | None:
    """The decode kernel for a few tokens; None: the transformed tokens do not fit.

    pairs: so many times one token, each with an expert of its own.
    """
    fitting = _fitting(variant, tokens, device)
    if fitting is None:
        return None
    variant, limit = fitting, device.shared_bytes
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
        return Plan(0, 0, (decode,), batch)
    tiles, grid = variant.padded_in // variant.tile, (variant.transform_ctas(tokens), 1)
    transform_x = Launch(_function(variant, "tqw_transform", device), grid, 256, 0, device)
    scales = tiles * variant.scale_pitch()
    return Plan(variant.planes * tokens * variant.padded_in, scales, (transform_x, decode), batch)


def _to_spread(ctas: int, device: Device) -> int:
    """Dynamic shared memory with which no multiprocessor takes more CTAs than the even share of them.

    Without it some take two where one is the share, while others are held by the kernel before or not in a cluster's
    reach, and two CTAs on one take twice as long."""
    share = -(-ctas // device.multiprocessors)
    return (device.shared_bytes + 1024) // (share + 1)


def middle_variant(base: Variant, tokens: int, out: int, device: Device) -> Variant | None:
    """The variant of middle.cu that takes the least time; None: not for this GPU or tile, or not for so many tokens."""
    if not device.arch.startswith("sm_90") or base.tile != 128:
        return None
    coarse = takes_8_bits(base, device)
    if not coarse and tokens > MIDDLE_TOKENS:
        return None
    costs = divisions(base, tokens, out, device)
    best = min(costs, key=lambda division: costs[division])
    if coarse:
        return coarse_of(base, *best)
    slower = sum({5: 1.1, 6: 1.2}.get(bits, 1) for bits in base.bits)  # than 4 bits to decode; passes multiply again
    many = tokens > _NEVER_DENSE and base.x_type > 0  # the library's float32 products are slow
    if many and _dense_cost(base, tokens, out) < slower * costs[best]:
        return None
    return _fine_of(base, tokens, out, device, best)


class Division(NamedTuple):
    """How CTAs of middle.cu share its work."""

    columns: int  # tokens of a CTA
    warpgroups: int  # of 64 rows
    split: int = 1  # parts of the inputs
    apart: bool = False  # the CTAs that share the inputs are no cluster

    def groups(self, tokens: int, out: int) -> int:
        """Of CTAs that share the inputs."""
        return -(-out // (64 * self.warpgroups)) * -(-tokens // self.columns)

    def of_each(self, tokens: int, out: int, together: int, device: Device) -> float:
        """CTAs that a multiprocessor takes, of which `together` run at once. The last go to those that are done first,
        two to some."""
        # clusters of more than two leave a tenth of the multiprocessors out: not every GPC has a multiple of them
        at_once = device.multiprocessors * (1 if self.apart or self.split <= 2 else 0.9)
        ctas = self.groups(tokens, out) * self.split
        each = math.ceil(ctas / at_once)
        if each <= together:
            return each
        full, last = divmod(ctas, at_once * together)
        return together * full + (min(together, max(1, 2 * last / at_once)) if last else 0)


def divisions(base: Variant, tokens: int, out: int, device: Device) -> dict[Division, float]:
    """Ways to divide the work of middle.cu, and their costs."""
    shared = [(split, False) for split in range(2, 9)]  # a cluster of more than eight is not for every GPU
    if takes_8_bits(base, device):
        shared += [(split, True) for split in range(2, 13)]
    costs = {}
    for columns, warpgroups in itertools.product(_columns(tokens), (1, 2)):
        together = _together(base, columns, warpgroups, device)
        for split, apart in ((1, False), *shared):
            if split == 1 or 2 * split <= base.padded_in // base.tile:
                division = Division(columns, warpgroups, split, apart)
                costs[division] = _cost(base, tokens, out, device, together, division)
    return {division: cost for division, cost in costs.items() if cost < math.inf}


def _columns(tokens: int) -> list[int]:
    """The fewest columns for each number of blocks of tokens."""
    fewest = {-(-tokens // columns): columns for columns in reversed(_COLUMNS)}
    return [columns for columns in fewest.values() if columns >= 64 or columns >= tokens]


def _cost(base: Variant, tokens: int, out: int, device: Device, together: int, division: Division) -> float:
    """In tiles of 64 rows and 64 tokens; fitted to 15 layers at 16 to 4,096 tokens on one H100
    (benchmarks/gpu_settings.py): the best takes 0.5 % longer than the fastest, with 16 bits 0.9 %, on average."""
    columns, warpgroups, split, apart = division
    tiles, wide = base.padded_in // base.tile, max(1, columns / 64)
    each = division.of_each(tokens, out, together, device)
    if split > 1 and each > together:
        return math.inf
    alone = each if together == 1 else float(each == 1)  # CTAs whose waits no other hides
    alone *= 0.5 / wide if warpgroups == 1 else 0.3 if columns <= 64 else 0
    decoding = 2.0  # a tile; its product takes 1 for each 64 tokens
    if takes_8_bits(base, device) and base.bits[0] > 4:
        decoding *= {5: 2.1, 6: 3.0, 8: 1.75}[base.bits[0]]
        alone *= 1.6  # as many bytes are on their way, but fewer tiles
    if columns <= 16 and each * warpgroups == 2:  # of so few tokens two warpgroups wait, too
        alone += 0.15 * each
    adding = 0 if split == 1 else (8.5 + 2 * split) * (0.7 + 0.3 * wide) if apart else 2.9 * split
    adding *= min(1, columns / 64) ** 0.5 * (wide**-0.3 if split == 2 and not apart else 1)
    fetching = 0.15 * wide**1.15 * division.groups(tokens, out) * tiles / device.multiprocessors  # T(x)
    return (each * (decoding + wide) / 3 + alone) * -(-tiles // split) * warpgroups + adding + fetching


def _dense_cost(base: Variant, tokens: int, out: int) -> float:
    """Of dequantize + cuBLAS, as `_cost`; fitted to 109 sizes of 256 to 1,024 tokens on one H100."""
    return out * base.padded_in / 1e6 * (2.8 + tokens / 129)


def _together(base: Variant, columns: int, warpgroups: int, device: Device) -> int:
    """CTAs of middle.cu whose registers and, with 16 bits, two stages a multiprocessor holds."""
    if takes_8_bits(base, device):
        return _coarse_warpgroups(columns) // warpgroups
    memory = replace(base, columns=columns, warpgroups=warpgroups, stages=2).ring_bytes() + 1024
    registers = min(columns + (80 if base.bits in ((5,), (6,)) else 64), 255)
    return max(1, min(device.shared_bytes // memory, 512 // registers // warpgroups))


def _fine_of(base: Variant, tokens: int, out: int, device: Device, division: Division) -> Variant:
    """Operands of 16 bits: more stages where CTAs are few."""
    columns, warpgroups, split, _ = division
    if _sizes(base, out, device).wide and tokens <= 128:
        base = replace(base, spread=8)
    # two CTAs on a multiprocessor hide each other's waits where their registers fit
    pair = columns == 128 and warpgroups == 2 and split == 1 and sum(base.bits) <= 4
    base = replace(base, columns=columns, warpgroups=warpgroups, split=split, min_ctas=2 if pair else 1)
    together = _together(base, columns, warpgroups, device)
    ctas = min(together, math.ceil(division.of_each(tokens, out, together, device)))
    most = 2 if columns <= 64 and (ctas >= 4 or (columns == 64 and warpgroups == 2)) else 3 if pair else 4
    most = 2 if columns == 256 else most
    each = device.shared_bytes // ctas - 1024
    return replace(
        base, stages=next((n for n in range(most, 2, -1) if replace(base, stages=n).ring_bytes() <= each), 2)
    )


def _coarse_warpgroups(columns: int) -> int:
    """Warpgroups with operands of 8 bits whose registers a multiprocessor holds."""
    return 4 if columns <= 64 else 3 if columns <= 128 else 2


def coarse_of(base: Variant, columns: int, warpgroups: int, split: int = 1, apart: bool = False) -> Variant:
    """Operands of 8 bits: as many stages as tiles whose codes are on their way, so that a stage's number is constant,
    where they fit."""
    ctas = _coarse_warpgroups(columns) // warpgroups
    variant = replace(
        base, coarse=True, columns=columns, warpgroups=warpgroups, split=split, spread=split, apart=apart, stages=4,
        min_ctas=ctas if columns <= 64 else 1,
    )  # fmt: skip
    fits = (variant.ring_bytes() + 1024) * ctas <= MULTIPROCESSOR_BYTES
    return variant if fits else replace(variant, stages=3)


def middle_plan(
    variant: Variant,
    tokens: int,
    out: int,
    device: Device,
    blocks: int = 0,
    route: Launch | None = None,
    choices: int = 1,
) -> Plan:
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
    return Plan(cells * variant.block_bytes(), scales, launches, blocks=blocks, part_bytes=sums, arrivals=shared_cells)


@lru_cache(maxsize=4096)
def is_prompt(base: Variant, tokens: int, out: int, device: Device) -> bool:
    """Whether V is better decoded once for all tokens (prompt.cu): where T(x) is much, and where products are so many
    that they outweigh the time until the first rows are decoded."""
    if not takes_8_bits(base, device):
        return False
    if tokens * base.padded_in > _COARSE_BYTES:
        return True
    return _prompt_cost(base, tokens, out, device) <= min(divisions(base, tokens, out, device).values())


def _prompt_cost(base: Variant, tokens: int, out: int, device: Device) -> float:
    """Of prompt.cu, as `_cost`: clusters of two CTAs take 256 rows of 256 tokens, again and again, while V is decoded;
    more than 4 bits take so long that products wait. Fitted to 47 sizes of 1,024 to 65,536 tokens on one H100, and to
    17 of 5, 6 and 8 bits, 1,024 to 2,048 tokens."""
    rounds = math.ceil(-(-out // 256) * -(-tokens // 256) / (device.multiprocessors // 2))
    decoding = {5: 9.7, 6: 11.3, 8: 9.1}.get(base.bits[0], 0) * out * base.padded_in / 1e6
    return math.hypot(35 + 3.9 * rounds * base.padded_in / base.tile, decoding)


def takes_8_bits(base: Variant, device: Device) -> bool:
    """Whether both operands may have 8 bits. One scale for a token is only for inputs without outliers: rotated."""
    if not device.arch.startswith("sm_90") or base.tile != 128 or base.planes != 1 or len(base.bits) != 1:
        return False
    if not base.rotate or (base.group % 128 and base.group not in (32, 64)):
        return False
    return 512 <= base.padded_in <= 1 << 17


def prompt_variant(base: Variant) -> Variant:
    """The variant of prompt.cu."""
    return replace(base, coarse=True, prompt=True, columns=128, cluster=2, stages=4)


@lru_cache(maxsize=4096)
def prompt_launches(base: Variant, tokens: int, rows: int, out: int, device: Device) -> tuple[Launch, Launch]:
    """T(x) of all tokens and the scales of all rows of V; the product with a slice of rows."""
    variant = prompt_variant(base)
    function, threads, ahead = _function(variant, "tqw_spread", device), variant.spread_threads(), variant.rows_ahead()
    ctas = min(tokens, ctas_at_once(function, threads, ahead, device)) if ahead else tokens
    measuring = -(-2 * out // threads)  # CTAs for the scales of V
    spread = Launch(function, (ctas + measuring, 1), threads, ahead, device)
    function, cells = _function(variant, "tqw_prompt", device), -(-rows // 256) * -(-tokens // 256)
    clusters = min(cells, resident(function, 384, 2, device))
    return spread, Launch(function, (2 * clusters, 1), 384, variant.prompt_bytes(), device, 2)


@lru_cache(maxsize=4096)
def grouped_variant(base: Variant, pairs: int, count: int, out: int, device: Device) -> Variant | None:
    """The variant of middle.cu for blocks of pairs of one of `count` experts; None: few pairs, or not for this GPU."""
    most = _GROUPED_PAIRS if base.padded_in > 2048 else _GROUPED_PAIRS_OF_FEW_INPUTS
    if pairs <= most * count or not device.arch.startswith("sm_90") or base.tile != 128:
        return None
    if _route_bytes(count) > device.shared_bytes:
        return None
    # most experts in one block: to decode their codes twice costs more than columns that nobody needs
    columns = next((c for c in _COLUMNS if c * count >= 1.25 * pairs), _COLUMNS[-1])
    if takes_8_bits(base, device):
        # of few inputs a CTA's start and end take as long as its products: more and smaller ones hide each other's
        columns = min(columns, 96) if base.padded_in <= 1024 else columns
        one = 64 < columns <= 128 or base.padded_in <= 2048
        return coarse_of(replace(base, experts=True), columns, 1 if one else 2)
    # two CTAs on a multiprocessor hide each other's waits where their registers fit
    most = 128 if base.bits == (4,) else 96 if len(base.bits) == 1 else 64
    pair = sum(base.bits) <= 4 and columns <= most
    stages = {8: 8, 16: 8, 128: 3 if pair else 4, 192: 3, 224: 3, 256: 2}.get(columns, 4)
    return replace(base, experts=True, columns=columns, warpgroups=2, stages=stages, min_ctas=2 if pair else 1)


def _route_bytes(count: int) -> int:
    """Dynamic shared memory of tqw_route for `count` experts."""
    return 4 * (36 * count + 1)


def _most_blocks(pairs: int, count: int, columns: int) -> int:
    """The most blocks of `columns` that so many pairs of `count` experts fill: all experts but one end with a block
    of a single pair."""
    chosen = min(pairs, count)
    return (pairs - chosen) // columns + chosen


def _grouped_plan(variant: Variant, pairs: int, choices: int, count: int, out: int, device: Device) -> Plan:
    blocks = _most_blocks(pairs, count, variant.columns)
    function, ctas = _function(variant, "tqw_route", device), 8 if pairs > 1024 else 1
    route = Launch(function, (ctas, 1), 1024, _route_bytes(count), device, ctas)
    return middle_plan(variant, pairs, out, device, blocks, route, choices)


@lru_cache(maxsize=4096)
def expert_plan(base: Variant, tokens: int, choices: int, count: int, out: int, device: Device) -> Plan | None:
    """The launches for all pairs (token, expert): by blocks of one of `count` experts, or by one kernel, in which
    each pair reads its expert's codes. None: not even one token fits."""
    variant, pairs = expert_module(base, tokens, choices, count, out, device), tokens * choices
    if variant is None:
        return None
    if variant.columns:
        return _grouped_plan(variant, pairs, choices, count, out, device)
    return decode_plan(variant, 1, out, device, pairs)


def expert_module(base: Variant, tokens: int, choices: int, count: int, out: int, device: Device) -> Variant | None:
    """The module of `expert_plan`."""
    grouped = grouped_variant(base, tokens * choices, count, out, device)
    return grouped or _fitting(decode_variant(replace(base, experts=True), 1, out, device), 1, device)


@lru_cache(maxsize=4096)
def expert_tokens(base: Variant, tokens: int, choices: int, count: int, out: int, device: Device) -> int:
    """Tokens of one turn: the fewest turns that keep T(x) of blocks of pairs below _PLANE_BYTES."""

    def fits(step: int) -> bool:
        variant = grouped_variant(base, step * choices, count, out, device)
        if variant is None:
            return True
        blocks = _most_blocks(step * choices, count, variant.columns)
        return 2 * blocks * variant.columns * variant.padded_in <= _PLANE_BYTES

    steps = (-(-tokens // turns) for turns in range(1, tokens + 1))
    return next((step for step in steps if fits(step)), 1)


def decode_tokens(base: Variant, out: int, device: Device) -> int:
    """Up to how many tokens the decode kernel is faster than the middle one."""
    sizes = _sizes(base, out, device)
    even = sizes.each > 1 and sizes.busy >= 0.9
    return _WIDE_TOKENS if sizes.wide and not even and takes_8_bits(base, device) else _DECODE_TOKENS


def _linear_variant(base: Variant, tokens: int, out: int, device: Device) -> Variant | None:
    few = tokens <= decode_tokens(base, out, device)
    variant = _fitting(decode_variant(base, tokens, out, device), tokens, device) if few else None
    return variant or middle_variant(base, tokens, out, device)


@lru_cache(maxsize=4096)
def linear_plan(base: Variant, tokens: int, out: int, device: Device) -> Plan | None:
    """The one launch or two that take so many tokens; None: too many for the kernels of this file."""
    variant = _linear_variant(base, tokens, out, device)
    if variant is None:
        return None
    return (middle_plan if variant.columns else decode_plan)(variant, tokens, out, device)


def dense_variant(base: Variant) -> Variant:
    """The variant of dense.cu: one group to a tile."""
    return replace(base, tile=min(base.tile, base.group & -base.group), dense=True)


def linear_module(base: Variant, tokens: int, out: int, device: Device) -> Variant:
    """The module of a call with so many tokens, prompts and dense rows included."""
    if tokens >= PROMPT_TOKENS and is_prompt(base, tokens, out, device):
        return prompt_variant(base)
    return _linear_variant(base, tokens, out, device) or dense_variant(base)


@lru_cache(maxsize=4096)
def dequantize_launch(variant: Variant, rows: int, device: Device) -> Launch:
    across = -(-variant.padded_in // variant.block // 4)
    down = min(-(-rows // 16), max(1, device.multiprocessors * 3 // across))
    return Launch(_function(variant, "tqw_dequantize", device), (across, down), 128, 0, device)


@lru_cache(maxsize=4096)
def combine_launch(variant: Combine, tokens: int, out: int, device: Device) -> Launch:
    grid = tokens, -(-out // (128 * variant.count))
    return Launch(_function(variant, "tqw_combine", device), grid, 128, 0, device)
