"""Times of the linear op against torch's own, with the measured read bandwidth as the limit: `tqw bench`.

On a GPU a time is that of one call inside a CUDA graph over copies of the weight that do not fit in the L2 cache, as
in a model whose layers follow each other; `eager_microseconds` is the wall time of a call from Python, nothing hidden.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tqw import kernels
from tqw.config import QuantConfig, format_bits, parse_bits
from tqw.errors import TqwError
from tqw.peers import CPU_PEERS
from tqw.weight import QuantizedWeight, dequantize, quantize

DEFAULT_SHAPES = ("576x576", "1536x576", "576x1536", "1024x1024", "3072x1024", "4096x4096")
_SECONDS, _LEAST_RUNS, _TURN = 0.3, 5, 8
_COLD_BYTES, _MOST_COPIES = 96 << 20, 32
_BANDWIDTH_BYTES = 256 << 20
_COLD_GPU_BYTES = 220_000_000  # several times any L2 cache
_WARM_SECONDS = 0.05  # a GPU that was idle has yet to raise its clock
_EAGER_CALLS = 300
_GRAPH_CALLS = 32  # of a method in a CUDA graph, at least: to start one takes a few microseconds


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


def copies_to_be_cold(nbytes: int) -> int:
    """How many weights of `nbytes` the L2 cache surely does not hold."""
    return max(4, -(-_COLD_GPU_BYTES // nbytes))


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_microseconds(methods: dict[str, Sequence[Callable[[], Any]]], replays: int = 15) -> dict[str, float]:
    """Median over replays of a CUDA graph of a method's calls, for one call; the methods take turns, each time in
    another order: what follows a product that draws much power runs at a lower clock."""
    repeated = {name: [*calls] * -(-_GRAPH_CALLS // len(calls)) for name, calls in methods.items()}
    graphs = {name: _captured(calls) for name, calls in repeated.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    start = time.perf_counter()
    while time.perf_counter() - start < _WARM_SECONDS:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    order = random.Random(0)
    for _ in range(replays):
        for name, graph in order.sample(list(graphs.items()), len(graphs)):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: sorted(values)[replays // 2] * 1e3 / len(repeated[name]) for name, values in times.items()}


def eager_microseconds(call: Callable[[], Any]) -> float:
    """Wall time of a call from Python, of many in a row: the larger of what the host and the GPU need."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_EAGER_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / _EAGER_CALLS * 1e6


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


def checked_error(name: str, y: Tensor, exact: Tensor, limit: float) -> float:
    """The relative error of a result that is about to be timed; raises when it is above `limit`."""
    error = _relative_error(y, exact)
    if not error <= limit:
        raise TqwError(f"expected {name} within {limit} of float64, got {error:.2e}: not timing wrong results")
    return error


def copy_weight(qw: QuantizedWeight) -> QuantizedWeight:
    """The same weight in its own memory."""
    packed, scales = (tuple(t.clone() for t in group) for group in (qw.packed, qw.weight_scale))
    return replace(qw, packed=packed, weight_scale=scales)


def cold_weights(qw: QuantizedWeight) -> list[QuantizedWeight]:
    """Copies of the weight, more than the L2 cache holds."""
    return [copy_weight(qw) for _ in range(copies_to_be_cold(qw.nbytes()))]


def cold_dense_calls(x: Tensor, dense: Tensor) -> list[Callable[[], Tensor]]:
    """The library's product in the dtype of x, over copies of `dense`, more than the L2 cache holds."""
    weight = dense.to(x.dtype)
    copies = [weight.clone() for _ in range(copies_to_be_cold(weight.nbytes))]
    return [lambda w=w: functional.linear(x, w) for w in copies]


