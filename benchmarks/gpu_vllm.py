"""vLLM on a GPU, bfloat16 against 4 bits: results/gpu_vllm.json.

    python benchmarks/gpu_vllm.py [--models Llama-3-8B] [-o benchmarks/results/gpu_vllm.json]

Random weights in the shapes of gpu_model.py; 4-bit: linears of the layers at 4 bits, embedding and lm_head at 8. vLLM's
defaults (compiled, CUDA graphs, its own attention), prefix caching off, each measurement in a process of its own. A
decode step is the difference between two lengths, so without prompt; the first token is that of a prompt of 2,048.
"""

from __future__ import annotations

import argparse
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


def make(name: str, folder: Path) -> None:
    """folder/dense: a config, whose weights vLLM draws at random; folder/tqw: a quantized model."""
    import torch
    from gpu_model import SHAPES
    from gpu_transformers import build

    import tqw
    from tqw.pretrained import save

    model = build(next(shape for shape in SHAPES if shape.name == name))
    model.config.save_pretrained(folder / "dense")
    with torch.inference_mode():
        report = tqw.quantize_model(model, tqw.QuantConfig(bits="4", scale="norm", embedding=8, lm_head=8))
    save(model, folder / "tqw", report, None, calibrate="none")


def measure(folder: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    dummy = {"load_format": "dummy"} if folder.name == "dense" else {}
    begin = time.perf_counter()
    llm = LLM(
        str(folder), dtype="bfloat16", max_model_len=PROMPT + 128, max_num_seqs=max(BATCHES), skip_tokenizer_init=True,
        enable_prefix_caching=False, **dummy,
    )  # fmt: skip
    start = time.perf_counter() - begin

    def seconds(batch: int, prompt: int, new: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [10 + i] * prompt} for i in range(batch)]
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
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"))
    parser.add_argument("--measure", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make[0], Path(arguments.make[1]))
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))  # noqa: T201
        return
    from tqw.report import document, write_json

    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as temporary:
            run("--make", name, temporary)
            for method in ("dense", "tqw"):
                row = {"model": name, "method": method} | json.loads(run("--measure", str(Path(temporary, method))))
                rows.append(row)
                sys.stderr.write(f"{row}\n")
        write_json(arguments.output, document(rows))


if __name__ == "__main__":
    main()
