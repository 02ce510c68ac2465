"""The table of docs/quality.md, from benchmarks/results/quality_peers.json: python benchmarks/quality/table.py"""

from __future__ import annotations

import json
from pathlib import Path

RESULT = Path(__file__).resolve().parent.parent / "results" / "quality_peers.json"


def main() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    unit = next(row["mean_kl_divergence"] for row in rows if row["config"] == "original")
    print("| method | bits | KLD | of `original` | top-1 | PPL | weight MSE | data | seconds | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    measured = [row for row in rows if "error" not in row and row["config"] != "float"]
    for row in sorted(measured, key=lambda row: (round(row["bits_per_weight"] * 2), row["mean_kl_divergence"])):
        kld, memory = row["mean_kl_divergence"], row["peak_memory_bytes"]
        ours = row["config"].startswith("tqw")
        cells = (
            f"**{row['config']}**" if ours else row["config"], f"{row['bits_per_weight']:.2f}", f"{kld:.4f}",
            f"{kld / unit:.3f}", f"{row['top1_agreement']:.3f}", f"{row['perplexity']:.2f}",
            f"{row['weight_relative_mse']:.5f}", row["calibration"].partition(",")[0],
            f"{row['quantize_seconds']:.0f}", f"{memory / 1e6:.0f}" if memory else "",
        )  # fmt: skip
        print("| " + " | ".join(cells) + " |")
    for row in rows:
        if "error" in row:
            print(f"- {row['config']}: `{row['error']}`")


if __name__ == "__main__":
    main()
