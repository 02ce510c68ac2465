"""Device code of the Triton backend: T(x) = H (a * x), and y = T(x) V^T + b from packed codes."""

from __future__ import annotations

import triton
import triton.language as tl

from tqw.codebook import levels


def _word(part: tuple[int, ...]) -> str:
    return f"0x{int.from_bytes(bytes(level & 255 for level in part), 'little'):08x}"


def _lookup(bits: int) -> str:
    """PTX for int8 levels of four codes, one in each byte: byte permutes pick from a table held in registers."""
    words = [_word(levels(bits)[i : i + 4]) for i in range(0, 2**bits, 4)]
    # the four codes as the nibbles of a selector
    head = "{\n.reg .b32 s, t;\nshr.b32 t, $1, 4;\nor.b32 t, t, $1;\nprmt.b32 s, t, 0, 0x4420;\n"
    if bits < 4:
        return head + f"prmt.b32 $0, {words[0]}, {words[-1]}, s;\n}}"
    return head + (
        ".reg .b32 low, high, mask;\nand.b32 s, s, 0x7777;\n"
        f"prmt.b32 low, {words[0]}, {words[1]}, s;\nprmt.b32 high, {words[2]}, {words[3]}, s;\n"
        "shl.b32 mask, $1, 4;\nprmt.b32 mask, mask, 0, 0xba98;\n"
        "lop3.b32 $0, mask, high, low, 0xca;\n}"
    )


_LOOKUP_2 = tl.constexpr(_lookup(2))
_LOOKUP_3 = tl.constexpr(_lookup(3))
_LOOKUP_4 = tl.constexpr(_lookup(4))


