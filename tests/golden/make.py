"""Writes the golden files of tests/test_weight.py. Run it only when the format changes: python tests/golden/make.py"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tqw import QuantConfig, dequantize, quantize

# An exact, library-independent weight: a linear congruential sequence mapped to (-1, 1) and made a little spiky.
state, values = 12345, []
for _ in range(3 * 64):
    state = (1103515245 * state + 12345) % 2**31
    x = state / 2**30 - 1
    values.append(x * abs(x))
weight = torch.tensor(values, dtype=torch.float32).view(3, 64)

for bits in ("2", "3", "4", "5", "6", "8", "4+4", "3+2"):
    qw = quantize(weight, QuantConfig(bits=bits, group_size=32))  # type: ignore[arg-type]
    tensors = {"weight": weight, "dense": dequantize(qw)}
    for name in ("packed", "weight_scale", "channel_scale"):
        tensors |= {f"{name}.{index}": tensor for index, tensor in enumerate(getattr(qw, name))}
    save_file(tensors, Path(__file__).parent / f"weight_{bits}.safetensors")
