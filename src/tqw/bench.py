"""Times of the linear op against torch's own, with the measured read bandwidth as the limit: `tqw bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tqw import kernels
from tqw.config import QuantConfig, parse_bits
from tqw.errors import TqwError
from tqw.peers import CPU_PEERS
from tqw.weight import QuantizedWeight, dequantize, quantize

DEFAULT_SHAPES = ("576x576", "1536x576", "576x1536", "1024x1024", "3072x1024", "4096x4096")
_SECONDS, _LEAST_RUNS, _TURN = 0.3, 5, 8
_COLD_BYTES, _MOST_COPIES = 96 << 20, 32
_BANDWIDTH_BYTES = 256 << 20


def parse_shape(text: str) -> tuple[int, int]:
    """ "NxK" -> (out_features, in_features)."""
    try:
        out_features, in_features = (int(part) for part in text.lower().split("x"))
    except ValueError:
        out_features = in_features = 0
    if out_features < 1 or in_features < 1:
        raise TqwError(f"expected a shape as NxK (out_features x in_features), for example 4096x4096, got {text!r}")
    return out_features, in_features


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(nbytes: int) -> int:
    """How many copies of a weight keep it out of the caches between two calls, as the rest of a model would."""
    return max(1, min(_MOST_COPIES, _COLD_BYTES // max(nbytes, 1)))


def _interleaved_medians(calls: dict[str, list[Callable[[], Any]]], device: torch.device) -> dict[str, float]:
    """Median seconds of each method. Methods take turns, so that a change in the machine's speed meets all; a turn is a
    pause (threads that spin go to sleep), one call that is not counted, and some that are, each on the next copy."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    positions = dict.fromkeys(calls, 0)
    began = time.perf_counter()
    while len(times[next(iter(calls))]) < _LEAST_RUNS or time.perf_counter() - began < _SECONDS * len(calls):
        for name, copies in calls.items():
            time.sleep(0.01)
            turn_began = time.perf_counter()
            for run in range(_TURN + 1):
                call = copies[positions[name] % len(copies)]
                positions[name] += 1
                _synchronize(device)
                start = time.perf_counter()
                call()
                _synchronize(device)
                if run:
                    times[name].append(time.perf_counter() - start)
                if run and time.perf_counter() - turn_began > 0.2:
                    break
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def read_bandwidth(device: torch.device) -> float:
    """Gigabytes per second that a sum over 256 MiB of int64 reads: the best of 5."""
    data = torch.ones(_BANDWIDTH_BYTES // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(6):
        _synchronize(device)
        start = time.perf_counter()
        data.sum()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return _BANDWIDTH_BYTES / best / 1e9


def _relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Method:
    """One way to compute the layer: copies of its call, what it reads, its bits per weight, the error allowed.

    float32 accumulates in_features terms; bfloat16 rounds inputs, weights and output to 2^-9 each; int8 activations add
    about 1 %; peers round the dense weight to 4 bits themselves.
    """

    name: str
    calls: list[Callable[[Tensor], Tensor]]
    dtype: torch.dtype
    nbytes: int
    bits: float
    limit: float


def _linear_by(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.linear(x, weight)


def _quantized_by(qw: QuantizedWeight) -> Callable[[Tensor], Tensor]:
    return lambda x: kernels.linear(x, qw)


def methods(qw: QuantizedWeight, dense: Tensor, with_peers: bool = True) -> list[Method]:
    """tqw, torch and, on the CPU, every installed peer that can do this shape."""
    count, size = _copies(qw.nbytes()), dense.numel()
    found = [
        Method(
            "tqw",
            [_quantized_by(_clone(qw)) for _ in range(count)],
            torch.float32,
            qw.nbytes(),
            qw.bits_per_weight(),
            2e-2,
        )
    ]
    for name, dtype, limit in (("torch_float32", torch.float32, 1e-5), ("torch_bfloat16", torch.bfloat16, 2e-2)):
        weight = dense.to(dtype)
        clones = [_linear_by(weight.clone()) for _ in range(_copies(weight.nbytes))]
        found.append(Method(name, clones, dtype, weight.nbytes, 8 * weight.element_size(), limit))
    if with_peers and dense.device.type == "cpu":
        for name, (make, dtype) in CPU_PEERS.items():
            try:
                made = [make(dense) for _ in range(_copies(size // 2))]
            except (ImportError, OSError, TqwError):
                continue
            bits = made[0][1]
            found.append(Method(name, [call for call, _ in made], dtype, int(size * bits / 8), bits, 0.25))
    return found


def _clone(qw: QuantizedWeight) -> QuantizedWeight:
    return replace(
        qw, packed=tuple(t.clone() for t in qw.packed), weight_scale=tuple(t.clone() for t in qw.weight_scale)
    )


def bench_shape(ways: list[Method], dense: Tensor, tokens: int) -> list[dict[str, Any]]:
    """One row for each method; results are checked against float64 before any timing."""
    out_features, in_features = dense.shape
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dense.device)
    exact = functional.linear(x.double(), dense.double())
    errors = {}
    for way in ways:
        errors[way.name] = _relative_error(way.calls[0](x.to(way.dtype)), exact)
        if not errors[way.name] <= way.limit:
            raise TqwError(
                f"expected {way.name} within {way.limit} of float64 on {out_features}x{in_features}, {tokens} tokens, "
                f"got {errors[way.name]:.2e}: not timing wrong results"
            )
    inputs = {way.name: x.to(way.dtype) for way in ways}
    calls = {way.name: [partial(call, inputs[way.name]) for call in way.calls] for way in ways}
    medians = _interleaved_medians(calls, dense.device)
    return [
        {
            "device": dense.device.type,
            "shape": f"{out_features}x{in_features}",
            "tokens": tokens,
            "method": way.name,
            "bits": format(way.bits, ".4g"),
            "microseconds": medians[way.name] * 1e6,
            "packed_gigabytes_per_second": way.nbytes / medians[way.name] / 1e9,
            "relative_error": errors[way.name],
        }
        for way in ways
    ]


@torch.inference_mode()
def bench(
    device: str = "cpu",
    shapes: Iterable[str] = DEFAULT_SHAPES,
    tokens: Iterable[int] = (1, 16, 128),
    bits: str = "4",
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """All rows: `read_bandwidth` first, then each shape and number of tokens."""
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise TqwError("expected a CUDA device for --device cuda, but torch sees none: use --device cpu")
    limit = read_bandwidth(target)
    rows: list[dict[str, Any]] = [
        {
            "device": target.type, "shape": "", "tokens": 0, "method": "read_bandwidth", "bits": "",
            "microseconds": _BANDWIDTH_BYTES / limit / 1e3, "packed_gigabytes_per_second": limit, "relative_error": 0.0,
        }
    ]  # fmt: skip
    config = QuantConfig(bits=parse_bits(bits))
    for shape in shapes:
        out_features, in_features = parse_shape(shape)
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) * 0.02
        qw = quantize(weight.to(target), config)
        dense = dequantize(qw)
        ways = methods(qw, dense)
        for count in tokens:
            rows += bench_shape(ways, dense, count)
    if on_row is not None:
        for row in rows:
            on_row(row)
    return rows
