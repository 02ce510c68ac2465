"""Whole-model speed in vLLM on the CPU: the demo model dense and in 4 bits, taking turns.

    make .venv-vllm/ready
    .venv-vllm/bin/python benchmarks/vllm_model.py --rounds 3 -o benchmarks/results/vllm_model.json

Each measurement is a process of its own with vLLM's defaults (compiled, its own engine process), prefix caching off:
the time to the first token of a prompt of 512 tokens, then greedy decoding of 64, batch 1. Medians over the rounds.
`dense` is `tqw export` of the 4-bit model, so both compute the same function; head8 has embedding and head at 8 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, DECODE, REPEATS = 512, 64, 5
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tqw" / "vllm_model"
METHODS = {
    "dense_float32": ("dense", "float32"),
    "tqw_4bit_float32": ("tqw_4bit", "float32"),
    "tqw_4bit_head8_float32": ("tqw_4bit_head8", "float32"),
    "dense_bfloat16": ("dense", "bfloat16"),
    "tqw_4bit_bfloat16": ("tqw_4bit", "bfloat16"),
    "tqw_4bit_head8_bfloat16": ("tqw_4bit_head8", "bfloat16"),
}


def measure(name: str, eager: bool) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    folder, dtype = METHODS[name]
    llm = LLM(
        str(FOLDER / folder), dtype=dtype, max_model_len=1024, max_num_seqs=1, skip_tokenizer_init=True,
        enable_prefix_caching=False, enforce_eager=eager,
    )  # fmt: skip

    def seconds(tokens: int, start: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": list(range(start, start + PROMPT))}
        begin = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(4, 10)  # compiles
    first = [seconds(1, 100 + i) for i in range(REPEATS)]
    whole = [seconds(1 + DECODE, 200 + i) for i in range(REPEATS)]
    step = (statistics.median(whole) - statistics.median(first)) / DECODE
    return {"first_token_milliseconds": 1e3 * statistics.median(first), "decode_tokens_per_second": 1 / step}


def prepare(methods: list[str]) -> None:
    import torch

    from tqw.config import QuantConfig
    from tqw.pretrained import export, quantize_pretrained
    from tqw.source import DEMO

    FOLDER.mkdir(parents=True, exist_ok=True)
    needed = {METHODS[name][0] for name in methods} | {"tqw_4bit"}
    for name, settings in {"tqw_4bit": {}, "tqw_4bit_head8": {"lm_head": "8", "embedding": "8"}}.items():
        if name in needed and not (FOLDER / name).exists():
            quantize_pretrained(DEMO, FOLDER / name, QuantConfig(group_size=64, **settings), calibrate="none")
    if not (FOLDER / "dense").exists():
        export(FOLDER / "tqw_4bit", FOLDER / "dense", torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.eager)))  # noqa: T201
        return
    prepare(arguments.methods)
    from tqw.report import document

    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.methods}
    for _ in range(arguments.rounds):
        for name in arguments.methods:
            command = [sys.executable, __file__, "--one", name, *(["--eager"] if arguments.eager else [])]
            result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
            if result.returncode or not lines:
                print(f"{name}: {result.stderr.strip()[-2000:]}", file=sys.stderr)  # noqa: T201
                continue
            found[name].append(json.loads(lines[-1]))
            print(name, lines[-1], file=sys.stderr)  # noqa: T201
    rows = [
        {"method": name, **{key: statistics.median(run[key] for run in runs) for key in runs[0]}, "rounds": len(runs)}
        for name, runs in found.items()
        if runs
    ]
    text = json.dumps(document(rows), indent=1)
    print(text)  # noqa: T201
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
