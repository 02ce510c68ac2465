"""Device code of the cuTile backend: T(x) = H (a * x), and one pass of y = T(x) V^T from packed codes."""

import cuda.tile as ct

Constant = ct.Constant[int]
ZERO = ct.PaddingMode.ZERO


def halves(t):
    """t = high + rest to 22 bits, each of the 11 bits that the tensor cores take of a float32."""
    high = t.astype(ct.tfloat32)
    return high, (t - high.astype(ct.float32)).astype(ct.tfloat32)


@ct.kernel(num_worker_warps=8)
def transform(x, channel_scale, signs, transformed, token_scale, BLOCK: Constant, ROTATE: Constant, M: Constant):
    """One rotation block of M tokens: transformed [tokens, padded] * token_scale [tokens, padded / BLOCK] = T(x)."""
    block, token = ct.bid(0), ct.bid(1)
    values = ct.load(x, (token, block), (M, BLOCK), padding_mode=ZERO).astype(ct.float32)
    byte = ct.load(channel_scale, (block,), (BLOCK,), padding_mode=ZERO)
    a = ct.bitcast(byte.astype(ct.uint16) << 8, ct.float16)  # e5m2 is the upper half of a float16
    t = values * a.astype(ct.float32).reshape((1, BLOCK))
    if ROTATE:
        h = ct.load(signs, (0, 0), (BLOCK, BLOCK)).astype(ct.tfloat32)
        high, rest = halves(t)
        t = ct.mma(rest, h, ct.mma(high, h, ct.zeros((M, BLOCK), ct.float32))) * BLOCK**-0.5
    if transformed.dtype != ct.float32:
        most = ct.max(ct.abs(t), 1, keepdims=True)
        scale = ct.bitcast(ct.bitcast(most, ct.uint32) & 0x7F800000, ct.float32)  # 2^e <= most
        scale = ct.maximum(scale, 7.5e-37)
        t = t / scale
        ct.store(token_scale, (token, block), scale)
    ct.store(transformed, (token, block), t.astype(transformed.dtype))


def fields(plane, row, group, part, WIDTH, COUNT, N):
    """Fields of WIDTH bits from one plane [out, groups, bytes]: int32 [N, COUNT]."""
    PER = 8 // WIDTH
    packed = ct.load(plane, (row, group, part), (N, 1, COUNT // PER)).astype(ct.int32)
    shifts = ct.arange(PER, dtype=ct.int32) * WIDTH
    return ((packed.reshape((N, COUNT // PER, 1)) >> shifts.reshape((1, 1, PER))) & (2**WIDTH - 1)).reshape((N, COUNT))


@ct.kernel(num_worker_warps=4, occupancy=2)  # the fastest on an H100: benchmarks/cutile.py
def product(
    transformed, token_scale, low, high, weight_scale, table, bias, y: ct.IndexedWithInt64,
    LOW: Constant, HIGH: Constant, EACH: Constant, BLOCK: Constant, GROUP: Constant, TILE: Constant, STEPS: Constant,
    BIAS: Constant, M: Constant, N: Constant,
):  # fmt: skip
    """y [split, tokens, out]: each part the sum over STEPS tiles of the inputs. low, high: planes of the codes.

    table: fp16 levels by a code; where EACH is 2, pairs of them in an int32 by a pair of codes.
    """
    row, token, part = ct.bid(0), ct.bid(1), ct.bid(2)
    total = ct.zeros((N, M), ct.float32)
    for step in range(STEPS):
        tile = part * STEPS + step
        group, within = tile // (GROUP // TILE), tile % (GROUP // TILE)
        codes = fields(low, row, group, within, LOW * EACH, TILE // EACH, N)
        if HIGH:
            codes = codes | (fields(high, row, group, within, HIGH * EACH, TILE // EACH, N) << (LOW * EACH))
        levels = ct.gather(table, codes, check_bounds=False)
        if EACH == 2:
            levels = ct.unpack_from_bytes(ct.pack_to_bytes(levels), ct.float16).reshape((N, TILE))
        t = ct.load(transformed, (tile, token), (TILE, M), order=(1, 0))
        if transformed.dtype == ct.float32:
            high_half, rest = halves(t)
            levels = levels.astype(ct.tfloat32)
            sums = ct.mma(levels, rest, ct.mma(levels, high_half, ct.zeros((N, M), ct.float32)))
        else:
            sums = ct.mma(levels, t, ct.zeros((N, M), ct.float32))
        sums = sums * ct.load(weight_scale, (row, group), (N, 1)).astype(ct.float32)
        if transformed.dtype != ct.float32:
            sums = sums * ct.load(token_scale, (tile // (BLOCK // TILE), token), (1, M), order=(1, 0))
        total = total + sums
    if BIAS:
        total = total + ct.load(bias, (row,), (N,)).astype(ct.float32).reshape((N, 1))
    ct.store(y, (part, token, row), total.transpose().reshape((1, M, N)).astype(y.dtype))


@ct.kernel
def add_up(parts: ct.IndexedWithInt64, bias, y: ct.IndexedWithInt64, PARTS: Constant, BIAS: Constant, N: Constant):
    """y [1, tokens, out] = sum of parts [PARTS, tokens, out] + bias."""
    token, row = ct.bid(0), ct.bid(1)
    total = ct.zeros((1, 1, N), ct.float32)
    for part in range(PARTS):
        total = total + ct.load(parts, (part, token, row), (1, 1, N))
    if BIAS:
        total = total + ct.load(bias, (row,), (N,)).astype(ct.float32).reshape((1, 1, N))
    ct.store(y, (0, token, row), total.astype(y.dtype))
