"""Where the milliseconds of one generated token go: our layers, and everything else in transformers.

python benchmarks/token_profile.py OUT       a directory that `tqw quantize` wrote
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tqw.kernels import cpu
from tqw.layer import QuantizedLinear
from tqw.pretrained import load

TOKENS = 60


def main(folder: str) -> None:
    model: Any = load(folder)
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
    parts = f"kernels {kernels:.1f}, our Python around them {layers - kernels:.1f}, the rest {total - layers:.1f}"
    print(f"one token {total:.1f} ms: {parts}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
