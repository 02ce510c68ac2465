"""tqw: TurboQuant for LLM weights. See README.md; the equation is in `tqw.weight`.

Names are imported when first used, so that `import tqw` costs nothing and asks no hardware anything. The one thing that
it does is to see to it that transformers knows the format as soon as transformers is imported (registration.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tqw.registration import register

if TYPE_CHECKING:
    from tqw.allocation import allocate_bits
    from tqw.config import QuantConfig
    from tqw.errors import TqwError
    from tqw.integrations.transformers import TransformersConfig
    from tqw.kernels import dequantize, explain, linear
    from tqw.layer import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
    from tqw.model import quantize_model
    from tqw.pretrained import load, quantize_pretrained, save
    from tqw.training import fake_quantize_model, merge_lora
    from tqw.weight import QuantizedWeight, merge_passes, quantize

__version__ = "0.1.0"
__all__ = [
    "QuantConfig",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedWeight",
    "TqwError",
    "TransformersConfig",
    "allocate_bits",
    "dequantize",
    "explain",
    "fake_quantize_model",
    "linear",
    "load",
    "merge_lora",
    "merge_passes",
    "quantize",
    "quantize_model",
    "quantize_pretrained",
    "save",
]
_HOME = {
    "QuantConfig": "config",
    "TqwError": "errors",
    "TransformersConfig": "integrations.transformers",
    "allocate_bits": "allocation",
    "explain": "kernels",
    "linear": "kernels",
    "QuantizedEmbedding": "layer",
    "QuantizedExperts": "layer",
    "QuantizedLinear": "layer",
    "quantize_model": "model",
    "load": "pretrained",
    "quantize_pretrained": "pretrained",
    "save": "pretrained",
    "QuantizedWeight": "weight",
    "dequantize": "kernels",
    "fake_quantize_model": "training",
    "merge_lora": "training",
    "merge_passes": "weight",
    "quantize": "weight",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tqw' has no attribute {name!r}")
    value = getattr(import_module(f"tqw.{_HOME[name]}"), name)
    globals()[name] = value
    return value


register()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
