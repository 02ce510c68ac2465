"""Times of the linear op against torch's own, with the measured read bandwidth as the limit: `tqw bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tqw import kernels
from tqw.config import QuantConfig, format_bits, parse_bits
from tqw.errors import TqwError
from tqw.weight import QuantizedWeight, dequantize, quantize

DEFAULT_SHAPES = ("576x576", "1536x576", "576x1536", "1024x1024", "3072x1024", "4096x4096")
_SECONDS, _LEAST_RUNS = 0.4, 5
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


def _interleaved_medians(calls: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that a change in the machine's speed meets all."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(times[next(iter(calls))]) < _LEAST_RUNS or time.perf_counter() - began < _SECONDS * len(calls):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            times[name].append(time.perf_counter() - start)
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


def bench_shape(
    out_features: int, in_features: int, tokens: int, qw: QuantizedWeight, dense: Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of tqw and its peers for one shape and batch; results are checked against float64 before any timing."""
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(tokens)).to(device)
    exact = functional.linear(x.double(), dense.double())
    half = torch.bfloat16
    weights = {"torch_float32": dense, "torch_bfloat16": dense.to(half)}
    x16 = x.to(half)
    calls: dict[str, Callable[[], Tensor]] = {
        "tqw": lambda: kernels.linear(x, qw),
        "torch_float32": lambda: functional.linear(x, weights["torch_float32"]),
        "torch_bfloat16": lambda: functional.linear(x16, weights["torch_bfloat16"]),
    }
    # float32 accumulates in_features terms; bfloat16 rounds inputs, weights and output to 2^-9 each.
    limits = {"tqw": 1e-2, "torch_float32": 1e-5, "torch_bfloat16": 2e-2}
    errors = {name: _relative_error(call(), exact) for name, call in calls.items()}
    for name, error in errors.items():
        if not error <= limits[name]:
            raise TqwError(
                f"expected {name} within {limits[name]} of float64, got {error:.2e}: not timing wrong results"
            )
    bits = {"tqw": format_bits(qw.bits), "torch_float32": "32", "torch_bfloat16": "16"}
    sizes = {"tqw": qw.nbytes(), **{name: weight.nbytes for name, weight in weights.items()}}
    return [
        {
            "device": device.type,
            "shape": f"{out_features}x{in_features}",
            "tokens": tokens,
            "method": name,
            "bits": bits[name],
            "microseconds": seconds * 1e6,
            "packed_gigabytes_per_second": sizes[name] / seconds / 1e9,
            "relative_error": errors[name],
        }
        for name, seconds in _interleaved_medians(calls, device).items()
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
        for count in tokens:
            rows += bench_shape(out_features, in_features, count, qw, dense, target)
    if on_row is not None:
        for row in rows:
            on_row(row)
    return rows