def bench_shape_cuda(qw: QuantizedWeight, dense: Tensor, tokens: int) -> list[dict[str, Any]]:
    """Rows of tqw and bfloat16 cuBLAS on a GPU, for activations in bfloat16."""
    out_features, in_features = dense.shape
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(qw.device, torch.bfloat16)
    exact = functional.linear(x.double(), dense.double())
    calls: dict[str, Sequence[Callable[[], Tensor]]] = {
        "tqw": [lambda w=w: kernels.linear(x, w) for w in cold_weights(qw)],
        "torch_bfloat16": cold_dense_calls(x, dense),
    }
    sizes = {"tqw": (format_bits(qw.bits), qw.nbytes()), "torch_bfloat16": ("16", 2 * dense.numel())}
    # bfloat16 rounds weights and output to 2^-9; int8 inputs add about 1 %, int8 weights 0.7 % (17 tokens and more)
    errors = {name: checked_error(name, each[0](), exact, 2e-2) for name, each in calls.items()}
    rows = []
    for name, microseconds in graph_microseconds(calls).items():
        rows.append(
            {
                "device": "cuda", "shape": f"{out_features}x{in_features}", "tokens": tokens, "method": name,
                "bits": sizes[name][0], "microseconds": microseconds,
                "packed_gigabytes_per_second": sizes[name][1] / microseconds / 1e3, "relative_error": errors[name],
                "eager_microseconds": eager_microseconds(calls[name][0]),
            }
        )  # fmt: skip
    return rows


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


def methods(qw: QuantizedWeight, dense: Tensor) -> list[Method]:
    """tqw, torch and every installed peer that can do this shape."""
    count, size = _copies(qw.nbytes()), dense.numel()
    own = [_quantized_by(copy_weight(qw)) for _ in range(count)]
    found = [
        Method(name, own, dtype, qw.nbytes(), qw.bits_per_weight(), 2e-2)
        for name, dtype in (("tqw", torch.float32), ("tqw_bfloat16", torch.bfloat16))
    ]
    for name, dtype, limit in (("torch_float32", torch.float32, 1e-5), ("torch_bfloat16", torch.bfloat16, 2e-2)):
        weight = dense.to(dtype)
        clones = [_linear_by(weight.clone()) for _ in range(_copies(weight.nbytes))]
        found.append(Method(name, clones, dtype, weight.nbytes, 8 * weight.element_size(), limit))
    if dense.device.type == "cpu":
        for name, (make, dtype) in CPU_PEERS.items():
            try:
                made = [make(dense) for _ in range(_copies(size // 2))]
            except (ImportError, OSError, TqwError):
                continue
            bits = made[0][1]
            found.append(Method(name, [call for call, _ in made], dtype, int(size * bits / 8), bits, 0.25))
    return found


def bench_shape(ways: list[Method], dense: Tensor, tokens: int) -> list[dict[str, Any]]:
    """One row for each method; results are checked against float64 before any timing."""
    out_features, in_features = dense.shape
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(dense.device)
    exact = functional.linear(x.double(), dense.double())
    errors = {}
    for way in ways:
        errors[way.name] = checked_error(way.name, way.calls[0](x.to(way.dtype)), exact, way.limit)
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
    device: str = "cpu", shapes: Iterable[str] = DEFAULT_SHAPES, tokens: Iterable[int] = (1, 16, 128), bits: str = "4"
) -> list[dict[str, Any]]:
    """All rows: `read_bandwidth` first, then each shape and number of tokens."""
    target, config = torch.device(device), QuantConfig(bits=parse_bits(bits))
    with torch.cuda.device(target) if target.type == "cuda" else nullcontext():  # graphs are of the current device
        limit = read_bandwidth(target)
        rows: list[dict[str, Any]] = [
            {
                "device": target.type, "shape": "", "tokens": 0, "method": "read_bandwidth", "bits": "",
                "microseconds": _BANDWIDTH_BYTES / limit / 1e3, "packed_gigabytes_per_second": limit,
                "relative_error": 0.0,
            }
        ]  # fmt: skip
        for shape in shapes:
            out_features, in_features = parse_shape(shape)
            weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)) * 0.02
            qw = quantize(weight.to(target), config)
            dense = dequantize(qw)
            ways = methods(qw, dense) if target.type != "cuda" else []
            for count in tokens:
                rows += bench_shape(ways, dense, count) if ways else bench_shape_cuda(qw, dense, count)
    return rows
