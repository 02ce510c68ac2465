"""Whole decoders on a GPU, bfloat16 against 4 bits: results/gpu_model.json.

    python benchmarks/gpu_model.py [-o benchmarks/results/gpu_model.json]

Random weights in the shapes below; q/k/v and gate/up are one matrix each, in both precisions, as inference engines have
them. 4-bit: every linear of the layers at 4 bits, embedding and lm_head at 8. Decode: a static cache, one CUDA graph
for a whole step, argmax included; what stands between the products is the same in both (decode_parts.py, in prefill
torch's compiler). Prefill: eager, 2,048 tokens.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import decode_parts
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional

from tqw.config import QuantConfig
from tqw.kernels import cuda
from tqw.layer import QuantizedEmbedding, QuantizedLinear
from tqw.report import document, write_json
from tqw.weight import quantize

torch._dynamo.config.recompile_limit = 64  # the shapes of two models, three batches
CACHE, START, PROMPT, STEPS = 1024, 512, 2048, 64  # decode begins behind START tokens


@dataclass(frozen=True)
class Shape:
    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    tied: bool


SHAPES = (
    Shape("Llama-3-8B", 128256, 4096, 14336, 32, 32, 8, 128, False),
    Shape("Qwen3-4B", 151936, 2560, 9728, 36, 32, 8, 128, True),
)


@torch.compile(dynamic=False)
def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The new residual and its RMS norm."""
    total = x + residual
    wide = total.float()
    return total, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


@torch.compile(dynamic=False)
def rope(x: Tensor, positions: Tensor) -> Tensor:
    """x: [batch, tokens, heads, head]; positions: [tokens]."""
    half = x.shape[-1] // 2
    frequency = 5e5 ** (-torch.arange(half, device=x.device) / half)
    angle = (positions[:, None] * frequency)[:, None]
    cos, sin, wide = angle.cos(), angle.sin(), x.float()
    a, b = wide[..., :half], wide[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@torch.compile(dynamic=False)
def rotate_heads(qkv: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
    """Queries and keys with their positions, values as they are: [batch, heads, tokens, head]."""
    turned, v = qkv.split([qkv.shape[2] - kv_heads, kv_heads], 2)
    return torch.cat([rope(turned, positions), v], 2).transpose(1, 2)


def check_parts() -> None:
    """The kernels of decode_parts.py against the definitions, before anything is timed with them."""
    x, residual = torch.randn(2, 16, 1, 2560, device="cuda").bfloat16()
    weight = torch.randn(2560, device="cuda").bfloat16()
    for found, expected in zip(
        decode_parts.add_and_norm(x, residual, weight), add_and_norm(x, residual, weight), strict=True
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(decode_parts.silu_and_multiply(x), silu_and_multiply(x))
    position = torch.full((1,), START, device="cuda")
    for batch in (1, 16):
        qkv = torch.randn(batch, 32 + 16, 128, device="cuda").bfloat16()
        cache = torch.randn(batch, 16, CACHE, 128, device="cuda").bfloat16()
        turned = rope(qkv[:, None], position)[:, 0]
        y = decode_parts.attend_to_cache(qkv, position, cache)
        torch.testing.assert_close(cache[:, :8, START], turned[:, 32:40], rtol=2e-2, atol=2e-2)
        assert torch.equal(cache[:, 8:, START], qkv[:, 40:])
        keys, values = cache[:, :, : START + 1].float().repeat_interleave(4, 1).chunk(2, 1)
        expected = (turned[:, :32, None].float() @ keys.mT / 128**0.5).softmax(-1) @ values
        assert (y - expected[:, :, 0]).abs().max() < 2e-2 * expected.abs().max()
        logits, ids = torch.randn(batch, 128256, device="cuda").bfloat16(), torch.zeros(batch, 1, device="cuda").long()
        moved = position.clone()
        decode_parts.next_token(logits, ids, moved)
        assert torch.equal(logits.gather(1, ids)[:, 0], logits.amax(1))
        assert torch.equal(moved, position + 1)


@torch.compile(dynamic=False)
def silu_and_multiply(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def dense(out_features: int, in_features: int) -> Tensor:
    return torch.empty(out_features, in_features, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)


def linear(out_features: int, in_features: int, bits: int | None) -> nn.Module:
    weight = dense(out_features, in_features)
    if bits:
        return QuantizedLinear(quantize(weight, QuantConfig(bits=bits, scale="norm")))
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Layer(nn.Module):
    """One decoder layer; its static cache is [batch, 2 kv_heads, CACHE, head]: keys, then values."""

    def __init__(self, shape: Shape, bits: int | None) -> None:
        super().__init__()
        self.shape, width = shape, shape.heads * shape.head
        self.qkv = linear(width + 2 * shape.kv_heads * shape.head, shape.hidden, bits)
        self.o = linear(shape.hidden, width, bits)
        self.gate_up = linear(2 * shape.intermediate, shape.hidden, bits)
        self.down = linear(shape.hidden, shape.intermediate, bits)
        self.norms = torch.ones(2, shape.hidden, device="cuda", dtype=torch.bfloat16)

    def attend(self, x: Tensor, positions: Tensor, cache: Tensor | None) -> Tensor:
        s = self.shape
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, -1, s.head)
        if cache is None:
            qkv = rotate_heads(qkv, positions, s.kv_heads)
            q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            y = decode_parts.attend_to_cache(qkv[:, 0], positions, cache)
        return self.o(y.reshape(batch, tokens, -1))

    def forward(self, x: Tensor, residual: Tensor, positions: Tensor, cache: Tensor | None):
        add = add_and_norm if cache is None else decode_parts.add_and_norm
        activate = silu_and_multiply if cache is None else decode_parts.silu_and_multiply
        residual, x = add(x, residual, self.norms[0])
        x = self.attend(x, positions, cache)
        residual, x = add(x, residual, self.norms[1])
        return self.down(activate(self.gate_up(x))), residual


class Decoder(nn.Module):
    def __init__(self, shape: Shape, bits: int | None, edge_bits: int | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, bits) for _ in range(shape.layers))
        self.head = linear(shape.vocabulary, shape.hidden, edge_bits)
        table = self.head if shape.tied else linear(shape.vocabulary, shape.hidden, edge_bits)
        if isinstance(table, QuantizedLinear):
            self.embedding: nn.Module = QuantizedEmbedding(table.quantized_weight, output_dtype=torch.bfloat16)
        else:
            self.embedding = nn.Embedding(1, 1, device="meta")
            self.embedding.weight = table.weight
        self.norm = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)

    def forward(self, ids: Tensor, positions: Tensor, caches: list[Tensor] | None) -> Tensor:
        """Logits of the last token: [batch, vocabulary]."""
        x = self.embedding(ids)
        residual = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, positions, None if caches is None else caches[i])
        add = add_and_norm if caches is None else decode_parts.add_and_norm
        _, x = add(x[:, -1], residual[:, -1], self.norm)
        return self.head(x)


