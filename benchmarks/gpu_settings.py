"""Times settings of a kernel on this GPU, in turns, for `decode_variant` or `middle_variant` of kernels/cuda_plan.py.

python benchmarks/gpu_settings.py [--shapes 4096x4096 ...] [--tokens 1 2 4 8 16] [--only split=4 ...] [-o settings.json]
python benchmarks/gpu_settings.py --kernel middle --tokens 32 64 128 256 [-o middle.json]
python benchmarks/gpu_settings.py --kernel coarse --tokens 96 160 256 384 512 768 1024 [-o coarse.json]

coarse: the middle kernel with operands of 8 bits, the twelve divisions of least cost.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from tqw import bench, kernels
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.kernels import cuda, cuda_launch, cuda_plan, cuda_variant
from tqw.report import document, write_json
from tqw.weight import QuantizedWeight, dequantize, quantize

SHAPES = ("4096x4096", "6144x4096", "4096x14336", "28672x4096")
TOKENS = (1, 2, 4, 8, 16)
# cluster, split, warps, share
LAYOUTS = ((1, 1, 16, 16), (1, 1, 16, 8), (2, 1, 16, 16), (2, 1, 16, 8), (2, 2, 16, 8), (2, 2, 16, 4), (4, 4, 16, 4))
CHOICES: dict[str, tuple] = {
    "fused": (True, False), "ring": (2, 3, 4, 5), "early": (1, 2, 3), "unroll": (1, 2), "halves": (True, False),
    "turn_tiles": (1,),
}  # fmt: skip
MIDDLE: dict[str, tuple] = {
    "warpgroups": (1, 2), "split": (1, 2, 3, 4, 5, 6, 7, 8), "apart": (False, True), "stages": (3, 4),
    "min_ctas": (1, 2, 4),
}  # fmt: skip
PRESENT = {
    "decode": cuda_plan.decode_variant, "middle": cuda_plan.middle_variant, "coarse": cuda_plan.middle_variant,
}  # fmt: skip


def candidates(
    kernel: str, qw: QuantizedWeight, tokens: int, only: dict[str, tuple], layouts: tuple
) -> Iterator[dict[str, Any]]:
    if kernel == "coarse":
        device = cuda_launch.device_at(qw.packed[0].device.index)
        costs = cuda_plan.divisions(cuda._variant(qw, torch.bfloat16), tokens, qw.out_features, device)
        asked = (d for d in costs if all(getattr(d, name) in values for name, values in only.items()))
        yield from (division._asdict() for division in sorted(asked, key=lambda d: costs[d])[:12])
    elif kernel == "middle":
        values = [only.get(name, choice) for name, choice in MIDDLE.items()]
        yield from (dict(zip(MIDDLE, chosen, strict=True)) for chosen in itertools.product(*values))
    else:
        yield from decode_candidates(tokens, only, layouts)


def decode_candidates(tokens: int, only: dict[str, tuple], layouts: tuple) -> Iterator[dict[str, Any]]:
    choices = {name: only.get(name, values) for name, values in CHOICES.items()}
    if tokens > 1:
        choices["fused"] = (False,)
    if tokens <= 2 and "halves" not in only:
        choices["halves"] = (True,)
    for (cluster, split, warps, share), *values in itertools.product(layouts, *choices.values()):
        chosen = {"cluster": cluster, "split": split, "warps": warps, "share": share} | dict(
            zip(choices, values, strict=True)
        )
        if all(chosen[name] in values for name, values in only.items()):
            yield chosen


def variant(
    kernel: str, chosen: dict[str, Any], base: cuda_variant.Variant, tokens: int, out: int, device: Any
) -> cuda_variant.Variant | None:
    """The present variant with other settings; None: the kernel is not for so many tokens."""
    if kernel == "coarse" and chosen:
        return cuda_plan.coarse_of(base, **chosen)
    present = PRESENT[kernel](base, tokens, out, device)
    if chosen and present and present.coarse:  # each part of the inputs has scales of T(x)
        chosen = chosen | {"spread": chosen["split"]}
    return present and replace(present, **chosen)


def fits(kernel: str, item: cuda_variant.Variant, device: Any) -> bool:
    """Enough shared memory, and enough inputs for the parts."""
    if kernel == "decode":
        return True
    if item.apart and (item.split == 1 or not item.coarse):
        return False
    return item.ring_bytes() <= device.shared_bytes and 256 * item.split <= item.padded_in


def plan(item: cuda_variant.Variant, tokens: int, out: int, device: Any) -> cuda_plan.Plan | None:
    """None: the transformed tokens do not fit."""
    make = cuda_plan.middle_plan if item.columns else cuda_plan.decode_plan
    return make(item, tokens, out, device)


def run(x: torch.Tensor, qw: QuantizedWeight, chosen: cuda_plan.Plan) -> torch.Tensor:
    """The layer by this plan."""
    cuda.forget()
    with mock.patch.object(cuda_plan, "linear_plan", return_value=chosen):
        return kernels.linear(x, qw, backend="cuda")


def compile_all(variants: set[cuda_variant.Variant], arch: str) -> None:
    """From many threads: the measurements would compile one after the other."""

    def compiled(item: cuda_variant.Variant) -> None:
        with suppress(TqwError):  # shares that are not whole
            cuda_launch.cubin(item.source(), arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, variants))


def measured(
    x: torch.Tensor,
    qw: QuantizedWeight,
    exact: torch.Tensor,
    kernel: str,
    everything: list[dict[str, Any] | None],
    dense_calls: list,
    copies: list[QuantizedWeight],
) -> list[dict[str, Any]]:
    """A row for each choice that is possible, and for bfloat16; None is the present one."""
    device, tokens, out = cuda_launch.device_at(x.device.index), x.shape[0], qw.out_features
    base = cuda._variant(qw, x.dtype)
    rows, calls = [{"chosen": "torch_bfloat16"}], [dense_calls]
    for chosen in everything:
        item = variant(kernel, chosen or {}, base, tokens, out, device)
        if item is None or not fits(kernel, item, device):
            continue
        row = {"chosen": chosen}
        try:
            how = plan(item, tokens, out, device)
            if how is None:
                continue
            # 8 bits of both operands: 1.3 %
            row["relative_error"] = bench.checked_error("cuda", run(x, qw, how), exact, 0.02)
        except TqwError as problem:
            if "whole" not in str(problem):
                sys.stderr.write(f"{row} {str(problem)[:300]}\n")
            continue
        rows.append(row)
        calls.append([partial(run, x, copy, how) for copy in copies])
    times = bench.graph_microseconds({str(number): each for number, each in enumerate(calls)}, 9)
    return [row | {"microseconds": time} for row, time in zip(rows, times.values(), strict=True)]


def report(title: str, rows: list[dict[str, Any]]) -> None:
    now = next((row["microseconds"] for row in rows if row["chosen"] is None), 0.0)
    sys.stderr.write(f"{title}: bfloat16 {rows[0]['microseconds']:.2f}, now {now:.2f}\n")
    for row in sorted(rows[1:], key=lambda r: r["microseconds"])[:6]:
        values = " ".join(f"{k}={int(v)}" for k, v in (row["chosen"] or {}).items())
        sys.stderr.write(f"   {row['microseconds']:.2f} {values}\n")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--kernel", choices=list(PRESENT), default="decode")
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--bits", default="4")
    parser.add_argument("--only", nargs="*", default=[], help="for example ring=2,4 halves=1")
    parser.add_argument("--layouts", nargs="*", help="cluster,split,warps,share")
    arguments = parser.parse_args()
    only = {name: tuple(map(int, values.split(","))) for name, values in (item.split("=") for item in arguments.only)}
    layouts = tuple(tuple(map(int, text.split(","))) for text in arguments.layouts or []) or LAYOUTS
    kernel = arguments.kernel
    weights = {}
    for shape in arguments.shapes:
        out_features, in_features = bench.parse_shape(shape)
        weights[shape] = quantize(
            torch.randn(out_features, in_features, device="cuda") * 0.02, QuantConfig(bits=arguments.bits)
        )
    rows, device = [], cuda_launch.device_at(torch.cuda.current_device())
    items = [
        variant(kernel, chosen, cuda._variant(qw, torch.bfloat16), tokens, qw.out_features, device)
        for qw, tokens in itertools.product(weights.values(), arguments.tokens)
        for chosen in candidates(kernel, qw, tokens, only, layouts)
    ]
    compile_all({item for item in items if item and fits(kernel, item, device)}, device.arch)
    for shape, qw in weights.items():
        dense, copies = dequantize(qw), bench.cold_weights(qw)
        for tokens in arguments.tokens:
            x = torch.randn(tokens, dense.shape[1], device="cuda", dtype=torch.bfloat16)
            exact = functional.linear(x.double(), dense.double())
            everything = [None, *candidates(kernel, qw, tokens, only, layouts)]
            here = measured(x, qw, exact, kernel, everything, bench.cold_dense_calls(x, dense), copies)
            rows += [{"shape": shape, "tokens": tokens, **row} for row in here]
            report(f"{shape} {tokens}", here)
        del copies
    if arguments.output:
        write_json(arguments.output, document(rows))


if __name__ == "__main__":
    main()
