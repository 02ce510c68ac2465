"""One model at several configs, and the baselines, in one table: what `tqw compare` and `tqw demo` run.

A CONFIG is BITS or `target=BPW`, then `:key=value` for each option: `4`, `4+4:rotation_strategy=shared`,
`3:calibrate=none`, `target=4.6:method=gptq`.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqw.allocation import allocate_bits
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.evaluate import BASELINES, Quality, baseline_weights, evaluate, reference_log_probabilities
from tqw.footprint import footprint_in_subprocess
from tqw.model import Progress, quantize_model, resolve
from tqw.pretrained import calibration_ids, calibration_power, check_method, method_options, save, sensitivity_of
from tqw.refine import refine as refine_scales
from tqw.report import Row

FLOAT, ORIGINAL = "float", "original"
BASELINE_ROWS = (ORIGINAL, *BASELINES)
_ORIGINAL_OPTIONS = "4:scale=norm:calibrate=none:exponent=0"
_OPTIONS = (
    "rotation",
    "rotation_strategy",
    "scale",
    "seed",
    "group_size",
    "embedding",
    "lm_head",
    "calibrate",
    "exponent",
    "method",
    "refine",
)
_INTEGERS = ("seed", "group_size", "refine")
_TARGET = "target="


@dataclass(frozen=True)
class Recipe:
    """A parsed CONFIG: how to quantize, and on which statistics."""

    label: str
    config: QuantConfig
    calibrate: str = "self"
    exponent: float = 0.5
    method: str = "rtn"
    target_bpw: float | None = None
    refine: bool = False


def parse_recipe(text: str, group_size: int = 128, calibrate: str = "self") -> Recipe:
    """CONFIG -> Recipe; `original` is the published recipe at 4 bits. Raises TqwError with the options that exist."""
    bits, *pairs = (_ORIGINAL_OPTIONS if text == ORIGINAL else text).split(":")
    target = None
    if bits.startswith(_TARGET):
        target, bits = _target(bits, text), "4"
    options: dict[str, Any] = {"group_size": group_size, "calibrate": calibrate, "exponent": 0.5, "method": "rtn"}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or key not in _OPTIONS:
            raise TqwError(
                f"expected BITS or target=BPW, then :key=value... with keys {', '.join(_OPTIONS)}, "
                f"got {pair!r} in {text!r}"
            )
        try:
            options[key] = int(value) if key in _INTEGERS else float(value) if key == "exponent" else value
        except ValueError:
            raise TqwError(f"expected a number for {key} in {text!r}, got {value!r}") from None
    calibrate, exponent, method = options.pop("calibrate"), options.pop("exponent"), options.pop("method")
    refine = bool(options.pop("refine", 0))
    check_method(method)
    if refine and calibrate == "none":
        raise TqwError(f"expected calibrate=self, random or a text file with refine=1 in {text!r}, got none")
    config = QuantConfig(bits=bits, **options)  # type: ignore[arg-type]
    return Recipe(text, config, calibrate, exponent, method, target, refine)


def _target(bits: str, text: str) -> float:
    try:
        return float(bits.removeprefix(_TARGET))
    except ValueError:
        raise TqwError(f"expected target=BPW with a number such as 4.6 in {text!r}, got {bits!r}") from None


@dataclass
class Comparison:
    """A float model, a text cut into windows, and the rows measured so far."""

    model: nn.Module
    tokenizer: Any
    ids: Tensor
    measure_footprint: bool = True
    progress: Progress | None = None
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._statistics: dict[tuple[str, str], tuple[Tensor | None, dict[str, Tensor]]] = {}
        self._reference = reference_log_probabilities(self.model, self.ids, self.progress)

    def _calibrate(self, calibrate: str, method: str) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(sequences, input power), once for each kind."""
        if (calibrate, method) not in self._statistics:
            ids = calibration_ids(self.model, self.tokenizer, calibrate, method, self.progress)
            self._statistics[calibrate, method] = ids, calibration_power(self.model, ids, self.progress)
        return self._statistics[calibrate, method]

    def _add(self, row: Row, quality: Quality) -> Row:
        row.perplexity = quality.perplexity
        row.mean_kl_divergence, row.top1_agreement = quality.mean_kl_divergence, quality.top1_agreement
        self.rows.append(row)
        return row

    def float_row(self) -> Row:
        """The model itself."""
        tensors = {id(t): t for t in self.model.state_dict(keep_vars=True).values()}.values()
        row = Row(FLOAT, 8.0 * next(self.model.parameters()).element_size(), sum(t.nbytes for t in tensors), 0.0)
        if self.measure_footprint:
            with tempfile.TemporaryDirectory() as temporary:
                self.model.save_pretrained(temporary)  # type: ignore[operator]
                self._set_footprint(row, Path(temporary))
        return self._add(row, evaluate(self.model, self.ids, self._reference, self.progress))

    def baseline_row(self, name: str, bits_config: QuantConfig) -> Row:
        """rtn, nf4 or q8_0 on the weights that `bits_config` would quantize."""
        decisions = resolve(self.model, bits_config)[1]
        names = [d.name for d in decisions if d.bits]
        kept = self.rows[0].model_bytes if self.rows else 0
        with torch.no_grad(), baseline_weights(self.model, names, BASELINES[name]) as statistics:
            kept -= statistics.weights * next(self.model.parameters()).element_size()
            size = int(kept + statistics.weights * statistics.bits_per_weight / 8)
            row = Row(name, statistics.bits_per_weight, size, statistics.relative_mse)
            return self._add(row, evaluate(self.model, self.ids, self._reference, self.progress))

    def recipe_row(self, recipe: Recipe, keep: Path | None = None) -> Row:
        """Quantize a copy, save it (to `keep`, or to a temporary place), evaluate it, measure its footprint."""
        ids, power = self._calibrate(recipe.calibrate, "gptq" if recipe.refine else recipe.method)
        model = copy.deepcopy(self.model)
        start = time.perf_counter()
        config = recipe.config
        if recipe.target_bpw is not None:
            sensitivity = sensitivity_of(model, ids, power, self.progress)
            config = allocate_bits(model, recipe.target_bpw, config, sensitivity=sensitivity or None)
        options = {"exponent": recipe.exponent, **method_options(recipe.method, model, ids, power)}
        report = quantize_model(model, config, input_power=power or None, progress=self.progress, **options)
        if recipe.refine and ids is not None:
            refine_scales(model, self.model, ids, progress=self.progress)
        seconds = time.perf_counter() - start
        row = Row(recipe.label, report.bits_per_weight(), 0, report.relative_mse(), quantize_seconds=seconds)
        with tempfile.TemporaryDirectory() as temporary:
            folder = keep or Path(temporary) / "model"
            save(model, folder, report, self.tokenizer, calibrate=recipe.calibrate)
            row.model_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            if self.measure_footprint:
                self._set_footprint(row, folder)
        return self._add(row, evaluate(model, self.ids, self._reference, self.progress))

    def _set_footprint(self, row: Row, folder: Path) -> None:
        device = next(self.model.parameters()).device
        values = footprint_in_subprocess(folder, str(device))
        row.decode_tokens_per_second = values["decode_tokens_per_second"]
        row.peak_memory_bytes = values["peak_memory_bytes"]

    def run(
        self, labels: Iterable[str], group_size: int = 128, on_row: Callable[[Row], None] | None = None
    ) -> list[Row]:
        """All rows: float first, then each label in turn (a baseline's name or a CONFIG)."""
        recipes = [(label, None if label in BASELINES else parse_recipe(label, group_size)) for label in labels]
        self.float_row()
        if on_row:
            on_row(self.rows[-1])
        for label, recipe in recipes:
            row = self.recipe_row(recipe) if recipe else self.baseline_row(label, QuantConfig())
            if on_row:
                on_row(row)
        return self.rows
