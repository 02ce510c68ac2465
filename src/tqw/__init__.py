"""tqw: TurboQuant for LLM weights. See README.md; the equation is in `tqw.weight`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.kernels import explain, linear
from tqw.layer import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from tqw.model import quantize_model
from tqw.weight import QuantizedWeight, dequantize, quantize

if TYPE_CHECKING:
    from tqw.pretrained import load, quantize_pretrained, save

__version__ = "0.1.0"
__all__ = [
    "QuantConfig",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedWeight",
    "TqwError",
    "dequantize",
    "explain",
    "linear",
    "load",
    "quantize",
    "quantize_model",
    "quantize_pretrained",
    "save",
]


def __getattr__(name: str) -> Any:
    """`load`, `save` and `quantize_pretrained` belong to the edge: imported when first used."""
    if name in ("load", "save", "quantize_pretrained"):
        return getattr(import_module("tqw.pretrained"), name)
    raise AttributeError(f"module 'tqw' has no attribute {name!r}")
