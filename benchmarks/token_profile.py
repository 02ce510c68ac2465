"""Where the milliseconds of one generated token go: our layers, and everything else in transformers.

    python benchmarks/token_profile.py MODEL [-o benchmarks/results/token_profile.json]

MODEL: a directory that `tqw quantize` wrote. Medians over 60 tokens behind 128 others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tqw.kernels import cpu
from tqw.layer import QuantizedLinear
from tqw.pretrained import load
from tqw.report import document, write_json

TOKENS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    model: Any = load(arguments.model)
    spent = {"layers": 0.0, "kernels": 0.0}
    inside = {"layers": False, "kernels": False}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside[name]:
                return function(*args, **kwargs)
            inside[name], start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start
                inside[name] = False

        return call

    QuantizedLinear.forward = timed("layers", QuantizedLinear.forward)  # type: ignore[method-assign]
    cpu.linear, cpu.linears = timed("kernels", cpu.linear), timed("kernels", cpu.linears)
    rows: list[tuple[float, float, float]] = []
    with torch.inference_mode():
        output = model(input_ids=torch.arange(10, 138)[None], use_cache=True, logits_to_keep=1)
        for _ in range(TOKENS):
            step = output.logits[:, -1:].argmax(-1)
            spent.update(layers=0.0, kernels=0.0)
            start = time.perf_counter()
            output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
            rows.append((time.perf_counter() - start, spent["layers"], spent["kernels"]))
    total, layers, kernels = (1e3 * statistics.median(column) for column in zip(*rows, strict=True))
    row = {"kernels": kernels, "our_python": layers - kernels, "the_rest": total - layers, "one_token": total}
    print(" ".join(f"{name} {value:.1f} ms" for name, value in row.items()))  # noqa: T201
    if arguments.output:
        write_json(arguments.output, document([row], unit="milliseconds", tokens=TOKENS))


if __name__ == "__main__":
    main()
