"""The linear op on a GPU with every width, against bfloat16: results/gpu_widths.json.

    python benchmarks/gpu_widths.py [-o benchmarks/results/gpu_widths.json]

Timed as `tqw bench --device cuda` times, in turns with bfloat16's product; where TQW_CUDA_ACTIVATIONS makes a
difference, with the default (auto) and with the other choice: all inputs and weights in 16 bits (exact), or rounded to
8 for every width (int8). Errors are against float64; what 8 bits cost in KLD is measured by activations.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from tqw import bench, kernels
from tqw.config import QuantConfig, parse_bits
from tqw.kernels import cuda
from tqw.report import document, write_json
from tqw.weight import QuantizedWeight, dequantize, empty_weight, quantize

SHAPES = ("4096x4096", "4096x14336", "28672x4096")
BITS = ("2", "3", "4", "5", "6", "8", "4+4")
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)


def choices(bits: str, tokens: int) -> tuple[str, ...]:
    """Values of TQW_CUDA_ACTIVATIONS that compute differently."""
    if tokens < 5:
        return ("auto",)
    return ("auto", "exact") if sum(parse_bits(bits)) < 6 else ("auto", "int8")


def run(activations: str, x: Tensor, qw: QuantizedWeight) -> Tensor:
    cuda.forget()
    with mock.patch.object(cuda, "_activations", return_value=activations):
        return kernels.linear(x, qw, backend="cuda")


def compile_all() -> None:
    """Fill the cache of compiled kernels: the measurements would compile one after the other."""
    device = torch.device("cuda", torch.cuda.current_device())
    for shape, bits, activations in product(SHAPES, BITS, ("auto", "exact", "int8")):
        qw = empty_weight(bench.parse_shape(shape), QuantConfig(bits=parse_bits(bits)), device)
        with mock.patch.object(cuda, "_activations", return_value=activations):
            cuda.compile_ahead(qw, torch.bfloat16, [n for n in TOKENS if activations in choices(bits, n)])


def rows_of(shape: str, bits: str) -> Iterator[dict[str, Any]]:
    out_features, in_features = bench.parse_shape(shape)
    weight = torch.randn(out_features, in_features, device="cuda") * 0.02
    qw = quantize(weight, QuantConfig(bits=parse_bits(bits)))
    dense, copies = dequantize(qw), bench.cold_weights(qw)
    for tokens in TOKENS:
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        exact = functional.linear(x.double(), dense.double())
        calls: dict[str, list[Callable[[], Tensor]]] = {"torch_bfloat16": bench.cold_dense_calls(x, dense)}
        errors = {"torch_bfloat16": bench.checked_error("torch_bfloat16", calls["torch_bfloat16"][0](), exact, 0.01)}
        for activations in choices(bits, tokens):
            errors[activations] = bench.checked_error(activations, run(activations, x, qw), exact, 0.02)
            calls[activations] = [partial(run, activations, x, copy) for copy in copies]
        times = bench.graph_microseconds(calls)
        for name, microseconds in times.items():
            yield {
                "shape": shape, "tokens": tokens, "bits": bits, "activations": name, "microseconds": microseconds,
                "times_as_fast_as_bfloat16": times["torch_bfloat16"] / microseconds, "relative_error": errors[name],
            }  # fmt: skip
        said = " ".join(f"{name} {time:.1f}" for name, time in times.items())
        sys.stderr.write(f"{shape} {bits} {tokens}: {said}\n")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu_widths.json"))
    arguments = parser.parse_args()
    compile_all()
    rows: list[dict[str, Any]] = []
    for shape, bits in product(SHAPES, BITS):
        rows += rows_of(shape, bits)
    write_json(arguments.output, document(rows))


if __name__ == "__main__":
    main()
