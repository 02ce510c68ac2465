"""What stands between the products of one new token, for gpu_model.py: norm, attention to a static cache, SiLU.

Inference engines have such kernels; torch's parts take longer than a layer's 4-bit products. Attention: each program
takes a chunk of one key head's places for the query heads that share it, and a second kernel adds the chunks up.
Each lets the next kernel begin when the one before has ended (programmatic dependent launch), as far as that does not
need its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # places of one program
VALUES = 1024  # of a row of logits that one program sees
QUERIES = 16  # rows of a product: the query heads of one key head, and padding


@triton.jit
def _begin():
    """Wait for the kernel before, let the next one of the stream start."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _turned(x, at, width: tl.constexpr, cos, sin):
    """Both halves of the heads at `at` with their position."""
    a, b = tl.load(x + at).to(tl.float32), tl.load(x + at + width).to(tl.float32)
    return (a * cos - b * sin).to(x.dtype.element_ty), (b * cos + a * sin).to(x.dtype.element_ty)


@triton.jit
def _chunk(
    qkv, position, cache, partial, most, total, places, heads: tl.constexpr, kv_heads: tl.constexpr,
    head: tl.constexpr, chunk: tl.constexpr, queries: tl.constexpr,
):  # fmt: skip
    sequence, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = heads // kv_heads
    half: tl.constexpr = head // 2
    here = tl.load(position).to(tl.int32)
    column, row = tl.arange(0, half), tl.arange(0, queries)
    keys = cache + (sequence * 2 * kv_heads + kv) * places * head
    values = keys + kv_heads * places * head
    place = part * chunk + tl.arange(0, chunk)
    at, old = place[:, None] * head + column[None, :], (place < here)[:, None]
    # the places of earlier steps do not wait for this step's token
    k0, k1 = tl.load(keys + at, old, 0.0), tl.load(keys + at + half, old, 0.0)
    v0, v1 = tl.load(values + at, old, 0.0), tl.load(values + at + half, old, 0.0)
    angle = here.to(tl.float32) * tl.exp2(column.to(tl.float32) * (-18.931568569324174 / half))  # log2 of 500,000
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    _begin()
    x = qkv + sequence * (heads + 2 * kv_heads) * head
    q0, q1 = _turned(x, (kv * group + row % group)[:, None] * head + column[None, :], half, cos, sin)
    if (part * chunk <= here) & (here < (part + 1) * chunk):
        one = tl.arange(0, 1)[:, None]
        new_k0, new_k1 = _turned(x, (heads + kv + one) * head + column[None, :], half, cos, sin)
        new = x + (heads + kv_heads + kv + one) * head + column[None, :]
        new_v0, new_v1 = tl.load(new), tl.load(new + half)
        to, is_new = (here + one) * head + column[None, :], (place == here)[:, None]
        tl.store(keys + to, new_k0)
        tl.store(keys + to + half, new_k1)
        tl.store(values + to, new_v0)
        tl.store(values + to + half, new_v1)
        k0, k1 = tl.where(is_new, new_k0, k0), tl.where(is_new, new_k1, k1)
        v0, v1 = tl.where(is_new, new_v0, v0), tl.where(is_new, new_v1, v1)
    scores = (tl.dot(q0, tl.trans(k0)) + tl.dot(q1, tl.trans(k1))) * (head**-0.5)
    scores = tl.where((place <= here)[None, :], scores, -float("inf"))
    m = tl.maximum(tl.max(scores, 1), -1e30)
    p = tl.exp(scores - m[:, None])
    out = ((sequence * heads + kv * group + row) * tl.num_programs(2)) + part
    mine = row < group
    tl.store(most + out, m, mine)
    tl.store(total + out, tl.sum(p, 1), mine)
    p = p.to(x.dtype.element_ty)
    to = partial + out[:, None] * head + column[None, :]
    tl.store(to, tl.dot(p, v0), mine[:, None])
    tl.store(to + half, tl.dot(p, v1), mine[:, None])


@triton.jit
def _add_up(partial, most, total, y, parts: tl.constexpr, head: tl.constexpr):
    _begin()
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
    parts = places // CHUNK
    partial = torch.empty(batch * heads, parts, head, device=qkv.device)
    most, total = torch.empty(2, batch * heads, parts, device=qkv.device)
    _chunk[(batch, kv_heads, parts)](
        qkv, position, cache, partial, most, total, places, heads, kv_heads, head, CHUNK, QUERIES, launch_pdl=True
    )
    y = torch.empty(batch, heads, head, device=qkv.device, dtype=qkv.dtype)
    _add_up[(batch * heads,)](partial, most, total, y, parts, head, launch_pdl=True)
    return y


@triton.jit
def _add_and_norm(x, residual, weight, total, y, width: tl.constexpr, block: tl.constexpr):
    column = tl.arange(0, block)
    gain = tl.load(weight + column, column < width)
    _begin()
    at, real = tl.program_id(0) * width + column, column < width
    new = tl.load(x + at, real, 0.0) + tl.load(residual + at, real, 0.0)
    tl.store(total + at, new, real)
    wide = new.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / width + 1e-6)
    tl.store(y + at, wide.to(new.dtype) * gain, real)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The new residual and its RMS norm."""
    width = x.shape[-1]
    total, y = torch.empty_like(x), torch.empty_like(x)
    _add_and_norm[(x.numel() // width,)](
        x, residual, weight, total, y, width, triton.next_power_of_2(width), num_warps=8, launch_pdl=True
    )
    return total, y


@triton.jit
def _silu_and_multiply(x, y, width, block: tl.constexpr):
    _begin()
    row, column = tl.program_id(1), tl.program_id(0) * block + tl.arange(0, block)
    gate = tl.load(x + row * 2 * width + column, column < width, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + column, column < width, 0.0)
    tl.store(y + row * width + column, (gate / (1 + tl.exp(-gate))).to(up.dtype) * up, column < width)


def silu_and_multiply(x: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate, up]."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    _silu_and_multiply[(triton.cdiv(width, 512), rows)](x, y, width, 512, num_warps=4, launch_pdl=True)
    return y


@triton.jit
def _best_of_part(logits, best, at, width, part: tl.constexpr):
    _begin()
    row, column = tl.program_id(0), tl.program_id(1) * part + tl.arange(0, part)
    values = tl.load(logits + row * width + column, column < width, -float("inf")).to(tl.float32)
    to = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best + to, tl.max(values, 0))
    tl.store(at + to, tl.program_id(1) * part + tl.argmax(values, 0))


@triton.jit
def _best_part(best, at, ids, position, parts, block: tl.constexpr):
    _begin()
    row, part = tl.program_id(0), tl.arange(0, block)
    values = tl.load(best + row * parts + part, part < parts, -float("inf"))
    tl.store(ids + row, tl.load(at + row * parts + tl.argmax(values, 0)))
    if row == 0:
        tl.store(position, tl.load(position) + 1)


def next_token(logits: Tensor, ids: Tensor, position: Tensor) -> None:
    """ids [batch, 1] = argmax of logits [batch, vocabulary]; position [1] moves on by one.

    In two steps, as torch's own argmax takes a row of a vocabulary in a single block.
    """
    rows, width = logits.shape
    parts = triton.cdiv(width, VALUES)
    best = torch.empty(rows, parts, device=logits.device)
    at = torch.empty(rows, parts, device=logits.device, dtype=torch.int64)
    _best_of_part[(rows, parts)](logits, best, at, width, VALUES, launch_pdl=True)
    _best_part[(rows,)](best, at, ids, position, parts, triton.next_power_of_2(parts), launch_pdl=True)
