"""Quantize the linears of any `nn.Module` in place, with an account of every tensor.

`resolve` decides (what, at which bits, why not), `quantize_model` does it, `empty_model_` prepares a dense-free shell
for loading. A decision depends on names and module types only, so it is the same on the meta device.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tqw.config import SKIP, QuantConfig, block_size, format_bits, parse_bits
from tqw.errors import TqwError
from tqw.gptq import Moments, quantize_with_feedback
from tqw.kernels.cpu import MAX_FAMILY
from tqw.layer import (
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    embedding_scale,
    expert_projections,
    expert_weight,
    is_fused_experts,
    is_scaled_embedding,
    share_input,
)
from tqw.rotation import qr_matrix
from tqw.scaling import activation_scale
from tqw.weight import QuantizedWeight, check, choose_channel_scale, dequantize, empty_weight, quantize

Select = Callable[[str, nn.Module], "bool | int | str"]
Progress = Callable[[str, int, int], None]

# Layers of one parent that read the same input share channel_scale, block and group size: one transform serves all,
# and serving stacks may fuse them.
SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|wg)(\.|$)")
_VISION = re.compile(r"(^|\.)(visual|vision\w*|image_encoder|audio\w*|multi_modal_projector|mm_projector)(\.|$)")
_HEAD = re.compile(r"(^|\.)(classifier|score|qa_outputs|classification_head)(\.|$)")
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # their fast paths use .weight directly


@dataclass(frozen=True)
class Decision:
    """What happens to one module: its kind, the widths it gets, or the reason why it stays."""

    name: str
    kind: str  # linear | conv1d | embedding | lm_head | experts
    bits: tuple[int, ...] | None
    reason: str = ""


@dataclass
class TensorRecord:
    """One line of the account: a tensor of the float model and what became of it."""

    name: str
    shape: list[int]
    action: str  # quantized | kept
    reason: str = ""
    bits: str = ""
    weights: int = 0
    nbytes: int = 0
    relative_mse: float | None = None
    relative_output_error: float | None = None


@dataclass
class QuantizationReport:
    """Every tensor of the model, and the resolved config that reproduces the decisions."""

    config: QuantConfig
    tensors: list[TensorRecord]
    modules: tuple[str, ...] = ()  # names of the quantized modules, a tied head included

    @property
    def quantized(self) -> list[TensorRecord]:
        return [record for record in self.tensors if record.action == "quantized"]

    def bits_per_weight(self) -> float:
        """8 * bytes of all quantized weights (codes, weight scales, channel scales) / their number of weights."""
        return 8 * sum(r.nbytes for r in self.quantized) / max(sum(r.weights for r in self.quantized), 1)

    def relative_mse(self) -> float:
        """Mean over quantized weights of |W - dense|^2 / |W|^2, weighted by the number of weights."""
        total = sum(r.weights for r in self.quantized)
        return sum((r.relative_mse or 0.0) * r.weights for r in self.quantized) / max(total, 1)

    def summary(self) -> list[tuple[str, str, str, str, list[TensorRecord]]]:
        """(name with * for numbers, action, reason, bits, records) of tensors whose names differ only in numbers."""
        lines: dict[tuple[str, str, str, str], list[TensorRecord]] = {}
        for record in self.tensors:
            name = re.sub(r"\.\d+(?=\.|$)", ".*", record.name)
            lines.setdefault((name, record.action, record.reason, record.bits), []).append(record)
        return [(*key, records) for key, records in lines.items()]

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "bits_per_weight": self.bits_per_weight(),
            "weight_relative_mse": self.relative_mse(),
            "tensors": [asdict(record) for record in self.tensors],
        }


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's transposed linear, told by its shape so that transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def _embedding_of(model: nn.Module, which: str) -> nn.Module | None:
    getter = getattr(model, f"get_{which}_embeddings", None)
    try:
        return getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None


def kind_of(module: nn.Module) -> str | None:
    """linear | conv1d | embedding | experts for layers that can be quantized; None for everything else.

    Other subclasses are left alone: their forward may do more than a matrix product.
    """
    if type(module) in (nn.Linear, QuantizedLinear):
        return "linear"
    if type(module) in (nn.Embedding, QuantizedEmbedding) or is_scaled_embedding(module):
        return "embedding"
    if _is_conv1d(module):
        return "conv1d"
    if isinstance(module, QuantizedExperts) or is_fused_experts(module):
        return "experts"
    return None


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    head = _embedding_of(model, "output")
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind and name:
            yield name, module, "lm_head" if module is head else kind


@lru_cache(maxsize=1024)
def _reads_weight(parent: type, leaf: str) -> bool:
    """Whether a class multiplies by a child's weight, or casts to its dtype, itself: Mamba's dt_proj, the indexers of
    sparse attention (weights_proj), some heads."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    child = rf"self\.{re.escape(leaf)}\.weight"
    return re.search(rf"\.to\((dtype=)?{child}\.dtype|{child} @", source) is not None


