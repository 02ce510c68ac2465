"""`generate` of transformers on a GPU, bfloat16 against 4 bits: results/gpu_transformers.json.

    python benchmarks/gpu_transformers.py [--models Llama-3-8B Qwen3-4B] [-o benchmarks/results/gpu_transformers.json]

Random weights in the shapes of gpu_model.py, or Qwen3-30B-A3B's, in transformers' own modules, untouched but for
quantize_model (linears of the layers at 4 bits, embedding and lm_head at 8). "static cache": what
generate(cache_implementation="static") does by itself, one compiled step in a CUDA graph; "dynamic cache": generate's
default, Python launching kernel by kernel. A token's time is the difference between two lengths, so without prompt;
the prompt has 128 tokens for each sequence. Rows of other models stay in the output file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_model import SHAPES

import tqw
from tqw.report import document, write_json

PROMPT, SHORT, LONG, REPEATS = 128, 16, 64, 3
MIXTURE = "Qwen3-30B-A3B"


def configuration(name: str) -> Any:
    """transformers' config of the model."""
    if name == MIXTURE:
        return transformers.Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
            norm_topk_prob=True, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    shape = next(shape for shape in SHAPES if shape.name == name)
    kind = "Qwen3" if shape.name.startswith("Qwen3") else "Llama"
    return getattr(transformers, f"{kind}Config")(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head, tie_word_embeddings=shape.tied, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def build(config: Any, device: str = "cuda") -> Any:
    """The model of transformers in bfloat16, random weights."""
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def milliseconds_per_token(model: Any, batch: int, static: bool) -> float:
    ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), device="cuda")
    options = {"cache_implementation": "static"} if static else {}

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        y = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
        )
        torch.cuda.synchronize()
        assert y.shape == (batch, PROMPT + new)
        return time.perf_counter() - begin

    for new in (LONG, SHORT):  # compiled, captured
        seconds(new)
    differences = [seconds(LONG) - seconds(SHORT) for _ in range(REPEATS)]
    return 1e3 * statistics.median(differences) / (LONG - SHORT)


def measure(name: str) -> list[dict[str, Any]]:
    rows = []
    for bits in (16, 4):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = build(configuration(name))
        if bits < 16:
            tqw.quantize_model(model, tqw.QuantConfig(bits=str(bits), scale="norm", embedding=8, lm_head=8))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for batch, static in ((1, True), (16, True), (1, False)):
            milliseconds = milliseconds_per_token(model, batch, static)
            row = {
                "model": name, "bits": bits, "cache": "static" if static else "dynamic", "batch": batch,
                "milliseconds": milliseconds, "tokens_per_second": batch / milliseconds * 1e3,
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            }  # fmt: skip
            rows.append(row)
            sys.stderr.write(f"{row}\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu_transformers.json"))
    parser.add_argument("--models", nargs="*", default=[shape.name for shape in SHAPES])
    arguments = parser.parse_args()
    for name in arguments.models:
        rows = measure(name)
        kept = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
        write_json(arguments.output, document([*(row for row in kept if row["model"] != name), *rows]))


if __name__ == "__main__":
    main()
