"""vLLM on a GPU, bfloat16 against 4 bits: results/gpu_vllm.json.

    python benchmarks/gpu_vllm.py [--models Llama-3-8B] [--methods dense tqw] [-o benchmarks/results/gpu_vllm.json]

Random weights in the shapes of gpu_model.py, or Qwen3-30B-A3B's; 4-bit: linears of the layers at 4 bits, embedding and
lm_head at 8. vLLM's defaults (compiled, CUDA graphs, its own attention), prefix caching off, each measurement in a
process of its own. A decode step is the difference between two lengths, so without prompt; the first token is that of
a prompt of 2,048. Rows of other models and methods stay in the output file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHORT, LONG, PROMPT, REPEATS = 16, 80, 2048, 3
BATCHES = (1, 16, 64)


def make(name: str, method: str, folder: Path) -> None:
    """dense: a config, whose weights vLLM draws at random; tqw: a quantized model."""
    import torch
    from gpu_transformers import build, configuration

    import tqw
    from tqw.pretrained import save

    model = build(configuration(name), "meta" if method == "dense" else "cuda")
    if method == "dense":
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        return
    with torch.inference_mode():
        report = tqw.quantize_model(model, tqw.QuantConfig(bits="4", scale="norm", embedding=8, lm_head=8))
    save(model, folder, report, None, calibrate="none")


def measure(method: str, folder: Path) -> dict[str, Any]:
    import numpy
    from vllm import LLM, SamplingParams

    dummy = {"load_format": "dummy"} if method == "dense" else {}
    begin = time.perf_counter()
    llm = LLM(
        str(folder), dtype="bfloat16", max_model_len=PROMPT + 128, max_num_seqs=max(BATCHES), skip_tokenizer_init=True,
        enable_prefix_caching=False, **dummy,
    )  # fmt: skip
    start, draw = time.perf_counter() - begin, numpy.random.default_rng(0)

    def seconds(batch: int, prompt: int, new: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        # random: a mixture sends equal tokens to the same experts
        prompts = [{"prompt_token_ids": draw.integers(10, 30000, prompt).tolist()} for _ in range(batch)]
        begin = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
        return time.perf_counter() - begin

    result: dict[str, Any] = {"start_seconds": start}
    for batch in BATCHES:
        seconds(batch, 128, SHORT)
        steps = [seconds(batch, 128, LONG) - seconds(batch, 128, SHORT) for _ in range(REPEATS)]
        step = statistics.median(steps) / (LONG - SHORT)
        result |= {f"decode_milliseconds_{batch}": 1e3 * step, f"decode_tokens_per_second_{batch}": batch / step}
    seconds(1, PROMPT, 1)
    result["first_token_milliseconds"] = 1e3 * statistics.median(seconds(1, PROMPT, 1) for _ in range(2 * REPEATS))
    return result


def run(*arguments: str) -> str:
    """This file in a process of its own: what it prints last."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # greedy: nothing to sample
    result = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/gpu_vllm.json"))
    parser.add_argument("--models", nargs="*", default=["Llama-3-8B"])
    parser.add_argument("--methods", nargs="*", default=["dense", "tqw"])
    parser.add_argument("--make", nargs=3, metavar=("MODEL", "METHOD", "FOLDER"))
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.make:
        name, method, folder = arguments.make
        make(name, method, Path(folder))
        return
    if arguments.measure:
        method, folder = arguments.measure
        print(json.dumps(measure(method, Path(folder))))  # noqa: T201
        return
    from tqw.report import document, write_json

    for name, method in itertools.product(arguments.models, arguments.methods):
        with tempfile.TemporaryDirectory() as temporary:
            run("--make", name, method, temporary)
            row = {"model": name, "method": method} | json.loads(run("--measure", method, temporary))
        sys.stderr.write(f"{row}\n")
        rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
        others = [row for row in rows if (row["model"], row["method"]) != (name, method)]
        write_json(arguments.output, document([*others, row]))


if __name__ == "__main__":
    main()