def _read_directly(model: nn.Module, name: str) -> str:
    parent, _, leaf = name.rpartition(".")
    kind = type(model.get_submodule(parent))
    if issubclass(kind, _READS_WEIGHTS) or _reads_weight(kind, leaf):
        return f"{kind.__name__} reads its weight directly"
    return ""


def _default_reason(model: nn.Module, name: str, kind: str, vision_only: bool) -> str:
    """Why a module stays by default; "" when it is quantized."""
    keep = getattr(model, "_keep_in_fp32_modules", None) or ()
    if any(part in keep for part in name.split(".")):
        return "the model keeps it in float32"
    if read_directly := _read_directly(model, name):
        return read_directly
    if kind != "experts" and _ROUTER.search(name):
        return "router"
    if _HEAD.search(name):
        return "task head"
    if not vision_only and _VISION.search(name):
        return "vision or audio part"
    return ""


def resolve(model: nn.Module, config: QuantConfig, select: Select | None = None) -> tuple[QuantConfig, list[Decision]]:
    """Decide for every candidate module; the config that comes back has the decisions frozen into it.

    Order: `select(name, module)` (False keeps, True takes the default, bits set the width), overrides, default skips.
    """
    candidates = list(_candidates(model))
    linears = [name for name, _, kind in candidates if kind != "embedding"]
    vision_only = all(_VISION.search(name) for name in linears)
    input_embedding = _embedding_of(model, "input")
    decisions = []
    for name, module, kind in candidates:
        wanted: bool | int | str = True if select is None else select(name, module)
        override = config.override_for(name)
        bits, reason = None, ""
        if wanted is False:
            reason = "not selected"
        elif wanted is not True:
            bits = parse_bits(wanted)
        elif override == SKIP:
            reason = "override"
        elif override is not None:
            bits = parse_bits(override)
        elif kind == "embedding":
            bits = config.embedding if module is input_embedding else None
            reason = "" if bits else "embedding" if module is input_embedding else "not the input embedding"
        elif kind == "lm_head":
            reason = _read_directly(model, name) if config.lm_head else "output embedding"
            bits = None if reason else config.lm_head
        else:
            reason = _default_reason(model, name, kind, vision_only)
            bits = None if reason else config.bits
        decisions.append(Decision(name, kind, bits, reason))
    _check_shared_inputs(model, decisions)
    exact = tuple(
        (f"^{re.escape(d.name)}$", format_bits(d.bits))
        for d in decisions
        if d.bits and d.bits != _default_bits(config, d.kind) and config.override_for(d.name) != format_bits(d.bits)
    )
    frozen = replace(
        config,
        overrides=exact + config.overrides,
        modules_to_not_convert=tuple(d.name for d in decisions if d.bits is None),
    )
    return frozen, decisions


def _check_shared_inputs(model: nn.Module, decisions: list[Decision]) -> None:
    """Serving stacks fuse layers that share an input, so different widths among them are an error."""
    for members in by_input(model, decisions).values():
        widths = {m.name: "kept" if m.bits is None else format_bits(m.bits) for m in members}
        if len(set(widths.values())) > 1:
            raise TqwError(
                f"expected the same bits for layers that share an input, got {widths}: widen the override or selection"
            )


def by_input(model: nn.Module, decisions: list[Decision]) -> dict[str, list[Decision]]:
    """Decisions grouped by the input that their layers read; experts and lone layers are groups of one."""
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        key = decision.name
        if decision.kind in ("linear", "conv1d"):
            (weight,) = dense_weights(model.get_submodule(decision.name), decision.kind).values()
            key = f"{input_name(decision.name)}[{weight.shape[-1]}]"
        groups.setdefault(key, []).append(decision)
    return groups


def _default_bits(config: QuantConfig, kind: str) -> tuple[int, ...] | None:
    return {"embedding": config.embedding, "lm_head": config.lm_head}.get(kind, config.bits)


def frozen_bits(config: QuantConfig, name: str, kind: str) -> tuple[int, ...] | None:
    """The width of a module under a resolved config: what a loader needs."""
    if name in config.modules_to_not_convert:
        return None
    override = config.override_for(name)
    if override is not None:
        return None if override == SKIP else parse_bits(override)
    return _default_bits(config, kind)


