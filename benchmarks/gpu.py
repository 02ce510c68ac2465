"""The linear op on a GPU against other 4-bit kernels, in one run: results/gpu_linear.json and a picture.

    python benchmarks/gpu.py [-o benchmarks/results/gpu_linear]

Every peer that is installed quantizes the same dense weight its own way and is checked against float64 before it is
timed as `tqw bench --device cuda` times: inside a CUDA graph of 32 calls or more, over copies that do not fit in the L2
cache, in turns with bfloat16. The rotation of tqw is part of its time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from tqw import bench, kernels
from tqw.config import QuantConfig
from tqw.kernels import cuda
from tqw.report import document, write_json
from tqw.weight import QuantizedWeight, dequantize, empty_weight, quantize

SHAPES = ("4096x4096", "6144x4096", "4096x14336", "28672x4096")
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
PEER_TOKENS = (1, 8, 16, 32, 64, 512)
PEER_SECONDS = 25  # for the products of one peer and shape: some tune themselves for minutes
EXACT_TOKENS = 256  # from here on also with inputs and weights that are not rounded to 8 bits
GROUP = 128  # inputs that share a weight scale, for us and for peers that let one choose
OTHER_GROUPS = (64, 32)


def _integers(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest symmetric int4 in groups: codes 0..15 [n, k], scales [n, k / GROUP]; dense ~ (code - 8) scale."""
    groups = dense.unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True).float() / 7.5
    codes = (groups / scales + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return codes, scales.squeeze(-1)


def tinygemm(dense: Tensor) -> Callable[[Tensor], Tensor]:
    codes, scales = _integers(dense)
    packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    both = torch.stack([scales.T, torch.zeros_like(scales.T)], -1).to(dense.dtype).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, both)


def bitsandbytes_nf4(dense: Tensor) -> Callable[[Tensor], Tensor]:
    import bitsandbytes

    codes, state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4", blocksize=64)
    return lambda x: bitsandbytes.matmul_4bit(x, codes.t(), state)


def gemlite(dense: Tensor) -> Callable[[Tensor], Tensor]:
    from gemlite.helper import A16W4_HQQ_INT

    codes, scales = _integers(dense)
    zeros = torch.full_like(scales, 8.0)
    layer = A16W4_HQQ_INT(device="cuda", dtype=dense.dtype).from_weights(
        codes, scales.reshape(-1, 1).to(dense.dtype), zeros.reshape(-1, 1).to(dense.dtype)
    )
    return layer.forward


