"""Attention of one new token to a static cache, for gpu_model.py: rotary positions, cache and attention in two kernels.

Inference engines have such a kernel; torch's parts take longer than a layer's 4-bit products. Each program takes a
chunk of one key head's places for the query heads that share it, and a second kernel adds the chunks up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 16  # rows of a product: the query heads of one key head, and padding


@triton.jit
def _turned(x, at, width: tl.constexpr, cos, sin):
    """Both halves of the heads at `at` with their position."""
    a, b = tl.load(x + at).to(tl.float32), tl.load(x + at + width).to(tl.float32)
    return (a * cos - b * sin).to(x.dtype.element_ty), (b * cos + a * sin).to(x.dtype.element_ty)


@triton.jit
def _chunk(
    qkv, position, cache, partial, most, total, places, heads: tl.constexpr, kv_heads: tl.constexpr,
    head: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr, queries: tl.constexpr,
):  # fmt: skip
    sequence, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = heads // kv_heads
    half: tl.constexpr = head // 2
    here = tl.load(position).to(tl.int32)
    column, row = tl.arange(0, half), tl.arange(0, queries)
    angle = here.to(tl.float32) * tl.exp2(column.to(tl.float32) * (-18.931568569324174 / half))  # log2 of 500,000
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    x = qkv + sequence * (heads + 2 * kv_heads) * head
    q0, q1 = _turned(x, (kv * group + row % group)[:, None] * head + column[None, :], half, cos, sin)
    keys = cache + (sequence * 2 * kv_heads + kv) * places * head
    values = keys + kv_heads * places * head
    begin = part * chunk
    if (begin <= here) & (here < begin + chunk):
        one = tl.arange(0, 1)[:, None]
        k0, k1 = _turned(x, (heads + kv + one) * head + column[None, :], half, cos, sin)
        at = (here + one) * head + column[None, :]
        new = x + (heads + kv_heads + kv + one) * head + column[None, :]
        tl.store(keys + at, k0)
        tl.store(keys + at + half, k1)
        tl.store(values + at, tl.load(new))
        tl.store(values + at + half, tl.load(new + half))
        tl.debug_barrier()
    m = tl.full([queries], -float("inf"), tl.float32)
    s = tl.zeros([queries], tl.float32)
    y0, y1 = tl.zeros([queries, half], tl.float32), tl.zeros([queries, half], tl.float32)
    for step in range(0, chunk if begin <= here else 0, block):
        place = begin + step + tl.arange(0, block)
        at = place[:, None] * head + column[None, :]
        seen = (place <= here)[:, None]
        k0, k1 = tl.load(keys + at, seen, 0.0), tl.load(keys + at + half, seen, 0.0)
        scores = (tl.dot(q0, tl.trans(k0)) + tl.dot(q1, tl.trans(k1))) * (head**-0.5)
        scores = tl.where((place <= here)[None, :], scores, -float("inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        keep = tl.exp(m - new_m)
        p = tl.exp(scores - new_m[:, None])
        m, s = new_m, s * keep + tl.sum(p, 1)
        p = p.to(x.dtype.element_ty)
        y0 = y0 * keep[:, None] + tl.dot(p, tl.load(values + at, seen, 0.0))
        y1 = y1 * keep[:, None] + tl.dot(p, tl.load(values + at + half, seen, 0.0))
    out = ((sequence * heads + kv * group + row) * tl.num_programs(2)) + part
    mine = row < group
    tl.store(most + out, m, mine)
    tl.store(total + out, s, mine)
    to = partial + out[:, None] * head + column[None, :]
    tl.store(to, y0, mine[:, None])
    tl.store(to + half, y1, mine[:, None])


@triton.jit
def _add_up(partial, most, total, y, parts: tl.constexpr, head: tl.constexpr):
    row, part, column = tl.program_id(0), tl.arange(0, parts), tl.arange(0, head)
    m = tl.load(most + row * parts + part)
    weight = tl.exp(m - tl.max(m, 0))
    s = tl.sum(weight * tl.load(total + row * parts + part), 0)
    values = tl.load(partial + (row * parts + part)[:, None] * head + column[None, :])
    tl.store(y + row * head + column, tl.sum(values * weight[:, None], 0) / s)


def attend_to_cache(qkv: Tensor, position: Tensor, cache: Tensor) -> Tensor:
    """qkv: [batch, heads + 2 kv_heads, head] of the token at `position` [1]; cache: [batch, 2 kv_heads, places, head].

    Writes the token's key and value into the cache; returns [batch, heads, head].
    """
    batch, rows, head = qkv.shape
    kv_heads, places = cache.shape[1] // 2, cache.shape[2]
    heads = rows - 2 * kv_heads
    chunk = 64 if batch * kv_heads < 64 else 256
    parts = places // chunk
    partial = torch.empty(batch * heads, parts, head, device=qkv.device)
    most, total = torch.empty(2, batch * heads, parts, device=qkv.device)
    _chunk[(batch, kv_heads, parts)](
        qkv, position, cache, partial, most, total, places, heads, kv_heads, head, chunk, 64, QUERIES
    )
    y = torch.empty(batch, heads, head, device=qkv.device, dtype=qkv.dtype)
    _add_up[(batch * heads,)](partial, most, total, y, parts, head)
    return y
