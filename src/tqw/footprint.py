"""Decode speed and peak memory of a saved model, measured in a process of its own.

    python -m tqw.footprint DIR      prints {"decode_tokens_per_second": ..., "peak_memory_bytes": ...}

Peak memory is the growth of the process's resident memory (GPU: of allocated device memory) from before the load to
its highest point in load, a forward pass of PROMPT tokens and greedy decoding: what the model itself costs. Python,
torch and the model's code are imported before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
import torch

from tqw.errors import TqwError
from tqw.pretrained import empty_model, load
from tqw.source import find, is_quantized, load_float

PROMPT = 128
_MOST_TOKENS, _LEAST_TOKENS, _SECONDS = 64, 3, 4.0


class _PeakMemory:
    """Samples resident memory every 2 ms in a thread."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def growth(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self._peak, self._process.memory_info().rss) - self._start


@torch.inference_mode()
def decode_speed(model: Any, prompt_tokens: int = PROMPT) -> float:
    """Greedy tokens per second after a prompt, batch 1: at least 3 tokens, at most 64 or 4 seconds."""
    device = next(model.parameters()).device
    ids = torch.arange(10, 10 + prompt_tokens, device=device)[None] % model.config.get_text_config().vocab_size
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    output = model(input_ids=ids, use_cache=True, **last_only)  # as `generate` calls it
    times: list[float] = []
    while len(times) < _MOST_TOKENS and (len(times) < _LEAST_TOKENS or sum(times) < _SECONDS):
        step = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        output.logits.sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    times.sort()
    return 1 / times[len(times) // 2]


def footprint(folder: str, device: str = "cpu") -> dict[str, Any]:
    """Measure in this process."""
    source = find(folder)
    model = empty_model(source)
    torch.ones(256, 256).mm(torch.ones(256, 256))  # starts the threads
    del model
    memory = _PeakMemory()
    model = load(folder, device) if is_quantized(source) else load_float(source, device=device)
    speed = decode_speed(model)
    peak = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else memory.growth()
    return {"decode_tokens_per_second": speed, "peak_memory_bytes": peak}


def footprint_in_subprocess(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Measure in a fresh process, so that nothing already loaded counts or helps."""
    command = [sys.executable, "-m", "tqw.footprint", str(folder), device]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise TqwError(f"expected to measure {folder} in a new process, but it failed: {result.stderr.strip()[-400:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(footprint(*sys.argv[1:])))  # noqa: T201
