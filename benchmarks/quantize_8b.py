"""Time and memory of quantizing an 8B model: Llama-3-8B's shapes, randomly initialised on the device in bfloat16.

    python benchmarks/quantize_8b.py --method gptq --device cuda -o benchmarks/results/quantize_8b_gptq.json

Random weights cost as much to quantize as trained ones; what the model is worth afterwards is not measured. Timed are
calibration (text that the model samples from itself, its statistics) and quantization with the public functions, not
loading and saving. --layers 2 times a part: `seconds_per_layer` then says what a layer costs.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch

from tqw.allocation import allocate_bits
from tqw.config import QuantConfig
from tqw.model import quantize_model
from tqw.pretrained import calibration_ids, calibration_power, method_options, sensitivity_of
from tqw.report import document, write_json

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}


def random_model(layers: int, device: str, shape: dict[str, int]) -> torch.nn.Module:
    import transformers as hf

    config = hf.LlamaConfig(
        **shape, num_hidden_layers=layers, vocab_size=128256, bos_token_id=1, eos_token_id=2, use_cache=True
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return hf.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


class Clock:
    """Seconds of each phase, with the device's work finished."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.phases: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, phase: str) -> None:
        now = self.now()
        self.phases[phase], self.last = now - self.last, now
        print(f"{phase}: {self.phases[phase]:.1f} s", flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="rtn", choices=["rtn", "gptq"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--target-bpw", type=float)
    parser.add_argument("--calibrate", default="self")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="an eighth of each dimension, to try the script")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()

    model = random_model(arguments.layers, arguments.device, SMALL if arguments.small else SHAPE)
    model_bytes = sum(p.nbytes for p in model.parameters())
    config = QuantConfig(bits=arguments.bits, group_size=arguments.group_size)
    clock = Clock(arguments.device)
    ids = calibration_ids(model, None, arguments.calibrate, arguments.method)
    clock.mark("sample")
    power = calibration_power(model, ids)
    clock.mark("input_power")
    if arguments.target_bpw:
        sensitivity = sensitivity_of(model, ids, power)
        config = allocate_bits(model, arguments.target_bpw, config, sensitivity=sensitivity or None)
        clock.mark("allocate")
    options = method_options(arguments.method, model, ids, power)
    report = quantize_model(model, config, input_power=power or None, **options)
    clock.mark("quantize")
    peak = (
        torch.cuda.max_memory_allocated() if clock.cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    row = {
        "method": arguments.method,
        "bits_per_weight": report.bits_per_weight(),
        "weights": sum(record.weights for record in report.quantized),
        "layers": arguments.layers,
        "seconds": sum(clock.phases.values()),
        "seconds_per_layer": clock.phases["quantize"] / arguments.layers,
        "phases": clock.phases,
        "model_bytes": model_bytes,
        "peak_memory_bytes": peak,
    }
    print(row)  # noqa: T201
    if arguments.output:
        write_json(arguments.output, document([row], shape=SMALL if arguments.small else SHAPE))


if __name__ == "__main__":
    main()
