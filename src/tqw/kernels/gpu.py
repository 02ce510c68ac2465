"""What the GPU backends have in common: what they ask of a call's tensors, and the size of the GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tqw.weight import QuantizedWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(x: Tensor, qw: QuantizedWeight) -> str | None:
    """None, or why these tensors need another backend."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, float16 or bfloat16"
    if qw.packed[0].ndim != 2:
        return f"the weight has {qw.packed[0].ndim} dimensions, not 2"
    for tensor in (*qw.packed, *qw.weight_scale, *qw.channel_scale):
        if tensor.device != x.device:
            return f"the weight is on {tensor.device}, x on {x.device}"
        if not tensor.is_contiguous():
            return "the weight is not contiguous"
    return None


def supports_rotation(qw: QuantizedWeight) -> str | None:
    """None, or why T(x) is not the same for all passes or not a Hadamard transform."""
    if qw.rotation == "qr" or not qw.shares_rotation:
        return "its passes have different rotations or a stored matrix"
    return None


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; 1 for a CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
