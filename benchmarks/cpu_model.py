"""Whole-model speed on the CPU: the demo model in transformers (float32, bfloat16, tqw) and in llama.cpp, taking turns.

    python benchmarks/cpu_model.py --rounds 3 -o benchmarks/results/cpu_model.json

Each measurement is a process of its own: prefill of 512 tokens, then greedy decoding of 64, batch 1, medians over the
rounds. llama.cpp rows need llama-cpp-python; its 4-bit files are requantized from the demo file by its own quantizer
(a type that a tensor's width does not allow falls back as llama.cpp decides).
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

import torch

PREFILL, DECODE = 512, 64
LLAMA_TYPES = {"q4_1": None, "iq4_nl": 25, "q4_k_m": 15}  # llama_ftype; None: the demo file itself
FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tqw" / "cpu_model"


def transformers_speed(name: str) -> dict[str, float]:
    from tqw.footprint import decode_speed
    from tqw.pretrained import load
    from tqw.source import DEMO, find, load_float

    if name.startswith("tqw"):
        model = load(FOLDER / name)
    else:
        model = load_float(find(DEMO), dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[name])
    ids = torch.arange(10, 10 + PREFILL)[None]
    times = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            times.append(time.perf_counter() - start)
    return {"prefill": PREFILL / statistics.median(times[1:]), "decode": decode_speed(model)}


def llama_file(kind: str) -> Path:
    import llama_cpp

    from tqw.source import demo_model

    source, code = demo_model(), LLAMA_TYPES[kind]
    if code is None:
        return source
    target = FOLDER / f"{kind}.gguf"
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = code, True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
            raise RuntimeError(f"llama.cpp could not write {target}")
    return target


def llama_speed(kind: str) -> dict[str, float]:
    import llama_cpp

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(llama_file(kind)), n_ctx=1024, n_batch=PREFILL, n_ubatch=PREFILL, n_threads=threads,
        n_threads_batch=threads, logits_all=False, verbose=False,
    )  # fmt: skip
    ids, times = list(range(10, 10 + PREFILL)), []
    for _ in range(4):
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        times.append(time.perf_counter() - start)
    model.reset()
    model.eval(ids[:128])
    steps = []
    for token in range(DECODE):
        start = time.perf_counter()
        model.eval([100 + token])
        steps.append(time.perf_counter() - start)
    return {"prefill": PREFILL / statistics.median(times[1:]), "decode": 1 / statistics.median(steps)}


def prepare() -> None:
    from tqw.config import QuantConfig
    from tqw.pretrained import quantize_pretrained
    from tqw.source import DEMO

    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, settings in {"tqw_4bit": {}, "tqw_4bit_head8": {"lm_head": "8", "embedding": "8"}}.items():
        if not (FOLDER / name).exists():
            quantize_pretrained(DEMO, FOLDER / name, QuantConfig(group_size=64, **settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--one")
    arguments = parser.parse_args()
    if arguments.one:
        name = arguments.one
        speeds = llama_speed(name.removeprefix("llama_")) if name.startswith("llama_") else transformers_speed(name)
        print(json.dumps(speeds))  # noqa: T201
        return
    prepare()
    from tqw.report import document

    names = ["float32", "bfloat16", "tqw_4bit", "tqw_4bit_head8", *(f"llama_{kind}" for kind in LLAMA_TYPES)]
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
                print(f"{name}: {lines[-1]}", file=sys.stderr)  # noqa: T201
                continue
            speeds[name].append(json.loads(result.stdout.strip().splitlines()[-1]))
    rows = [
        {"method": name, **{f"{key}_tokens_per_second": statistics.median(r[key] for r in runs) for key in runs[0]}}
        for name, runs in speeds.items()
        if runs
    ]
    text = json.dumps(document(rows), indent=1)
    print(text)  # noqa: T201
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