def input_name(name: str) -> str:
    """The same string for sibling layers that read the same input."""
    parent, _, leaf = name.rpartition(".")
    for group in SHARED_INPUTS:
        if leaf in group:
            return f"{parent}.{'|'.join(group)}"
    return name


def share_inputs(model: nn.Module) -> None:
    """Let the quantized siblings that read the same input be computed together (see shared_input.py)."""
    families: dict[str, list[QuantizedLinear]] = {}
    for name, module in model.named_modules():
        if type(module) is QuantizedLinear:
            families.setdefault(f"{input_name(name)}[{module.in_features}]", []).append(module)
    for layers in families.values():
        if 1 < len(layers) <= MAX_FAMILY:
            share_input(layers)


def dense_weights(module: nn.Module, kind: str) -> dict[str, Tensor]:
    """Dense weights of a candidate as [..., out, in], by parameter prefix ("" but for experts)."""
    if kind == "experts":
        return {name: expert_weight(module, name) for name in expert_projections(module)}
    weight = module.weight.detach()  # type: ignore[union-attr]
    return {"": weight.T if kind == "conv1d" else weight}  # type: ignore[dict-item]


def _replacement(module: nn.Module, kind: str, weights: dict[str, QuantizedWeight], dtype: torch.dtype) -> nn.Module:
    if kind == "experts":
        return QuantizedExperts(module, weights)
    if kind == "embedding":
        return QuantizedEmbedding(weights[""], module.padding_idx, dtype, embedding_scale(module, dtype))  # type: ignore[arg-type]
    return QuantizedLinear(weights[""], _frozen(module.bias))  # type: ignore[arg-type]


def _frozen(bias: nn.Parameter | None) -> nn.Parameter | None:
    """The very parameter, which may be tied to another's."""
    if bias is not None:
        bias.requires_grad_(False)
    return bias


def is_tied(model: nn.Module) -> bool:
    head, embedding = _embedding_of(model, "output"), _embedding_of(model, "input")
    return head is not None and embedding is not None and head.weight is embedding.weight


