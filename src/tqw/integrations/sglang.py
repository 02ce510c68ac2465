"""SGLang: `python -m sglang.launch_server --model OUT` of a directory that tqw quantized (dense models).

SGLang calls `register` in each of its processes (entry point group `sglang.srt.plugins`); `quant_method` in config.json
does the rest. What it registers is in sglang_layers.py.
"""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Make SGLang know the format. Called any number of times; the work is done once, by the import."""
    import_module("tqw.integrations.sglang_layers")
