"""What the CPU kernels' int8 activations cost: KLD of the demo model with int8 and with float32 activations.

python benchmarks/activations.py -o benchmarks/results/activations.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path

from tqw.cli import _text
from tqw.config import QuantConfig
from tqw.evaluate import evaluate, reference_log_probabilities, windows
from tqw.kernels import cpu
from tqw.model import quantize_model
from tqw.pretrained import calibration_power
from tqw.report import document
from tqw.source import DEMO, find, load_float, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    source = find(DEMO)
    model, tokenizer = load_float(source), load_tokenizer(source)
    text, origin = _text(None)
    ids = windows(tokenizer, text, 1024, arguments.max_tokens)
    reference = reference_log_probabilities(model, ids)
    power = calibration_power(model, tokenizer, "self")
    rows = []
    for bits in ("4", "5", "6", "8"):
        quantized = copy.deepcopy(model)
        quantize_model(quantized, QuantConfig(bits=bits, group_size=64), input_power=power)
        for activations in ("float", "int8"):
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
