"""Times launch settings of the Triton backend on this GPU, to choose those in kernels/triton.py.

python benchmarks/triton_settings.py [-o settings.json]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch.nn import functional

from tqw import bench
from tqw.config import QuantConfig
from tqw.kernels import triton
from tqw.report import document, write_json
from tqw.weight import dequantize, quantize

SHAPES = ("4096x4096", "28672x4096")
TOKENS = {1: 16, 32: 32, 64: 64, 512: 128, 2048: 128}  # tokens: the most columns worth a try


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output
    rows = []
    for shape, (tokens, most) in itertools.product(SHAPES, TOKENS.items()):
        out_features, in_features = bench.parse_shape(shape)
        qw = quantize(torch.randn(out_features, in_features, device="cuda") * 0.02, QuantConfig(bits=4))
        dense = dequantize(qw, torch.bfloat16)
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        exact = functional.linear(x.double(), dense.double())
        columns = (most,) if most < 128 else (64, 128)
        for m, n, warps, stages in itertools.product(columns, (32, 64, 128), (4, 8), (2, 3, 4)):
            chosen = triton.Settings(m, n, warps, stages)
            try:
                error = bench.checked_error("triton", triton._linear(x, qw, None, chosen), exact, 0.01)
                calls = {"triton": [lambda x=x, qw=qw, s=chosen: triton._linear(x, qw, None, s)] * 4}
                microseconds = bench.graph_microseconds(calls)["triton"]
            except Exception as problem:  # noqa: BLE001  (too much shared memory: not for this GPU)
                sys.stderr.write(f"{shape} {tokens} {chosen}: {type(problem).__name__} {str(problem)[:100]}\n")
                continue
            rows.append({"shape": shape, "tokens": tokens, "tile_tokens": m, "tile_rows": n, "warps": warps,
                         "stages": stages, "microseconds": microseconds, "relative_error": error})  # fmt: skip
        here = sorted(
            (r for r in rows if r["shape"] == shape and r["tokens"] == tokens), key=lambda r: r["microseconds"]
        )
        for row in here[:4]:
            sys.stderr.write(f"{row}\n")
    if output:
        write_json(output, document(rows))


if __name__ == "__main__":
    main()
