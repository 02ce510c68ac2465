"""Stacked experts on a GPU, 4 bits against bfloat16's grouped product: results/gpu_experts.json.

    python benchmarks/gpu_experts.py [-o benchmarks/results/gpu_experts.json]

Both projections of two mixtures, random routes. `tqw` and `torch_bfloat16` are timed inside a CUDA graph of several
calls, each with inputs and a route of its own, over stacks that do not fit in the L2 cache; the order of the pairs that
torch._grouped_mm needs is made before and costs it nothing. `tqw_by_expert` is a product for each expert, as where no
kernel takes all: eager, since it asks the GPU for the route. Some rows of all are checked against float64 before.

Then whole layers of experts, from x, ids and weights to the weighted sum: transformers' own module in bfloat16, by its
`grouped_mm`, and the same module quantized.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqw import bench, kernels
from tqw.config import QuantConfig
from tqw.kernels import cuda, cuda_launch, cuda_plan
from tqw.layer import QuantizedExperts, expert_projections, expert_weight
from tqw.mixture import routed_tokens
from tqw.report import document, write_json
from tqw.weight import QuantizedWeight, dequantize, empty_weight, quantize

TOKENS = (1, 8, 16, 32, 64, 256, 1024, 4096)
CALLS = {1: 32, 8: 16, 16: 16, 32: 8, 64: 8, 256: 4, 1024: 4, 4096: 2}  # of one graph
CHECKED_PAIRS = 16
EAGER_REPEATS = 5


@dataclass(frozen=True)
class Projection:
    model: str
    projection: str
    experts: int
    choices: int
    out_features: int
    in_features: int

    @property
    def by_pair(self) -> bool:
        """Whether each pair (token, expert) has an input of its own."""
        return self.projection == "down"


PROJECTIONS = (
    Projection("Mixtral-8x7B", "gate_up", 8, 2, 28672, 4096),
    Projection("Mixtral-8x7B", "down", 8, 2, 4096, 14336),
    Projection("Qwen3-30B-A3B", "gate_up", 128, 8, 1536, 2048),
    Projection("Qwen3-30B-A3B", "down", 128, 8, 2048, 768),
)


def chosen_experts(p: Projection, tokens: int, seed: int) -> Tensor:
    """Different experts for each token: [tokens, choices]."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.rand(tokens, p.experts, device="cuda", generator=generator).topk(p.choices).indices


def route(p: Projection, tokens: int, seed: int) -> Tensor:
    """ids as `kernels.experts` takes them."""
    ids = chosen_experts(p, tokens, seed)
    return ids.reshape(-1, 1) if p.by_pair else ids


@dataclass(frozen=True)
class Call:
    """The inputs of one call, and the same with the pairs in the order of their experts."""

    x: Tensor
    ids: Tensor
    order: Tensor  # pairs, those of expert 0 first
    ordered_x: Tensor
    ends: Tensor  # int32 [experts]


