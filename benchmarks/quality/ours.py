"""tqw's side of the comparison: one process quantizes one model by one CONFIG, with the same interface as peers.py.

    python ours.py CONFIG FLOAT_DIR CALIBRATION.json OUT_DIR

The calibration sequences are given, as they are to the peers, so the seconds are those of statistics and quantization.
`method=gptq` sees all of them, `rtn` the first 128 tokens of eight: the defaults of `tqw quantize`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peers import peak_memory

from tqw.calibrate import LENGTH, SEQUENCES
from tqw.compare import Comparison, parse_recipe
from tqw.evaluate import windows
from tqw.pretrained import calibration_power
from tqw.source import find, load_float, load_tokenizer

GROUP = 64


def main(label: str, source: str, calibration: str, out: str) -> None:
    model, tokenizer = load_float(find(source)), load_tokenizer(find(source))
    recipe = parse_recipe(label, GROUP)
    sequences = torch.tensor(json.loads(Path(calibration).read_text()))
    ids = None if recipe.calibrate == "none" else sequences
    if ids is not None and recipe.method == "rtn":
        ids = ids[:SEQUENCES, :LENGTH]
    few = windows(tokenizer, "The driver evaluates; these tokens only satisfy the interface." * 2, 16, 16)
    comparison = Comparison(model, tokenizer, few, measure_footprint=False)
    start = time.perf_counter()
    comparison._statistics[recipe.calibrate, recipe.method] = ids, calibration_power(model, ids)
    seconds = time.perf_counter() - start
    row = comparison.recipe_row(recipe, keep=Path(out))
    facts = {
        "bits_per_weight": row.bits_per_weight,
        "calibration": "none" if ids is None else f"self-generated, {ids.numel()} tokens",
        "quantize_seconds": seconds + (row.quantize_seconds or 0.0),
        "peak_memory_bytes": peak_memory(),
        "weight_relative_mse": row.weight_relative_mse,
    }
    (Path(out) / "peer.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
