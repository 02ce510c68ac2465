"""What rounded activations cost: KLD of the demo model with float32 activations, with the CPU kernels' int8, and with
the CUDA backend's fp8, whose rounding (of T(x) and of V, see `_many_fp8`) is repeated here in float32.

python benchmarks/activations.py -o benchmarks/results/activations.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from tqw import kernels
from tqw.cli import _text
from tqw.config import QuantConfig
from tqw.evaluate import evaluate, reference_log_probabilities, windows
from tqw.kernels import cpu, cuda
from tqw.model import quantize_model
from tqw.pretrained import calibration_ids, calibration_power
from tqw.report import document
from tqw.source import DEMO, find, load_float, load_tokenizer
from tqw.weight import QuantizedWeight, sum_of_passes, transform


def fp8_linear(x: Tensor, qw: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """T(x) V^T + b with both operands rounded to e4m3: T(x) over a scale for each token, V times a power of two."""
    t = transform(x.float(), qw.channel_scale[0], qw.matrix(x))
    scale = (t.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    factor, back = cuda._fp8_scale(qw)
    v = (sum_of_passes(qw) * factor).to(torch.float8_e4m3fn).float()
    y = (t / scale).to(torch.float8_e4m3fn).float() @ v.T * back * scale
    return (y if bias is None else y + bias).to(x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--bits", default="4", help="comma-separated")
    parser.add_argument("--activations", default="float,int8,fp8", help="float is slow")
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
        quantize_model(quantized, QuantConfig(bits=bits, group_size=64), input_power=power)
        for activations in arguments.activations.split(","):
            if activations == "fp8":
                with mock.patch.object(kernels, "_choose", return_value=SimpleNamespace(linear=fp8_linear)):
                    quality = evaluate(quantized, ids, reference)
            else:
                os.environ["TQW_CPU_ACTIVATIONS"] = activations
                cpu.settings.cache_clear()
                quality = evaluate(quantized, ids, reference)
            rows.append({"bits": bits, "activations": activations, "mean_kl_divergence": quality.mean_kl_divergence})
            print(rows[-1], flush=True)  # noqa: T201
    if arguments.output:
        result = document(rows, model=DEMO, text=origin, tokens=ids.numel())
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