def make_call(p: Projection, tokens: int, seed: int) -> Call:
    ids = route(p, tokens, seed)
    x = torch.randn(len(ids), p.in_features, device="cuda", dtype=torch.bfloat16)
    order = ids.flatten().argsort(stable=True)
    ends = ids.flatten().bincount(minlength=p.experts).cumsum(0).int()
    return Call(x, ids, order, x[order // ids.shape[1]], ends)


def grouped(call: Call, dense: Tensor) -> Tensor:
    """bfloat16 [pairs, out], in the order of their experts. dense: [experts, out, in]."""
    return torch._grouped_mm(call.ordered_x, dense.transpose(1, 2), offs=call.ends)


def by_expert(call: Call, qw: QuantizedWeight) -> Tensor:
    """[tokens, choices, out] by a product for each expert that was chosen."""
    y = torch.empty(*call.ids.shape, qw.out_features, dtype=call.x.dtype, device="cuda")
    for expert, tokens, positions in routed_tokens(call.ids, qw.packed[0].shape[0]):
        y[tokens, positions] = kernels.linear(call.x[tokens], qw[expert])
    return y


def goes_by_expert(p: Projection, tokens: int) -> bool:
    """More pairs than one launch of the decode kernel takes."""
    return tokens * p.choices > cuda._PAIRS_PER_EXPERT * p.experts


def check(call: Call, qw: QuantizedWeight, results: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of some pairs of each result [pairs, out]; raises where it is too large."""
    pairs = torch.randperm(call.ids.numel(), device="cuda")[:CHECKED_PAIRS]
    exact = torch.empty(len(pairs), qw.out_features, dtype=torch.float64, device="cuda")
    experts = call.ids.flatten()[pairs]
    for expert in experts.unique().tolist():
        mine = experts == expert
        exact[mine] = call.x[pairs[mine] // call.ids.shape[1]].double() @ dequantize(qw[expert]).double().T
    # bfloat16 rounds weights and output to 2^-9
    return {name: bench.checked_error(name, y[pairs], exact, 2e-2) for name, y in results.items()}


def unordered(y: Tensor, order: Tensor) -> Tensor:
    """Rows in the order of the pairs."""
    result = torch.empty_like(y)
    result[order] = y
    return result


def median_microseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(EAGER_REPEATS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[1:])[EAGER_REPEATS // 2]


def compile_all() -> None:
    """Fill the cache of compiled kernels from many threads: the measurements would compile one after the other."""
    device, tasks = cuda_launch.device_at(torch.cuda.current_device()), []
    for p in PROJECTIONS:
        qw = empty_weight((p.out_features, p.in_features), QuantConfig(bits=4), torch.device("meta"))
        variant = cuda._variant(qw, torch.bfloat16)
        tasks.append(lambda v=variant: cuda_plan.dequantize_launch(v, 256, device))
        counts = set()
        for tokens in TOKENS:
            choices = 1 if p.by_pair else p.choices
            of = tokens * p.choices // choices, choices, p.experts, p.out_features, device
            tasks.append(lambda v=variant, of=of: cuda_plan.expert_plan(v, *of))
            if goes_by_expert(p, tokens):
                counts.update(route(p, tokens, 0).flatten().bincount(minlength=p.experts).tolist())
        tasks += [lambda v=variant, n=n, p=p: cuda_plan.linear_plan(v, n, p.out_features, device) for n in counts if n]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda task: task(), tasks))


def rows_of(p: Projection, tokens: int, qw: QuantizedWeight, dense: Tensor) -> list[dict[str, Any]]:
    calls = [make_call(p, tokens, seed) for seed in range(CALLS[tokens])]
    first, y = calls[0], kernels.experts(calls[0].x, qw, calls[0].ids)
    assert y is not None, "a GPU that has a kernel for so many pairs"
    results = {"tqw": y.flatten(0, 1), "torch_bfloat16": unordered(grouped(first, dense), first.order)}
    if goes_by_expert(p, tokens):
        results["tqw_by_expert"] = by_expert(first, qw).flatten(0, 1)
    errors = check(first, qw, results)
    del results, y
    methods: dict[str, Sequence[Callable[[], Any]]] = {
        "tqw": [lambda c=c: kernels.experts(c.x, qw, c.ids) for c in calls],
        "torch_bfloat16": [lambda c=c: grouped(c, dense) for c in calls],
    }
    times = bench.graph_microseconds(methods)
    if "tqw_by_expert" in errors:
        times["tqw_by_expert"] = median_microseconds(lambda: by_expert(first, qw))
    return [
        {
            "model": p.model, "projection": p.projection, "tokens": tokens, "method": method,
            "microseconds": microseconds, "ratio": times["torch_bfloat16"] / microseconds,
            "relative_error": errors[method],
        }
        for method, microseconds in times.items()
    ]  # fmt: skip


@torch.inference_mode()
def measure(p: Projection) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    weight = torch.empty(p.experts, p.out_features, p.in_features, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
    qw = quantize(weight, QuantConfig(bits=4, scale="norm"))
    dense = weight  # the memory is the same, the values are those of qw
    for expert in range(p.experts):
        dense[expert] = dequantize(qw[expert])
    torch.cuda.empty_cache()
    for tokens in TOKENS:
        rows = rows_of(p, tokens, qw, dense)
        cells = (f"{row['method']} {row['microseconds']:8.1f} us ({row['ratio']:.2f})" for row in rows)
        sys.stderr.write(f"{p.model:14} {p.projection:8} {tokens:5}   {'   '.join(cells)}\n")
        yield from rows


def experts_of_transformers(up: Projection) -> torch.nn.Module:
    """The module of the model's own class, in bfloat16, with the grouped product."""
    hidden, middle = up.in_features, up.out_features // 2
    sizes = {"hidden_size": hidden, "num_experts_per_tok": up.choices, "hidden_act": "silu"}
    if up.model.startswith("Mixtral"):
        from transformers.models.mixtral import modeling_mixtral

        config = modeling_mixtral.MixtralConfig(intermediate_size=middle, num_local_experts=up.experts, **sizes)
        make = modeling_mixtral.MixtralExperts
    else:
        from transformers.models.qwen3_moe import modeling_qwen3_moe

        config = modeling_qwen3_moe.Qwen3MoeConfig(moe_intermediate_size=middle, num_experts=up.experts, **sizes)
        make = modeling_qwen3_moe.Qwen3MoeExperts
    config._experts_implementation = "grouped_mm"
    with torch.device("cuda"):
        module = make(config).bfloat16()
    for weight in module.parameters():
        weight.normal_(0, 0.02)
    return module.requires_grad_(False)


@torch.inference_mode()
def measure_layer(up: Projection) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    dense = experts_of_transformers(up)
    weights = {}
    for name in expert_projections(dense):
        weights[name] = quantize(expert_weight(dense, name), QuantConfig(bits=4, scale="norm"))
        for expert, values in enumerate(getattr(dense, name)):
            values.copy_(dequantize(weights[name][expert]))
    quantized = QuantizedExperts(dense, weights)
    torch.cuda.empty_cache()
    for tokens in TOKENS:
        calls = []
        for seed in range(CALLS[tokens]):
            x = torch.randn(tokens, up.in_features, device="cuda", dtype=torch.bfloat16)
            shares = torch.rand(tokens, up.choices, device="cuda").softmax(-1).bfloat16()
            calls.append((x, chosen_experts(up, tokens, seed), shares))
        # two products whose operands are rounded to 8 bits, 1 % each, and what bfloat16 rounds
        error = bench.checked_error("tqw", quantized(*calls[0]), dense(*calls[0]).double(), 5e-2)
        times = bench.graph_microseconds(
            {
                "tqw": [lambda c=c: quantized(*c) for c in calls],
                "torch_bfloat16": [lambda c=c: dense(*c) for c in calls],
            }
        )
        sys.stderr.write(f"{up.model:14} layer    {tokens:5}   {times}\n")
        for method, microseconds in times.items():
            yield {
                "model": up.model, "projection": "layer", "tokens": tokens, "method": method,
                "microseconds": microseconds, "ratio": times["torch_bfloat16"] / microseconds,
                "relative_error": error if method == "tqw" else 0.0,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu_experts.json"))
    output = parser.parse_args().output
    compile_all()
    layers = [p for p in PROJECTIONS if p.projection == "gate_up"]
    rows = []
    for measured in (*map(measure, PROJECTIONS), *map(measure_layer, layers)):
        rows += measured
        write_json(output, document(rows, shapes=[asdict(p) for p in PROJECTIONS]))


if __name__ == "__main__":
    main()
