"""What rounded activations cost: KLD of the demo model with activations in float32, as the CPU kernels round them (8
bits, a scale for each 32 to 128 inputs), and as the CUDA kernel for 17 tokens and more does (8 bits with a scale for
each token, and weights of 8 bits with a scale for each row: int8.cu), repeated here in float32. Where CTAs of that
kernel share the inputs, each part has scales of its own, so that it loses less than here.

    export TQW_CPU_ISA=avx512
    python benchmarks/activations.py --bits 4,3,5 --max-tokens 8192 -o benchmarks/results/activations.json
    python benchmarks/activations.py --group-size 32 --max-tokens 8192 -o benchmarks/results/activations_32.json
    python benchmarks/activations.py --bits 8,6 --activations "float,int8 of a token" --max-tokens 8192 \
        -o benchmarks/results/activations_wide.json

A group's scale, which the kernel rounds to fp16, is not rounded here.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from torch import Tensor

from tqw import kernels
from tqw.cli import _text
from tqw.codebook import levels
from tqw.config import QuantConfig
from tqw.evaluate import evaluate, reference_log_probabilities, windows
from tqw.model import quantize_model
from tqw.pretrained import calibration_ids, calibration_power
from tqw.report import document
from tqw.source import DEMO, find, load_float, load_tokenizer
from tqw.weight import QuantizedWeight, sum_of_passes, transform


def float_linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b as it is."""
    t = transform(x.float(), qw.channel_scale[0], qw.matrix(x))
    y = t @ sum_of_passes(qw).T
    return (y if bias is None else y + bias).to(x.dtype)


def int8_linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b with both operands rounded to 8 bits: a scale for each token, one for each row of V."""
    t = transform(x.float(), qw.channel_scale[0], qw.matrix(x))
    step_of_t = (t.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    step_of_v = qw.weight_scale[0].float().abs().amax(-1, keepdim=True) * max(levels(qw.bits[0])) / 127
    v = (sum_of_passes(qw) / step_of_v.clamp(min=1e-30)).round() * step_of_v
    y = (t / step_of_t).round() * step_of_t @ v.T
    return (y if bias is None else y + bias).to(x.dtype)


LINEARS = {"float": float_linear, "int8 of a token": int8_linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--bits", default="4", help="comma-separated")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--activations", default="float,int8,int8 of a token", help="comma-separated")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    source = find(DEMO)
    model, tokenizer = load_float(source), load_tokenizer(source)
    text, origin = _text(None)
    ids = windows(tokenizer, text, 1024, arguments.max_tokens)
    reference = reference_log_probabilities(model, ids)
    power = calibration_power(model, calibration_ids(model, tokenizer, "self", "rtn"))
    rows = []
    for bits in arguments.bits.split(","):
        quantized = copy.deepcopy(model)
        quantize_model(quantized, QuantConfig(bits=bits, group_size=arguments.group_size), input_power=power)
        for activations in arguments.activations.split(","):
            linear = LINEARS.get(activations)
            choice = mock.patch.object(kernels, "_choose", return_value=SimpleNamespace(linear=linear))
            with choice if linear else nullcontext():
                quality = evaluate(quantized, ids, reference)
            rows.append({"bits": bits, "activations": activations, "mean_kl_divergence": quality.mean_kl_divergence})
            print(rows[-1], flush=True)  # noqa: T201
    if arguments.output:
        result = document(rows, model=DEMO, text=origin, tokens=ids.numel(), group_size=arguments.group_size)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
