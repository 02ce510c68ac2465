"""The command line: each command parses, calls one public function and shows what came back.

stdout carries results (one JSON document with --json); progress and messages go to stderr. Exit codes: 0 done,
2 bad input, 130 interrupted. Heavy imports happen inside the command that needs them, so that --help is quick.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tqw.errors import TqwError

if TYPE_CHECKING:
    from tqw.config import QuantConfig
    from tqw.report import Row

app = typer.Typer(
    name="tqw",
    help="TurboQuant for LLM weights: 4x smaller models without a calibration data set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_screen = Console(stderr=True)
_out = Console()
_WIDE = 110  # characters that the whole comparison table needs
_MORE_MEMORY = "expected more free memory: close other programs or use a machine with more"
_ONLY_WIDE = ("weight_relative_mse", "quantize_seconds")


def _usable(device: str) -> str:
    """auto, or a device that torch can put a tensor on."""
    if device not in ("auto", "cpu"):
        import torch

        try:
            torch.empty(1, device=device).cpu()
        except Exception as error:  # AssertionError without CUDA, RuntimeError and others for names and numbers
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise TqwError(
                f"expected --device as auto, cpu, cuda, cuda:1, ..., and one that is here, got {device!r} ({reason}; "
                f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices): use --device cpu"
            ) from error
    return device


_UsageError: Any = typer.BadParameter.__bases__[0]  # click's or, in later versions, typer's own

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local directory, a hub id, a GGUF file, or 'demo'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, ...; auto is the GPU, if there is one and has room.", callback=_usable),
]
Text = Annotated[Path | None, typer.Option(help="A text file; without one, the English of Python's own documentation.")]
Context = Annotated[int, typer.Option(help="Tokens in a window.")]
MaxTokens = Annotated[int | None, typer.Option(help="Use at most this many tokens of the text.")]
GroupSize = Annotated[int, typer.Option(help="Inputs that share a weight scale: a power of two >= 32, or -1 for rows.")]


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (label, done, total) that draws bars with the time left; steps under 2 s are over before it shows."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=_screen, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(label: str, done: int, total: int) -> None:
            phase = "quantize" if "." in label else label
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)
            if done >= total:
                bars.remove_task(tasks.pop(phase))

        yield show


def _say(line: str) -> None:
    """One message on stderr, never cut or wrapped here."""
    _screen.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def _text(path: Path | None) -> tuple[str, str]:
    """(text, where it is from)."""
    if path is not None:
        from tqw.source import read_text

        return read_text(path), str(path)
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics)), "pydoc_data.topics"


def _config(bits: str, group_size: int, rotation: str, rotation_strategy: str, scale: str, seed: int,
            override: list[str], embedding: str | None, lm_head: str | None) -> QuantConfig:  # fmt: skip
    from tqw.config import QuantConfig, parse_bits

    pairs = []
    for entry in override:
        pattern, separator, value = entry.rpartition("=")
        if not separator:
            raise TqwError(f"expected --override REGEX=BITS or REGEX=skip, got {entry!r}")
        pairs.append((pattern, value))
    return QuantConfig(
        bits=parse_bits(bits), group_size=group_size, rotation=rotation, rotation_strategy=rotation_strategy,
        scale=scale, seed=seed, overrides=tuple(pairs), embedding=None if embedding is None else parse_bits(embedding),
        lm_head=None if lm_head is None else parse_bits(lm_head),
    )  # fmt: skip


def _place(device: str, times: float, *models: str | None) -> str:
    """The device; of auto the GPU if its free memory holds `times` the weights of the models, else the CPU."""
    if device != "auto":
        return device
    import torch

    from tqw.source import find

    if not torch.cuda.is_available():
        return "cpu"
    free = torch.cuda.mem_get_info()[0]
    needed = times * sum(find(model).nbytes() for model in models if model is not None)
    if needed <= free:
        return "cuda"
    _say(f"on the CPU: some {needed / 1e9:.1f} GB would be needed, the GPU has {free / 1e9:.1f} GB free")
    return "cpu"


def _load_any(name: str, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a float or quantized MODEL."""
    from tqw.pretrained import load
    from tqw.source import find, is_quantized, load_float, load_tokenizer

    source = find(name)
    with _screen.status(f"loading {name}"):
        model = load(source.folder, device) if is_quantized(source) else load_float(source, device=device)
        return model, load_tokenizer(source)


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")] = Path(),
    bits: Annotated[str, typer.Option(help="2, 3, 4, 5, 6, 8, or residual passes such as 4+4, 3+2.")] = "4",
    group_size: GroupSize = 128,
    rotation: Annotated[str, typer.Option(help="hadamard, qr or none.")] = "hadamard",
    rotation_strategy: Annotated[
        str, typer.Option(help="Signs of residual passes: shared, different, alternating.")
    ] = "shared",
    scale: Annotated[str, typer.Option(help="search (least squares) or norm (the original recipe).")] = "search",
    method: Annotated[str, typer.Option(help="rtn, or gptq: error feedback, slower and better.")] = "rtn",
    calibrate: Annotated[str, typer.Option(help="self, random, none, or a text file.")] = "self",
    target_bpw: Annotated[
        float | None, typer.Option(help="Choose each layer's width: at most so many bits per weight, scales included.")
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Fit the scales of each layer to the float layer's outputs: minutes more.")
    ] = False,
    override: Annotated[list[str], typer.Option(help="REGEX=BITS or REGEX=skip, for modules whose name matches.")] = [],  # noqa: B006
    embedding: Annotated[
        str | None, typer.Option(help="Bits of the input embedding or auto; kept when absent.")
    ] = None,
    lm_head: Annotated[str | None, typer.Option(help="Bits of the output embedding or auto; kept when absent.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random signs.")] = 0,
    workers: Annotated[int, typer.Option(help="Layers quantized at once.")] = 1,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same settings.")
    ] = False,
    shim: Annotated[
        bool, typer.Option("--shim", help="Add a file so that trust_remote_code=True replaces `import tqw`.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a new directory."""
    from tqw.pretrained import plan, quantize_pretrained

    free = [kind for kind, width in (("embedding", embedding), ("lm_head", lm_head)) if width == "auto"]
    if free and target_bpw is None:
        raise TqwError("expected --target-bpw with a width of auto: add it, or name the width")
    embedding, lm_head = ("8" if width == "auto" else width for width in (embedding, lm_head))
    config = _config(bits, group_size, rotation, rotation_strategy, scale, seed, override, embedding, lm_head)
    if dry_run:
        device = _place(device, 1.5, model)
        with _progress() as progress:
            report = plan(model, config, target_bpw, calibrate, free, device, progress)
        _show_report(report, as_json)
        return
    if output == Path():
        raise TqwError("expected an output directory: add -o OUT")
    device = _place(device, 2.5 if refine else 1.5, model)  # gptq peaks at 1.4 (docs/quality.md)
    start = time.perf_counter()
    with _progress() as progress:
        report = quantize_pretrained(
            model, output, config, method=method, calibrate=calibrate, target_bpw=target_bpw, free=free, refine=refine,
            device=device, workers=workers, resume=resume, shim=shim, progress=progress,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    _say(f"wrote {output} in {seconds:.0f} s ({device}); try: tqw generate {output} --prompt 'Hello'")
    _show_report(report, as_json)


def _show_report(report: Any, as_json: bool) -> None:
    from tqw.report import document

    if as_json:
        _print_json(document([], **report.to_dict()))
        return
    table = Table(title="What becomes of every tensor", title_justify="left")
    for heading in ("tensors", "action", "why", "bits", "weights", "MB", "relative MSE"):
        table.add_column(heading, justify="left" if heading in ("tensors", "action", "why") else "right")
    for name, action, why, width, records in report.summary():
        errors = [r.relative_mse for r in records if r.relative_mse is not None]
        table.add_row(
            f"{name} ({len(records)})" if len(records) > 1 else name, action, why, width,
            f"{sum(r.weights for r in records):,}", f"{sum(r.nbytes for r in records) / 1e6:.1f}",
            f"{sum(errors) / len(errors):.5f}" if errors else "",
        )  # fmt: skip
    _out.print(table)
    _out.print(f"{report.bits_per_weight():.3f} bits per quantized weight, scales included")


@app.command("eval")
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The float model, for KLD and top-1.")] = None,
    text: Text = None,
    context: Context = 1024,
    max_tokens: MaxTokens = 16384,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks instead of a text, comma-separated: arc_easy,...")] = "",
    include_path: Annotated[Path | None, typer.Option(help="A directory with lm-eval tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many samples of each task.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of MODEL on a text; with a reference also mean KLD and top-1 agreement; or scores on tasks."""
    from dataclasses import asdict

    from tqw.evaluate import evaluate as run
    from tqw.evaluate import windows
    from tqw.report import document

    if tasks:
        device = _place(device, 1.3, model, reference)
        _evaluate_tasks(model, reference, tasks, include_path, limit, device, as_json)
        return
    words, origin = _text(text)
    device = _place(device, 1.3, model, reference)
    loaded, tokenizer = _load_any(model, device)
    ids = windows(tokenizer, words, context, max_tokens)
    other = None if reference is None else _load_any(reference, device)[0]
    with _progress() as progress:
        quality = run(loaded, ids, other, progress)
    row = {"config": model, **asdict(quality)}
    if as_json:
        _print_json(document([row], text=origin, context=context, reference=reference))
        return
    for key, value in row.items():
        if value is not None:
            _out.print(f"{key:20} {value:.5f}" if isinstance(value, float) else f"{key:20} {value}")


def _evaluate_tasks(
    model: str, reference: str | None, tasks: str, include_path: Path | None, limit: int | None, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Scores of MODEL, and of the reference where there is one, on the same samples."""
    from tqw.integrations.lm_eval import evaluate_tasks
    from tqw.report import document

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    rows = []
    for config in (model, reference):
        if config is not None:
            scores = evaluate_tasks(*_load_any(config, device), names, include_path=include_path, limit=limit)
            rows += [{"config": config, **row} for row in scores]
    if as_json:
        _print_json(document(rows, tasks=names, limit=limit))
        return
    for row in rows:
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
        _out.print(f"{row['config']}  {row['task']} ({row['samples']} samples)  {metrics}")


def _comparison_table(title: str) -> tuple[Table, Callable[[Row], None]]:
    from tqw.report import COLUMNS, cells

    narrow = _out.width < _WIDE  # every column is in report.html and report.json
    shown = [i for i, (key, _) in enumerate(COLUMNS) if not (narrow and key in _ONLY_WIDE)]
    table = Table(title=title, title_justify="left")
    for index in shown:
        table.add_column(COLUMNS[index][1], justify="left" if index == 0 else "right", no_wrap=True)

    def announce(row: Row) -> None:
        texts = cells(row)
        table.add_row(*(texts[index] for index in shown))
        kld = "" if row.mean_kl_divergence is None else f"  KLD {row.mean_kl_divergence:.4f}"
        _say(f"  {row.config}: {row.bits_per_weight:.3f} bits/weight{kld}")

    return table, announce


def _expect_folder(output: Path) -> None:
    """Before hours of work, not after."""
    if output.suffix in (".json", ".html", ".png") or (output.exists() and not output.is_dir()):
        raise TqwError(f"expected -o as a directory for report.json, report.html and the picture, got {output}")


def _write_comparison(folder: Path, rows: list[Row], title: str, **extra: Any) -> dict[str, Any]:
    from tqw.report import document, page, plot, write_json

    folder.mkdir(parents=True, exist_ok=True)
    result = document(rows, **extra)
    picture = plot(rows, title)
    write_json(folder / "report.json", result)
    (folder / "kld_against_bits.png").write_bytes(picture)
    (folder / "report.html").write_text(page(rows, result, picture, title), encoding="utf-8")
    return result


@app.command()
def compare(
    model: Model,
    configs: Annotated[str, typer.Option(help="CONFIGs and baselines (original, rtn, nf4, q8_0), comma-separated.")] = (
        "original,rtn,nf4,q8_0,4,5,6,8,4+4"
    ),
    text: Text = None,
    group_size: GroupSize = 128,
    context: Context = 1024,
    max_tokens: MaxTokens = 16384,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory for report.json, report.html, the picture.")
    ] = Path("tqw-compare"),
    footprint: Annotated[
        bool, typer.Option(help="Also measure decode speed and memory, each in a new process.")
    ] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """MODEL at several configs and the baselines in one table."""
    from tqw.compare import Comparison
    from tqw.evaluate import windows
    from tqw.source import find, load_float, load_tokenizer

    _expect_folder(output)
    labels = [label.strip() for label in configs.split(",") if label.strip()]
    words, origin = _text(text)
    source, device = find(model), _place(device, 3, model)  # the float model, a quantized copy, one more to measure
    with _screen.status(f"loading {model}"):
        loaded, tokenizer = load_float(source, device=device), load_tokenizer(source)
    ids = windows(tokenizer, words, context, max_tokens)
    table, announce = _comparison_table(f"{model}: {ids.numel()} tokens of {origin}, context {context}")
    facts = {"model": model, "text": origin, "context": context, "tokens": ids.numel(), "group_size": group_size}
    result: dict[str, Any] = {}
    with _progress() as progress:
        comparison = Comparison(loaded, tokenizer, ids, footprint, progress)

        def keep(row: Row) -> None:  # what is done stays done, whatever happens to the next row
            nonlocal result
            announce(row)
            result = _write_comparison(output, comparison.rows, f"{model}: loss against size", **facts)

        comparison.run(labels, group_size, keep)
    _say(f"wrote {output}/report.json, report.html and kld_against_bits.png")
    _print_json(result) if as_json else _out.print(table)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.")] = 128,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template when it has one.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Greedy text from a float or quantized MODEL."""
    from tqw.generate import generate as run

    loaded, tokenizer = _load_any(model, _place(device, 1.2, model))
    start = time.perf_counter()
    with _progress() as progress:
        answer, tokens = run(loaded, tokenizer, prompt, max_new_tokens, chat=chat, on_token=progress)
    seconds = time.perf_counter() - start
    if as_json:
        _print_json({"text": answer, "tokens": tokens, "seconds": seconds})
        return
    _out.print(answer, markup=False, highlight=False)
    _say(f"{tokens} tokens in {seconds:.1f} s")


@app.command()
def bench(
    device: Device = "auto",
    shapes: Annotated[str, typer.Option(help="out_features x in_features as NxK, comma-separated.")] = "",
    batch: Annotated[str, typer.Option(help="Numbers of tokens, comma-separated.")] = "1,16,128",
    bits: Annotated[str, typer.Option(help="Bits of the quantized weight.")] = "4",
    as_json: Json = False,
) -> None:
    """Time the linear op against torch's, in one interleaved run."""
    from tqw.bench import DEFAULT_SHAPES
    from tqw.bench import bench as run
    from tqw.report import document

    try:
        tokens = [int(count) for count in batch.split(",")]
    except ValueError:
        tokens = []
    if not tokens or min(tokens) < 1:
        raise TqwError(f"expected --batch as numbers of tokens such as 1,8,128, got {batch!r}")
    with _screen.status("timing"):
        rows = run(_place(device, 0), [s for s in shapes.split(",") if s] or DEFAULT_SHAPES, tokens, bits)
    if as_json:
        _print_json(document(rows))
        return
    table = Table()
    for heading in ("shape", "tokens", "method", "bits", "us", "GB/s", "relative error"):
        table.add_column(heading, justify="left" if heading in ("shape", "method") else "right")
    for row in rows:
        table.add_row(
            row["shape"], str(row["tokens"] or ""), row["method"], row["bits"], f"{row['microseconds']:.1f}",
            f"{row['packed_gigabytes_per_second']:.2f}", f"{row['relative_error']:.1e}",
        )  # fmt: skip
    _out.print(table)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """What a quantized directory holds, tensor by tensor."""
    from tqw.pretrained import read_report

    _show_report(read_report(model), as_json)


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
) -> None:
    """Write the dense bfloat16 model that a quantized MODEL computes."""
    from tqw.pretrained import export as run

    with _screen.status("exporting"):
        run(model, output)
    _say(f"wrote {output}")


@app.command()
def verify(model: Model, as_json: Json = False) -> None:
    """Check a quantized directory: hashes, shapes, ranges."""
    from tqw.pretrained import verify as run

    with _progress() as progress:
        checked = run(model, progress)
    if as_json:
        _print_json(checked)
        return
    _out.print(f"{model}: {checked['files']} files and {checked['tensors']} tensors are sound")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory for the model, the report and the picture.")
    ] = Path("tqw-demo"),
    max_tokens: Annotated[int, typer.Option(help="Tokens of text to evaluate on.")] = 2048,
    as_json: Json = False,
) -> None:
    """The whole story on a small real model (SmolLM2-135M-Instruct), in a few minutes on two CPU cores."""
    from tqw.demo import run

    _expect_folder(output)
    words, origin = _text(None)
    table, announce = _comparison_table("SmolLM2-135M-Instruct")
    with _progress() as progress:
        story = run(output, words, max_tokens, announce, progress, _say)
    facts = {
        "model": "demo",
        "text": origin,
        "context": story.context,
        "tokens": story.tokens,
        "group_size": story.group_size,
    }
    result = _write_comparison(
        output, story.rows, "SmolLM2-135M-Instruct: loss against size", **facts, texts=story.texts,
        seconds=round(story.seconds, 1),
    )  # fmt: skip
    if as_json:
        _print_json(result)
        return
    _out.print(table)
    for name, answer in story.texts.items():
        _out.print(f"\n[bold]{name}[/bold]: {escape(answer)}", highlight=False)
    _say(f"\n4-bit model in {output}/model, report in {output}/report.html, picture in {output}/kld_against_bits.png")


def _quiet_libraries() -> None:
    """Keep other libraries' bars and notices off the screen; our own progress says what is going on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_, **__: _screen.print(f"warning: {message}", style="yellow")


def _fail(message: str) -> int:
    _screen.print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return 2


def _interrupted() -> int:
    _screen.print("interrupted; nothing is half-written, and `tqw quantize` continues with --resume")
    return 130


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `tqw` command; returns the exit code."""
    _quiet_libraries()
    try:
        code = app(args=arguments, standalone_mode=False)
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0  # typer turns ^C into 130
    except typer.Exit as exit_:
        return exit_.exit_code
    except _UsageError as error:
        error.show()
        return 2
    except TqwError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error}: check the path, its permissions and the free disk space")
    except MemoryError:
        return _fail(_MORE_MEMORY)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            return _fail(f"{_MORE_MEMORY}, or --device cpu ({str(error).splitlines()[0]})")
        if "can't allocate memory" in str(error):
            return _fail(_MORE_MEMORY)
        raise
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()


if __name__ == "__main__":
    sys.exit(main())