def _settle_ties(model: nn.Module, decisions: list[Decision]) -> str | None:
    """Tied embeddings: both at the same bits stay tied; otherwise they are untied. Returns the tied head's name."""
    if not is_tied(model):
        return None
    by_kind = {
        d.kind: d for d in decisions if d.kind in ("embedding", "lm_head") and d.reason != "not the input embedding"
    }
    head, embedding = by_kind.get("lm_head"), by_kind.get("embedding")
    if head is None:
        return None
    if head.bits == (None if embedding is None else embedding.bits):
        return head.name if head.bits else None
    config = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
    kept = _embedding_of(model, "input") if head.bits else _embedding_of(model, "output")
    assert kept is not None
    kept.weight = nn.Parameter(kept.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
    return None


def matrix_source(config: QuantConfig) -> Callable[[int], Tensor | None]:
    """The checkpoint's one `qr` matrix for each block size, the same tensor for every layer; None for others."""
    matrices: dict[int, nn.Parameter] = {}

    def matrix(in_features: int) -> Tensor | None:
        if config.rotation != "qr":
            return None
        block = block_size(in_features)
        if block not in matrices:
            matrices[block] = nn.Parameter(qr_matrix(block, config.seed), requires_grad=False)
        return matrices[block]

    return matrix


def quantize_model(
    model: nn.Module,
    config: QuantConfig | None = None,
    *,
    select: Select | None = None,
    input_power: Mapping[str, Tensor] | None = None,
    exponent: float = 0.5,
    workers: int = 1,
    progress: Progress | None = None,
    moments: Callable[[str], Moments | None] | None = None,
    on_module: Callable[[str, nn.Module, list[TensorRecord]], None] | None = None,
    done: Mapping[str, list[TensorRecord]] | None = None,
) -> QuantizationReport:
    """Replace the linears of `model` by quantized ones, in place, module by module.

    input_power: E x_j^2 of what each weight multiplies, by the weight's name in the state dict, from
    `tqw.calibrate.input_power`; None quantizes without channel scales. moments(module name): of its input, asked for in
    model order (tqw.moments); layers that have them are coded with error feedback.
    on_module(name, module, records) is called in model order as soon as a module is final; modules named in `done`
    are left dense and reported as given.
    Raises TqwError, naming the weight, for what cannot be quantized; modules already replaced stay replaced.
    """
    config, decisions = resolve(model, config or QuantConfig(), select)
    if not any(d.bits for d in decisions):
        raise TqwError(
            f"expected a model with linear layers to quantize, found none among {len(decisions)} candidates: "
            + ("; ".join(sorted({d.reason for d in decisions})) or "no Linear, Conv1D or expert modules")
        )
    tied_head = _settle_ties(model, decisions)
    account = _Account(model, decisions)
    done = done or {}
    for records in done.values():
        account.quantized(records)
    job = _Job(model, config, input_power or {}, exponent, matrix_source(config), decisions, moments)
    pending = [d for d in decisions if d.bits and d.name != tied_head and d.name not in done]
    if moments is not None and workers > 1:
        raise TqwError(f"expected workers=1 with moments, which follow the layers in order, got {workers}")
    for count, (decision, replacement, records) in enumerate(_run(job, pending, workers), 1):
        model.set_submodule(decision.name, replacement)
        account.quantized(records)
        if on_module is not None:
            on_module(decision.name, replacement, records)
        if progress is not None:
            progress(decision.name, count, len(pending))
    embedding = _embedding_of(model, "input")
    if tied_head is not None and isinstance(embedding, QuantizedEmbedding):
        bias: Any = model.get_submodule(tied_head).bias
        model.set_submodule(tied_head, QuantizedLinear(embedding.quantized_weight, _frozen(bias)))
    share_inputs(model)
    return QuantizationReport(config, account.records(), tuple(d.name for d in decisions if d.bits))


def plan_model(model: nn.Module, config: QuantConfig, select: Select | None = None) -> QuantizationReport:
    """The report that `quantize_model` would return, without the errors; works on the meta device."""
    config, decisions = resolve(model, config, select)
    account = _Account(model, decisions)
    for decision in decisions:
        if decision.bits is None:
            continue
        for prefix, dense in dense_weights(model.get_submodule(decision.name), decision.kind).items():
            qw = empty_weight(dense.shape, config.with_bits(decision.bits))
            account.quantized([_record(tensor_name(decision.name, prefix), dense, qw)])
    return QuantizationReport(config, account.records(), tuple(d.name for d in decisions if d.bits))


@dataclass
class _Job:
    """Everything that quantizing one module needs."""

    model: nn.Module
    config: QuantConfig
    input_power: Mapping[str, Tensor]
    exponent: float
    matrix: Callable[[int], Tensor | None]
    decisions: list[Decision]
    moments: Callable[[str], Moments | None] | None = None

    def __post_init__(self) -> None:
        self.dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        self.scales: dict[str, Tensor] = {}
        self.siblings: dict[str, list[Decision]] = {}
        self.coded: dict[str, QuantizedWeight] = {}
        for members in by_input(self.model, [d for d in self.decisions if d.bits]).values():
            self.siblings.update(dict.fromkeys((member.name for member in members), members))
            self._choose_scales(members)

    def _choose_scales(self, members: list[Decision]) -> None:
        """One channel scale for all layers that read one input, settled before any of them is replaced."""
        dense = [dense_weights(self.model.get_submodule(member.name), member.kind) for member in members]
        for prefix in dense[0]:
            names = [tensor_name(member.name, prefix) for member in members]
            powers = [self.input_power[name] for name in names if name in self.input_power]
            scale = activation_scale(torch.stack(powers).mean(0), self.exponent) if powers else None
            weights = [member[prefix] for member in dense]
            for name, weight in zip(names, weights, strict=True):
                with _named(name):
                    check(weight)
            with _named(names[0]):
                scale = choose_channel_scale(weights, self.config, scale)
            self.scales.update(dict.fromkeys(names, scale))

    def run(self, decision: Decision) -> tuple[Decision, nn.Module, list[TensorRecord]]:
        module = self.model.get_submodule(decision.name)
        assert decision.bits is not None
        config = self.config.with_bits(decision.bits)
        weights, records = {}, []
        feedback = self.moments is not None and decision.kind in ("linear", "conv1d")
        for prefix, dense in dense_weights(module, decision.kind).items():
            name = tensor_name(decision.name, prefix)
            matrix = self.matrix(dense.shape[-1])
            with _named(name):
                qw = self._with_feedback(decision.name, config, matrix) if feedback else None
                if qw is None:
                    qw = quantize(dense, config, channel_scale=self.scales[name], rotation_matrix=matrix)
                weights[prefix] = qw
            records.append(_measure(name, dense, weights[prefix], self.input_power.get(name)))
        return decision, _replacement(module, decision.kind, weights, self.dtype), records

    def _with_feedback(self, name: str, config: QuantConfig, matrix: Tensor | None) -> QuantizedWeight | None:
        """Layers that share their input share its moments: they are coded at once, as one tall weight.

        None for a layer without moments.
        """
        if name not in self.coded:
            assert self.moments is not None
            moments = self.moments(name)
            if moments is None:
                return None
            members = self.siblings[name]
            dense = [dense_weights(self.model.get_submodule(m.name), m.kind)[""] for m in members]
            scale = self.scales[tensor_name(name, "")]
            tall = quantize_with_feedback(torch.cat(dense), moments, config, scale, matrix)
            parts = tall.split([len(weight) for weight in dense])
            self.coded.update({m.name: part for m, part in zip(members, parts, strict=True)})
        return self.coded.pop(name)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of the weight before an error about it."""
    try:
        yield
    except TqwError as error:
        raise TqwError(f"{name}: {error}") from None


def tensor_name(module_name: str, prefix: str) -> str:
    """Name of a dense weight in the float model's state dict."""
    return f"{module_name}.{prefix or 'weight'}"


def _run(job: _Job, pending: list[Decision], workers: int) -> Iterator[tuple[Decision, nn.Module, list[TensorRecord]]]:
    """Results in model order, from `workers` threads (torch releases the GIL)."""
    if workers <= 1:
        yield from map(job.run, pending)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(job.run, pending)


def _record(name: str, dense: Tensor, qw: QuantizedWeight) -> TensorRecord:
    return TensorRecord(
        name, list(dense.shape), "quantized", bits=format_bits(qw.bits), weights=dense.numel(), nbytes=qw.nbytes()
    )


def _measure(name: str, dense: Tensor, qw: QuantizedWeight, power: Tensor | None) -> TensorRecord:
    """Size and errors of one quantized weight.

    relative_mse = |W - dense|^2 / |W|^2; relative_output_error = sqrt of the same with columns weighted by E x_j^2.
    """
    error = (dequantize(qw) - dense.float()).square().flatten(0, -2).sum(0)
    energy = dense.float().square().flatten(0, -2).sum(0)
    record = _record(name, dense, qw)
    record.relative_mse = float(error.sum() / energy.sum()) if energy.sum() > 0 else 0.0
    if power is not None:
        weighted = power.to(error.device, torch.float32)
        total = (energy * weighted).sum()
        record.relative_output_error = float(((error * weighted).sum() / total).sqrt()) if total > 0 else 0.0
    return record


class _Account:
    """Every parameter and buffer of the float model; quantized ones are filled in as they come."""

    def __init__(self, model: nn.Module, decisions: list[Decision]) -> None:
        reasons = {d.name: d.reason for d in decisions if d.bits is None}
        self._records: dict[str, TensorRecord] = {}
        for name, tensor in model.state_dict().items():
            owner = name.rpartition(".")[0]
            reason = reasons.get(owner) or ("bias" if name.endswith("bias") else _kept_because(model, owner))
            self._records[name] = TensorRecord(
                name, list(tensor.shape), "kept", reason, weights=tensor.numel(), nbytes=tensor.nbytes
            )

    def quantized(self, records: list[TensorRecord]) -> None:
        for record in records:
            self._records[record.name] = record

    def records(self) -> list[TensorRecord]:
        return list(self._records.values())


def _kept_because(model: nn.Module, owner: str) -> str:
    module = model.get_submodule(owner)
    return f"part of {type(module).__name__}" if kind_of(module) is None else "quantized with another tensor"


def empty_model_(model: nn.Module, config: QuantConfig, device: torch.device | str = "meta") -> None:
    """Put unfilled quantized layers in place of the dense ones of a shell model, as a resolved config says."""
    dtype = getattr(getattr(model, "config", None), "dtype", None) or torch.get_default_dtype()
    matrices: dict[int, Tensor] = {}
    tied = is_tied(model)
    embedding_weight: QuantizedWeight | None = None
    for name, module, kind in list(_candidates(model)):
        bits = frozen_bits(config, name, kind)
        if bits is None:
            continue
        weights = {}
        for prefix, dense in dense_weights(module, kind).items():
            weight = empty_weight(dense.shape, config.with_bits(bits), device)
            if weight.rotation_matrix is not None:
                matrix = matrices.setdefault(weight.block, nn.Parameter(weight.rotation_matrix, requires_grad=False))
                weight = replace(weight, rotation_matrix=matrix)
            weights[prefix] = weight
        if kind == "lm_head" and tied and embedding_weight is not None:
            weights[""] = embedding_weight
        replacement = _replacement(module, kind, weights, dtype)
        model.set_submodule(name, replacement)
        if isinstance(replacement, QuantizedEmbedding):
            embedding_weight = replacement.quantized_weight
