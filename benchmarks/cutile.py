"""The cuTile backend against torch and the other backends, and its launch settings, in one run on one GPU.

    python benchmarks/cutile.py [-o benchmarks/results/cutile.json] [--shape 4096x4096] [--no-settings]

Every result is checked against float64 before it is timed as `tqw bench --device cuda` times. A setting that does not
compile or run is listed with its error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from tqw import bench, kernels
from tqw.config import QuantConfig
from tqw.kernels import cutile, cutile_kernels
from tqw.report import document, write_json
from tqw.weight import dequantize, quantize

# tokens: (columns, rows, parts, warps, programs of one multiprocessor, levels looked up by pairs)
SETTINGS: dict[int, list[tuple[int, int, int, int, int, bool]]] = {
    1: list(product((16,), (64,), (2, 4, 8, 1), (8, 4), (2, 3, 1), (True, False))),
    16: list(product((16,), (64, 128), (4, 2, 1), (8, 4), (2,), (True, False))),
    128: list(product((128, 64), (64, 128), (2, 1, 4), (8,), (2, 1), (True, False))),
    2048: list(product((128, 256), (64, 128), (1,), (8, 4), (2, 1), (True, False))),
}
PRODUCT = cutile_kernels.product


@lru_cache
def with_hints(warps: int, occupancy: int) -> Any:
    return PRODUCT.replace_hints(num_worker_warps=warps, occupancy=occupancy)


def backend_rows(qw, dense, x, exact) -> Iterator[dict[str, Any]]:
    weights = bench.cold_weights(qw)
    calls = {
        name: [lambda w=w, name=name: kernels.linear(x, w, backend=name) for w in weights]
        for name in ("cutile", "triton", "cuda")
    }
    calls["torch_bfloat16"] = bench.cold_dense_calls(x, dense)
    errors = {}
    for name in list(calls):
        try:
            errors[name] = bench.checked_error(name, calls[name][0](), exact, 1e-2)
        except Exception as problem:  # noqa: BLE001  (a backend that does not run here is a result, too)
            yield {"tokens": len(x), "method": name, "error": f"{type(problem).__name__}: {problem}"[:2000]}
            del calls[name]
    graphs: dict[str, float] = {}
    try:
        graphs = bench.graph_microseconds(calls)
    except Exception as problem:  # noqa: BLE001
        yield {"tokens": len(x), "method": "graphs", "error": f"{type(problem).__name__}: {problem}"[:2000]}
    for name, copies_of_call in calls.items():
        yield {
            "tokens": len(x), "method": name, "microseconds": graphs.get(name), "relative_error": errors[name],
            "eager_microseconds": bench.eager_microseconds(copies_of_call[0]),
        }  # fmt: skip


def setting_rows(qw, x, exact, until: float) -> Iterator[dict[str, Any]]:
    weights = bench.cold_weights(qw)
    for columns, rows, split, warps, occupancy, paired in SETTINGS[len(x)]:
        if time.perf_counter() > until:
            return
        chosen = cutile.Settings(columns, rows, split)
        row: dict[str, Any] = {"tokens": len(x), "method": "cutile", "columns": columns, "rows": rows, "split": split,
                               "warps": warps, "occupancy": occupancy, "paired": paired}  # fmt: skip
        try:
            with (
                mock.patch.object(cutile_kernels, "product", with_hints(warps, occupancy)),
                mock.patch.object(cutile, "_PAIRED", cutile._PAIRED if paired else ()),
            ):
                bench.checked_error("cutile", cutile._linear(x, qw, None, chosen), exact, 1e-2)
                calls = [lambda w=w, s=chosen: cutile._linear(x, w, None, s) for w in weights]
                row["microseconds"] = bench.graph_microseconds({"cutile": calls})["cutile"]
        except Exception as problem:  # noqa: BLE001  (too much shared memory: not for this GPU)
            row["error"] = f"{type(problem).__name__}: {problem}"[:500]
        yield row


def kernel_rows(qw, x) -> Iterator[dict[str, Any]]:
    """What each kernel of one call takes, by torch's profiler (warm caches)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            kernels.linear(x, qw, backend="cutile")
        torch.cuda.synchronize()
    for event in profile.key_averages():
        yield {"tokens": len(x), "kernel": event.key[:60], "microseconds": event.device_time_total / event.count}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/cutile.json"))
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--no-settings", action="store_true")
    parser.add_argument("--seconds", type=float, default=240, help="for trying settings")
    arguments = parser.parse_args()
    out_features, in_features = bench.parse_shape(arguments.shape)
    qw = quantize(torch.randn(out_features, in_features, device="cuda") * 0.02, QuantConfig(bits=4))
    dense = dequantize(qw)
    rows: list[dict[str, Any]] = []

    def add(new: Iterator[dict[str, Any]]) -> None:
        for row in new:
            rows.append({"shape": arguments.shape, "bits": "4", **row})
            sys.stderr.write(f"{row}\n")
        write_json(arguments.output, document(rows))

    inputs = {tokens: torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16) for tokens in SETTINGS}
    exact = {tokens: functional.linear(x.double(), dense.double()) for tokens, x in inputs.items()}
    for tokens, x in inputs.items():
        add(backend_rows(qw, dense, x, exact[tokens]))
    if not arguments.no_settings:
        began, share = time.perf_counter(), arguments.seconds / len(inputs)
        for index, (tokens, x) in enumerate(inputs.items()):
            add(setting_rows(qw, x, exact[tokens], began + share * (index + 1)))
    for x in inputs.values():
        add(kernel_rows(qw, x))


if __name__ == "__main__":
    main()
