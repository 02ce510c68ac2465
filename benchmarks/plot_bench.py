"""A picture of `tqw bench --json`: speed against torch float32 by number of tokens, one panel for each shape.

python benchmarks/plot_bench.py benchmarks/results/cpu.json benchmarks/results/cpu.png
"""

from __future__ import annotations

import json
import sys

import matplotlib.pyplot as plt


def main(source: str, target: str) -> None:
    with open(source) as file:
        document = json.load(file)
    rows = [row for row in document["rows"] if row["shape"]]
    shapes, names = list(dict.fromkeys(r["shape"] for r in rows)), list(dict.fromkeys(r["method"] for r in rows))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.2 * lines + 0.6), sharey=True, squeeze=False)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        mine = {(r["method"], r["tokens"]): r["microseconds"] for r in rows if r["shape"] == shape}
        for index, name in enumerate(names):
            tokens = [count for method, count in mine if method == name]
            ratios = [mine["torch_float32", count] / mine[name, count] for count in tokens]
            style = {"linewidth": 2.6, "color": "black", "zorder": 9} if name == "tqw" else {"color": f"C{index - 1}"}
            axis.plot(tokens, ratios, marker="o", markersize=3.5, label=name, **style)
        axis.set(title=f"{shape} (out x in)", xscale="log", yscale="log", xlabel="tokens")
        axis.set_xticks(sorted({r["tokens"] for r in rows}), [str(t) for t in sorted({r["tokens"] for r in rows})])
        axis.set_yticks([0.1, 0.25, 0.5, 1, 2, 4, 8, 16], ["0.1", "0.25", "0.5", "1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed / torch float32")
    for axis in axes.flat[len(shapes) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    hardware = document["environment"]["hardware"]["processor"]
    figure.suptitle(f"One linear layer, 4-bit weights, {hardware}", fontsize=11)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:3])
