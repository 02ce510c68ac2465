"""Draws benchmarks/results/quality_peers.json: KLD (log scale) against true bits per weight, one colour a method.

python benchmarks/quality/picture.py

Every row is a point; the line of a method joins those of its points that no smaller one of its own beats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter

RESULT = Path(__file__).resolve().parent.parent / "results" / "quality_peers.json"
# method -> (first words of its rows, colour, marker)
METHODS = {
    "tqw, no data": ("calibrate=none", "#6db6d9", "d"),
    "tqw, gptq": ("method=gptq", "#08415c", "D"),
    "tqw": ("tqw", "#0b6e99", "o"),
    "original recipe": ("original", "#888888", "X"),
    "llama.cpp, imatrix": ("imatrix", "#8c2d04", "^"),
    "llama.cpp": ("llama.cpp", "#d95f0e", "v"),
    "GPTQModel": ("GPTQModel", "#7b3294", "P"),
    "auto-round": ("auto-round", "#c51b7d", "h"),
    "SINQ": ("sinq", "#1b7837", "s"),
    "torchao": ("torchao", "#b8860b", "*"),
    "HQQ": ("hqq", "#80b1d3", "p"),
    "bitsandbytes": ("bitsandbytes", "#000000", "x"),
}
HIDDEN = ("llama.cpp Q4_1",)  # the source's own grid
PART = (4.1, 4.65), (0.035, 0.45)  # bits and KLD of the second picture


def method_of(config: str) -> str:
    """The first method of METHODS whose word is in the name."""
    return next(method for method, (word, _, _) in METHODS.items() if word in config)


def main() -> None:
    document = json.loads(RESULT.read_text())
    rows = [row for row in document["rows"] if row.get("mean_kl_divergence") and row["config"] not in HIDDEN]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["bits_per_weight"], row["mean_kl_divergence"])):
        lines.setdefault(method_of(row["config"]), []).append(row)
    figure, (whole, part) = pyplot.subplots(1, 2, figsize=(12, 6), dpi=110, width_ratios=(3, 2))
    for axes in (whole, part):
        for method, (_, color, marker) in METHODS.items():
            points = lines.get(method, [])
            if points:
                pairs = [(point["bits_per_weight"], point["mean_kl_divergence"]) for point in points]
                best = [pair for i, pair in enumerate(pairs) if all(pair[1] < kld for _, kld in pairs[:i])]
                style = "-" if method.startswith("tqw") else ":"
                axes.plot(*zip(*best, strict=True), linestyle=style, color=color, linewidth=1.2)
                axes.plot(*zip(*pairs, strict=True), linestyle="", marker=marker, color=color, label=method)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight of the decoder linears, everything included")
        axes.grid(True, which="both", alpha=0.25)
    whole.set_ylabel("mean KL divergence from the float model (nats)")
    whole.legend(fontsize=8)
    part.set_xlim(*PART[0])
    part.set_ylim(*PART[1])
    part.yaxis.set_minor_formatter(ScalarFormatter())
    part.yaxis.set_major_formatter(ScalarFormatter())
    part.set_title("around 4 bits", fontsize=10)
    title = f"{document['model']} (SmolLM2-135M-Instruct), {document['tokens']} tokens of {document['text']}"
    whole.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(RESULT.with_suffix(".png"))


if __name__ == "__main__":
    main()