@triton.jit
def transform(
    x, channel_scale, transformed, token_scale, tokens, x_stride, k_stride,
    IN: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One rotation block of M tokens: transformed [tokens, PADDED] * token_scale [tokens, PADDED / BLOCK] = T(x)."""
    block = tl.program_id(0)
    token = tl.program_id(1) * M + tl.arange(0, M)
    i = tl.arange(0, BLOCK)
    k = block * BLOCK + i
    inside = (token[:, None] < tokens) & (k[None, :] < IN)
    values = tl.load(x + token[:, None].to(tl.int64) * x_stride + k[None, :] * k_stride, mask=inside, other=0.0)
    byte = tl.load(channel_scale + k, mask=k < IN, other=0)
    a = (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)  # e5m2 is the upper half of a float16
    t = values.to(tl.float32) * a[None, :]
    if ROTATE:
        v = i[:, None] & i[None, :]
        v = v ^ (v >> 4)
        v = v ^ (v >> 2)
        v = v ^ (v >> 1)
        signs = (1 - 2 * (v & 1)).to(tl.float32)
        norm: tl.constexpr = BLOCK**-0.5
        t = tl.dot(t, signs, input_precision=PRECISION) * norm
    scale = tl.full([M], 1.0, tl.float32)
    if not EXACT:
        most = tl.max(tl.abs(t), 1)
        scale = (most.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^e <= most
        scale = tl.maximum(scale, 7.5e-37)
        t = t / scale[:, None]
    tl.store(
        transformed + token[:, None].to(tl.int64) * PADDED + k[None, :],
        t.to(transformed.dtype.element_ty),
        mask=token[:, None] < tokens,
    )
    tl.store(token_scale + token * (PADDED // BLOCK) + block, scale, mask=token < tokens)


@triton.jit
def _plane(base, ok, WIDTH: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr):
    """The fields of one plane: bytes [N, TILE * WIDTH / 8] -> uint8 [N, TILE]."""
    PER: tl.constexpr = 8 // WIDTH
    packed = tl.load(base[:, None] + tl.arange(0, TILE // PER)[None, :], mask=ok[:, None], other=0)
    if PER == 1:
        fields = packed
    else:
        shifts = (tl.arange(0, PER) * WIDTH).to(tl.uint8)
        fields = (packed[:, :, None] >> shifts[None, None, :]) & (2**WIDTH - 1)
        fields = tl.reshape(fields, (N, TILE))
    return fields


@triton.jit
def _levels(packed, row, ok, k, tables, BITS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
            TILE: tl.constexpr, PERMUTE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """level[code] of rows and inputs [k, k + TILE): [N, TILE]."""
    within = k % GROUP
    group = packed + row * (PADDED * BITS // 8) + k // GROUP * (GROUP * BITS // 8)
    if BITS == 3:
        codes = _plane(group + within // 4, ok, 2, TILE, N)
        codes = codes | (_plane(group + GROUP // 4 + within // 8, ok, 1, TILE, N) << 2)
    elif BITS == 5:
        codes = _plane(group + within // 2, ok, 4, TILE, N)
        codes = codes | (_plane(group + GROUP // 2 + within // 8, ok, 1, TILE, N) << 4)
    elif BITS == 6:
        codes = _plane(group + within // 2, ok, 4, TILE, N)
        codes = codes | (_plane(group + GROUP // 2 + within // 4, ok, 2, TILE, N) << 4)
    else:
        codes = _plane(group + within * BITS // 8, ok, BITS, TILE, N)
    if BITS == 8:
        found = (codes ^ 0x80).to(tl.int8, bitcast=True)
    elif PERMUTE and BITS == 2:
        found = tl.inline_asm_elementwise(_LOOKUP_2, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    elif PERMUTE and BITS == 3:
        found = tl.inline_asm_elementwise(_LOOKUP_3, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    elif PERMUTE and BITS == 4:
        found = tl.inline_asm_elementwise(_LOOKUP_4, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    else:  # the tables of 2, 3, ... bits follow one another
        found = tl.load(tables + (2**BITS - 4) + codes.to(tl.int32))
    return found


@triton.jit
def _times(total, t, packed, scales, row, ok, k, tables, BITS: tl.constexpr, PADDED: tl.constexpr,
           GROUP: tl.constexpr, TILE: tl.constexpr, EXACT: tl.constexpr, PERMUTE: tl.constexpr,
           N: tl.constexpr):  # fmt: skip
    """total + weight_scale * (levels t) of one pass and one tile: [N, M]."""
    found = _levels(packed, row, ok, k, tables, BITS, PADDED, GROUP, TILE, PERMUTE, N)
    weight_scale = tl.load(scales + row * (PADDED // GROUP) + k // GROUP, mask=ok, other=0.0).to(tl.float32)
    sums = tl.dot(found.to(t.dtype), t, input_precision="ieee" if EXACT else "tf32")
    return total + sums * weight_scale[:, None]


@triton.jit
def product(
    transformed, token_scale, packed0, packed1, packed2, packed3, scales0, scales1, scales2, scales3, tables, bias, y,
    tokens, out, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
    EXACT: tl.constexpr, PERMUTE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y [SPLIT, tokens, out]: each part the sum over 1 / SPLIT of the inputs (SPLIT 1: with the bias)."""
    row = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    token = tl.program_id(1) * M + tl.arange(0, M)
    part = tl.program_id(2)
    ok, present = row < out, token < tokens
    inputs = tl.arange(0, TILE)
    x = transformed + token[None, :].to(tl.int64) * PADDED + inputs[:, None]
    total = tl.zeros([N, M], tl.float32)
    for step in range(PADDED // TILE // SPLIT):
        k = (part * (PADDED // TILE // SPLIT) + step) * TILE
        t = tl.load(x + k, mask=present[None, :], other=0.0)
        sums = tl.zeros([N, M], tl.float32)
        sums = _times(sums, t, packed0, scales0, row, ok, k, tables, B0, PADDED, GROUP, TILE, EXACT, PERMUTE, N)
        if B1 > 0:
            sums = _times(sums, t, packed1, scales1, row, ok, k, tables, B1, PADDED, GROUP, TILE, EXACT, PERMUTE, N)
        if B2 > 0:
            sums = _times(sums, t, packed2, scales2, row, ok, k, tables, B2, PADDED, GROUP, TILE, EXACT, PERMUTE, N)
        if B3 > 0:
            sums = _times(sums, t, packed3, scales3, row, ok, k, tables, B3, PADDED, GROUP, TILE, EXACT, PERMUTE, N)
        total += sums * tl.load(token_scale + token * (PADDED // BLOCK) + k // BLOCK, mask=present, other=0.0)[None, :]
    if BIAS and SPLIT == 1:
        total += tl.load(bias + row, mask=ok, other=0.0).to(tl.float32)[:, None]
    to = y + part.to(tl.int64) * tokens * out + token[None, :].to(tl.int64) * out + row[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=ok[:, None] & present[None, :])
