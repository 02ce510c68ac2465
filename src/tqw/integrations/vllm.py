"""vLLM: `vllm serve OUT` of a directory that tqw quantized.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`); `quant_method` in config.json
does the rest. What it registers is in vllm_layers.py.
"""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make vLLM know the format. Called any number of times; the work is done once, by the import."""
    import_module("tqw.integrations.vllm_layers")
