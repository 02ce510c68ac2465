"""The comparison with other quantizers: one float model, one text, one harness, every method in its own process.

    python benchmarks/quality/run.py --peers PEER_PYTHON [--rows REGEX] [--renew] [--max-tokens 4096] [--work DIR]

Every method gets the same float weights (decoder linears only) and, where it calibrates, the same sequences, which the
model wrote itself. What a peer stores is dequantized by its own code; all are scored by `tqw.evaluate`, the code of
`tqw eval DIR --reference FLOAT`. Writes benchmarks/results/quality_peers.json after each row; rows that are there
already are kept, unless --renew. A method that fails is a row with the error. `picture.py` draws the result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tqw import calibrate
from tqw.cli import _text
from tqw.evaluate import evaluate, reference_log_probabilities, windows
from tqw.pretrained import load
from tqw.report import document, write_json
from tqw.source import find, is_quantized, load_float, load_tokenizer

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "quality_peers.json"
CONTEXT = 1024
SEQUENCES, LENGTH = 32, 256
OURS = ("original", "4", "4:calibrate=none", "3", "5", "6", "8")
FEEDBACK = (
    "4:method=gptq", "target=4.6:method=gptq", "4:method=gptq:calibrate=none",
    "3:method=gptq", "5:method=gptq", "6:method=gptq",
)  # fmt: skip
PEERS = (  # names of peers.py, the telling ones first
    "bitsandbytes NF4", "sinq 4", "sinq 4 NF4", "hqq 4", "torchao intx 4",
    "llama.cpp Q4_K_M", "llama.cpp Q4_K_M imatrix", "llama.cpp IQ4_XS", "llama.cpp IQ4_XS imatrix",
    "llama.cpp Q5_K_M", "llama.cpp Q6_K", "llama.cpp Q8_0",
    "GPTQModel 4", "GPTQModel 4 asymmetric", "GPTQModel 4 act-order", "auto-round 4", "auto-round 4, 200 steps",
    "llama.cpp IQ4_NL imatrix", "llama.cpp Q3_K_M imatrix", "llama.cpp Q5_K_M imatrix",
    "sinq 3", "hqq 3", "sinq 5", "sinq 6", "hqq 8", "torchao intx 4 hqq", "bitsandbytes NF4, double",
    "torchao int4 hqq", "torchao int4 GPTQ", "torchao intx 4 AWQ", "GPTQModel 3 asymmetric",
    "llama.cpp Q3_K_M", "llama.cpp IQ4_NL", "llama.cpp Q4_0", "llama.cpp Q5_0", "llama.cpp Q4_1",
)  # fmt: skip


def quantized(python: str, script: str, name: str, work: Path, seconds: int) -> tuple[Path, dict[str, Any]]:
    """Run one method in a process of its own; (directory, facts), with `error` among them when it failed."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [python, str(HERE / script), name, str(work / "float"), str(work / "calibration.json"), str(out)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds, env=variables, cwd=work
        )
    except subprocess.TimeoutExpired:
        return out, {"error": f"not done after {seconds} s"}
    if result.returncode:
        lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
        return out, {"error": (lines[-1] if lines else f"exit code {result.returncode}")[:400]}
    return out, json.loads((out / "peer.json").read_text())


def prepare(work: Path, model: str) -> tuple[Any, Any]:
    """The float model as a directory, and the calibration sequences; both kept in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    source = find(str(work / "float") if (work / "float").exists() else model)
    loaded, tokenizer = load_float(source), load_tokenizer(source)
    if not (work / "float").exists():
        loaded.save_pretrained(work / "float")
        tokenizer.save_pretrained(work / "float")
    if not (work / "calibration.json").exists():
        ids = calibrate.self_generated(loaded, tokenizer, SEQUENCES, LENGTH)
        (work / "calibration.json").write_text(json.dumps(ids.tolist()))
    return loaded, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers", type=os.path.abspath, default=sys.executable, help="the python of the peers' environment"
    )
    parser.add_argument("--rows", default="", help="only methods whose name matches")
    parser.add_argument("--renew", action="store_true", help="measure those rows again")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=int, default=3600, help="the most that one method may take")
    arguments = parser.parse_args()

    work = arguments.work.resolve()
    model, tokenizer = prepare(work, arguments.model)
    words, origin = _text(None)
    ids = windows(tokenizer, words, CONTEXT, arguments.max_tokens)
    reference = reference_log_probabilities(model, ids)
    rows = {"float": {"config": "float", "bits_per_weight": 32.0, **asdict(evaluate(model, ids, reference))}}
    del model
    if arguments.out.exists():
        old = json.loads(arguments.out.read_text())
        if old["tokens"] == ids.numel():
            rows = {row["config"]: row for row in old["rows"]}
    wanted = [(name, sys.executable, "ours.py") for name in OURS]
    wanted += [(name, arguments.peers, "peers.py") for name in PEERS]
    wanted += [(name, sys.executable, "ours.py") for name in FEEDBACK]  # the slow ones last
    for name, python, script in wanted:
        label = f"tqw {name}" if script == "ours.py" and name != "original" else name
        if not re.search(arguments.rows, label) or (label in rows and not arguments.renew):
            continue
        out, facts = quantized(python, script, name, work, arguments.seconds)
        row = {"config": label, **facts}
        if "error" not in facts:
            source = find(str(out))
            row |= asdict(evaluate(load(out) if is_quantized(source) else load_float(source), ids, reference))
        rows[label] = row
        order = {name: index for index, name in enumerate(["float", *OURS, *FEEDBACK, *PEERS])}
        ordered = sorted(rows.values(), key=lambda row: order.get(row["config"].removeprefix("tqw "), 99))
        extra = {"model": arguments.model, "text": origin, "context": CONTEXT, "tokens": ids.numel(), "group_size": 64}
        write_json(arguments.out, document(ordered, **extra))
        print(label, {k: v for k, v in row.items() if k not in ("config", "versions")}, flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
