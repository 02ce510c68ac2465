"""`tqw demo`: quantize, compare, save, reload and talk, on SmolLM2-135M-Instruct."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqw.compare import Comparison, parse_recipe
from tqw.config import QuantConfig
from tqw.evaluate import BASELINES, windows
from tqw.generate import generate
from tqw.pretrained import load
from tqw.report import Row
from tqw.source import DEMO, find, load_float, load_tokenizer

PROMPT = "Explain in a short paragraph why the sky is blue."
_CONFIGS = ("4", "original", "nf4", "rtn", "q8_0", "5", "6", "8", "4+4")  # quick and telling numbers first
_CONTEXT = 1024
_NEW_TOKENS = 48
_GROUP = 64  # 576 = 64 x 9 inputs: no larger group divides them

Say = Callable[[str], None]


@dataclass
class Story:
    """What the demo measured and what the two models said."""

    context: int
    tokens: int
    group_size: int
    rows: list[Row] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def run(
    output: Path,
    text: str,
    max_tokens: int,
    on_row: Callable[[Row], None],
    progress: Callable[[str, int, int], None],
    say: Say,
) -> Story:
    """Everything but the report's files; the 4-bit model is saved in output/model."""
    began = time.perf_counter()
    folder = output / "model"
    if folder.exists():
        shutil.rmtree(folder)  # the demo's own output of an earlier run
    source = find(DEMO)
    say("loading SmolLM2-135M-Instruct")
    model, tokenizer = load_float(source), load_tokenizer(source)
    ids = windows(tokenizer, text, _CONTEXT, max_tokens)
    comparison = Comparison(model, tokenizer, ids, True, progress)
    say(f"comparing on {ids.numel()} tokens; every config is quantized, saved, and timed in a process of its own")
    on_row(comparison.float_row())
    for label in _CONFIGS:
        if label in BASELINES:
            row = comparison.baseline_row(label, QuantConfig(group_size=_GROUP))
        else:
            row = comparison.recipe_row(parse_recipe(label, _GROUP), keep=folder if label == "4" else None)
        on_row(row)
    say(f"reloading the 4-bit model from {folder} and asking both: {PROMPT}")
    texts = {
        "float": generate(model, tokenizer, PROMPT, _NEW_TOKENS, on_token=progress)[0],
        "4-bit": generate(load(folder), tokenizer, PROMPT, _NEW_TOKENS, on_token=progress)[0],
    }
    seconds = time.perf_counter() - began
    say(f"done in {seconds:.0f} s")
    return Story(_CONTEXT, ids.numel(), _GROUP, comparison.rows, texts, seconds)