def torchao_int4(dense: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(dense, requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    return layer


def humming_int4(dense: Tensor) -> Callable[[Tensor], Tensor]:
    from humming.layer import HummingLayer

    config = {"dtype": "int4", "group_size": GROUP}
    layer = HummingLayer(shape_n=dense.shape[0], shape_k=dense.shape[1], weight_config=config, torch_dtype=dense.dtype)
    layer = layer.cuda()
    layer.load_from_unquantized(dense)
    layer.transform()
    return layer


def graph_microseconds(calls: Sequence[Callable[[], Tensor]], x: Tensor, dense: Tensor) -> float:
    """Of a method, in turns with the bfloat16 product."""
    return bench.graph_microseconds({"method": calls, "torch_bfloat16": bench.cold_dense_calls(x, dense)})["method"]


def row_of(
    method: str, shape: str, tokens: int, bits: str, microseconds: float, nbytes: float, error: float
) -> dict[str, Any]:
    """nbytes: of the weight as it is read."""
    return {
        "device": "cuda", "shape": shape, "tokens": tokens, "method": method, "bits": bits,
        "microseconds": microseconds, "packed_gigabytes_per_second": nbytes / microseconds / 1e3,
        "relative_error": error,
    }  # fmt: skip


def own_row(method: str, qw: QuantizedWeight, dense: Tensor, shape: str, tokens: int) -> dict[str, Any]:
    """Our op, as it is set up now."""
    x = torch.randn(tokens, dense.shape[1], device="cuda", dtype=torch.bfloat16)
    error = bench.checked_error(method, kernels.linear(x, qw), functional.linear(x.double(), dense.double()), 0.02)
    microseconds = graph_microseconds([lambda w=w: kernels.linear(x, w) for w in bench.cold_weights(qw)], x, dense)
    say(f"{method} {microseconds:.1f}", shape, tokens)
    return row_of(method, shape, tokens, "4", microseconds, qw.nbytes(), error)


def exact_row(qw: QuantizedWeight, dense: Tensor, shape: str, tokens: int) -> dict[str, Any]:
    """The op as TQW_CUDA_ACTIVATIONS=exact computes it."""
    cuda.forget()
    with mock.patch.object(cuda, "_activations", return_value="exact"):
        row = own_row("tqw_exact", qw, dense, shape, tokens)
    cuda.forget()
    return row


def int8_row(dense: Tensor, shape: str, tokens: int) -> dict[str, Any]:
    """The library's product of int8 matrices alone, int32 [tokens, out]: nothing is rounded, decoded, scaled."""
    x = torch.randn(tokens, dense.shape[1], device="cuda", dtype=dense.dtype)
    x8, weight = ((t * (127 / t.abs().amax(1, keepdim=True))).round().to(torch.int8) for t in (x, dense))
    exact = functional.linear(x8.double(), weight.double())
    error = bench.checked_error("torch_int8", torch._int_mm(x8, weight.T), exact, 1e-9)
    copies = [weight.clone() for _ in range(bench.copies_to_be_cold(weight.nbytes))]
    microseconds = graph_microseconds([lambda w=w: torch._int_mm(x8, w.T) for w in copies], x, dense)
    say(f"torch_int8 {microseconds:.1f}", shape, tokens)
    return row_of("torch_int8", shape, tokens, "8", microseconds, weight.nbytes, error)


def group_rows(weight: Tensor, group: int, shape: str) -> Iterator[dict[str, Any]]:
    """The op with weight scales for `group` inputs each."""
    qw = quantize(weight, QuantConfig(bits=4, group_size=group))
    dense = dequantize(qw)
    for tokens in PEER_TOKENS:
        yield own_row(f"tqw_group_{group}", qw, dense, shape, tokens)


PEERS = (tinygemm, bitsandbytes_nf4, torchao_int4, humming_int4, gemlite)


def rows_of_peer(prepare: Callable, shape: str, dense: Tensor) -> Iterator[dict[str, Any]]:
    """One row for each number of tokens, until PEER_SECONDS are over."""
    packed_bytes = dense.numel() * (0.5 + 2 / GROUP)
    calls = [prepare(dense) for _ in range(bench.copies_to_be_cold(int(packed_bytes)))]
    began = time.perf_counter()
    for tokens in PEER_TOKENS:
        if time.perf_counter() - began > PEER_SECONDS:
            return
        x = torch.randn(tokens, dense.shape[1], device="cuda", dtype=dense.dtype)
        error = bench.checked_error(prepare.__name__, calls[0](x), functional.linear(x.double(), dense.double()), 0.15)
        microseconds = graph_microseconds([lambda c=c, x=x: c(x) for c in calls], x, dense)
        row = row_of(prepare.__name__, shape, tokens, "4", microseconds, packed_bytes, error)
        yield row | {"eager_microseconds": bench.eager_microseconds(lambda x=x: calls[0](x))}


def compile_all(shapes: Sequence[str]) -> None:
    """Fill the cache of compiled kernels: the measurements would compile one after the other."""
    for shape, group in product(shapes, (GROUP, *OTHER_GROUPS)):
        config = QuantConfig(bits=4, group_size=group)
        qw = empty_weight(bench.parse_shape(shape), config, torch.device("cuda", torch.cuda.current_device()))
        cuda.compile_ahead(qw, torch.bfloat16, TOKENS)


@torch.inference_mode()
def measure(shapes: Sequence[str]) -> Iterator[tuple[list[dict[str, Any]], dict[str, str]]]:
    """After each shape: all rows so far, and why the peers that are missing are missing."""
    compile_all(shapes)
    limit = bench.read_bandwidth(torch.device("cuda"))
    rows: list[dict[str, Any]] = [
        {
            "device": "cuda", "shape": "", "tokens": 0, "method": "read_bandwidth", "bits": "", "microseconds": 0.0,
            "packed_gigabytes_per_second": limit, "relative_error": 0.0,
        }
    ]  # fmt: skip
    missing: dict[str, str] = {}
    for shape in shapes:
        out_features, in_features = bench.parse_shape(shape)
        weight = torch.randn(out_features, in_features, device="cuda") * 0.02
        qw = quantize(weight, QuantConfig(bits=4))
        dense = dequantize(qw)
        for tokens in TOKENS:
            new = bench.bench_shape_cuda(qw, dense, tokens)
            rows += new
            say(
                " ".join(f"{r['method']} {r['microseconds']:.1f} (eager {r['eager_microseconds']:.0f})" for r in new),
                shape,
                tokens,
            )
            if tokens >= EXACT_TOKENS:
                rows += [exact_row(qw, dense, shape, tokens), int8_row(dense.bfloat16(), shape, tokens)]
        del dense
        for group in OTHER_GROUPS:
            rows += group_rows(weight, group, shape)
        for prepare in PEERS:
            if prepare.__name__ in missing:
                continue
            try:
                for row in rows_of_peer(prepare, shape, weight.bfloat16()):
                    rows.append(row)
                    say(
                        f"{prepare.__name__} {row['microseconds']:.1f} error {row['relative_error']:.3f}",
                        shape,
                        row["tokens"],
                    )
            except Exception as error:  # noqa: BLE001  (a peer that does not run here is a result, too)
                missing[prepare.__name__] = f"{type(error).__name__}: {str(error)[:300]}"
                say(f"{prepare.__name__}: {missing[prepare.__name__]}", shape, 0)
            torch.cuda.empty_cache()
        yield rows, missing


def say(text: str, shape: str, tokens: int) -> None:
    sys.stderr.write(f"{shape} {tokens}: {text}\n")


def draw(rows: list[dict[str, Any]], gpu: str, path: Path) -> None:
    """Microseconds against tokens, one panel for each shape, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods = [method for method in methods if method != "read_bandwidth" and "group" not in method]
    colours = {method: "black" if method == "torch_bfloat16" else f"C{i}" for i, method in enumerate(methods)}
    for axis, shape in zip(axes.flat, SHAPES, strict=True):
        here = [row for row in rows if row["shape"] == shape and row["method"] in methods]
        for method in dict.fromkeys(row["method"] for row in here):
            points = [(row["tokens"], row["microseconds"]) for row in here if row["method"] == method]
            style = {"tqw": "o-", "torch_bfloat16": "--"}.get(method, ".-")
            width = 2.5 if method == "tqw" else 1.2
            axis.plot(*zip(*points, strict=True), style, color=colours[method], label=method, linewidth=width)
        axis.set(title=shape, xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
        axis.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
        axis.grid(alpha=0.3)
    axes.flat[-1].legend(fontsize=8)  # the shape that every method ran
    figure.suptitle(f"y = x W^T, 4 bits, bf16 activations, {gpu}, cold L2")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu_linear"))
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="out x in, for example 4096x14336")
    arguments = parser.parse_args()
    output, gpu = arguments.output, torch.cuda.get_device_name()
    for rows, missing in measure(arguments.shapes):
        result = document(rows)
        result["environment"]["peers_that_did_not_run"] = missing
        write_json(output.with_suffix(".json"), result)
        draw(rows, gpu, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
