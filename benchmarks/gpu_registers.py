"""Registers, shared memory and spills of the CUDA kernels on every architecture, as the compiler reports them.

python benchmarks/gpu_registers.py [-o benchmarks/results/gpu_registers.json]

Needs no GPU: pip install cuda-bindings nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tqw.config import format_bits
from tqw.kernels import cuda_launch, cuda_plan, cuda_variant
from tqw.report import document, write_json

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
BASE = cuda_variant.Variant((4,), 4096, 128, 128, 128, True, True, 2, planes=1)
LINEARS = {  # the weight, and the tokens of the decode kernel
    "1 token": (BASE, 1),
    "1 token, 3 bits": (replace(BASE, bits=(3,)), 1),
    "1 token, 6 bits": (replace(BASE, bits=(6,)), 1),
    "1 token, 8 bits": (replace(BASE, bits=(8,)), 1),
    "1 token, 4+4 bits": (replace(BASE, bits=(4, 4)), 1),
    "1 token, 14336 inputs": (replace(BASE, padded_in=14336), 1),
    "8 tokens": (BASE, 8),
    "16 tokens": (BASE, 16),
    "16 tokens, groups of 64": (replace(BASE, group=64), 16),
    "16 tokens, groups of 32": (replace(BASE, group=32), 16),
    "16 tokens, 6 bits": (replace(BASE, bits=(6,), planes=2), 16),
}
COARSE = replace(BASE, coarse=True, stages=4)
HOPPER = {
    "32 tokens, 8 bits": replace(COARSE, columns=32, split=4, spread=4, apart=True, min_ctas=4),
    "64 tokens, 8 bits": replace(COARSE, columns=64, warpgroups=2, min_ctas=2),
    "128 tokens, 8 bits": replace(COARSE, columns=128, split=2, spread=2),
    "256 tokens, 8 bits": replace(COARSE, columns=256, warpgroups=2),
    "256 tokens, 3 bits, 8 bits": replace(COARSE, bits=(3,), columns=256, warpgroups=2),
    "64 tokens, 5 bits, 8 bits": replace(COARSE, bits=(5,), columns=64, warpgroups=2, min_ctas=2),
    "64 tokens, 6 bits, 8 bits": replace(COARSE, bits=(6,), columns=64, warpgroups=2, min_ctas=2),
    "256 tokens, 8 bits, 8 bits": replace(COARSE, bits=(8,), columns=256, warpgroups=2),
    "experts, 256 pairs each, 8 bits": replace(COARSE, experts=True, columns=256, warpgroups=2),
    "prompts, 8 bits": cuda_plan.prompt_variant(BASE),
    "prompts, 6 bits, 8 bits": cuda_plan.prompt_variant(replace(BASE, bits=(6,))),
    "prompts of 14336 inputs, 3 bits, 8 bits": cuda_plan.prompt_variant(replace(BASE, bits=(3,), padded_in=14336)),
    "64 tokens": replace(BASE, columns=64, stages=4),
    "128 tokens": replace(BASE, columns=128, stages=4),
    "256 tokens": replace(BASE, columns=256, warpgroups=2, stages=2),
    "experts, 128 pairs each": replace(BASE, experts=True, columns=128, warpgroups=2, stages=3, min_ctas=2),
    "experts, 256 pairs each": replace(BASE, experts=True, columns=256, warpgroups=2, stages=2),
}
_ENTRY = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S
)


def rows_of(name: str, variant: cuda_variant.Variant, arch: str) -> list[dict[str, Any]]:
    _, log = cuda_launch.compile_with_log(variant.source(), arch)
    return [
        {"variant": name, "bits": format_bits(variant.bits), "arch": arch, "kernel": kernel,
         "registers": int(registers), "spill_bytes": int(stores) + int(loads)}
        for kernel, stores, loads, registers in _ENTRY.findall(log)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output
    rows = []
    for arch in ARCHITECTURES:
        device = cuda_launch.Device(0, arch, 132, 0, clusters=arch in ("sm_90a", "sm_100", "sm_120"))
        decode = {
            name: cuda_plan.decode_variant(base, tokens, 4096, device) for name, (base, tokens) in LINEARS.items()
        }
        dense = {f"dense rows, {n} bits": replace(BASE, bits=(n,), dense=True) for n in (3, 4, 6)}
        variants = decode | dense | (HOPPER if arch == "sm_90a" else {})
        for name, variant in variants.items():
            rows += rows_of(name, variant, arch)
    for row in rows:
        sys.stderr.write(f"{row}\n")
    if output:
        write_json(output, document(rows, nvrtc=metadata.version("nvidia-cuda-nvrtc")))


if __name__ == "__main__":
    main()