def median_milliseconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


def settle(call: Callable[[], Any], seconds: float = 2.0) -> None:
    """Call for a while: the clocks of a GPU that comes from other work, or from none, are not those of this one."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        torch.cuda.synchronize()


def decode_milliseconds(model: Decoder, shape: Shape, batch: int) -> float:
    """One step of all sequences: embedding to argmax, replayed as a CUDA graph that moves on by one token."""
    size = (batch, 2 * shape.kv_heads, CACHE, shape.head)
    caches = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(shape.layers)]
    ids = torch.randint(0, shape.vocabulary, (batch, 1), device="cuda")
    position = torch.full((1,), START, device="cuda")

    def step() -> None:
        decode_parts.next_token(model(ids, position, caches), ids, position)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def steps() -> None:
        position.fill_(START)
        for _ in range(STEPS):
            graph.replay()

    settle(steps)
    position.fill_(START)
    return median_milliseconds(graph.replay, STEPS)


def prefill_graph_milliseconds(model: Decoder, ids: Tensor, positions: Tensor) -> float:
    """Prefill without the time that Python needs to launch it."""
    model(ids, positions, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(ids, positions, None)
    return median_milliseconds(graph.replay, 9)


def exact_milliseconds(call: Callable[[], float]) -> float:
    """With inputs and weights that are not rounded to 8 bits."""
    cuda.forget()
    with mock.patch.object(cuda, "_activations", return_value="exact"):
        milliseconds = call()
    cuda.forget()
    return milliseconds


@torch.inference_mode()
def measure(shape: Shape, bits: int | None) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    gc.collect()
    torch.cuda.empty_cache()
    model = Decoder(shape, bits, 8 if bits else None)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    rows = []
    ids = torch.randint(0, shape.vocabulary, (1, PROMPT), device="cuda")
    positions = torch.arange(PROMPT, device="cuda")
    calls = {
        "decode, batch 1": (1, lambda: decode_milliseconds(model, shape, 1)),
        "decode, batch 16": (16, lambda: decode_milliseconds(model, shape, 16)),
        "prefill, 2048 tokens": (PROMPT, lambda: median_milliseconds(lambda: model(ids, positions, None), 9)),
        "prefill, 2048 tokens, CUDA graph": (PROMPT, lambda: prefill_graph_milliseconds(model, ids, positions)),
    }
    if bits:
        calls["prefill, 2048 tokens, 16-bit activations, CUDA graph"] = (
            PROMPT,
            lambda: exact_milliseconds(lambda: prefill_graph_milliseconds(model, ids, positions)),
        )
    for what, (tokens, call) in calls.items():
        milliseconds = call()
        row = {
            "model": shape.name, "bits": bits or 16, "what": what, "milliseconds": milliseconds,
            "tokens_per_second": tokens / milliseconds * 1e3, "weight_bytes": weights,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        }  # fmt: skip
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu_model.json"))
    output = parser.parse_args().output
    check_parts()
    rows = []
    for shape in SHAPES:
        rows += [row for bits in (None, 4) for row in measure(shape, bits)]
        result = document(rows, shapes=[asdict(shape) for shape in SHAPES])
        write_json(output, result)


if __name__ == "__main__":
    main()
