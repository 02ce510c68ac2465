"""How far a quantized model is from the float one, in one harness for ours and for the baselines.

    KLD   = mean over positions of KL(p_float || p_quantized)       nats
    top-1 = share of positions where both models prefer the same token
    PPL   = exp(mean negative log-likelihood of the next token)

Windows are cut from one text without overlap; where the model's tokenizer begins a text with a token of its own,
every window begins with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tqw.errors import TqwError
from tqw.model import Progress, dense_weights, kind_of

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Quality:
    """Measures of one model on one text; the last two need a reference."""

    tokens: int
    perplexity: float
    mean_kl_divergence: float | None = None
    top1_agreement: float | None = None


def beginning(tokenizer: Any) -> int | None:
    """The id that the tokenizer itself puts before a text (Llama's bos); None for those that put nothing."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return with_special[0] if with_special[1 : 1 + len(plain)] == plain else None


def windows(tokenizer: Any, text: str, context: int, max_tokens: int | None) -> Tensor:
    """int64 [windows, context] from `text`: non-overlapping, whole windows only, at most max_tokens tokens.

    Each begins with `beginning(tokenizer)` where there is one. Raises TqwError for a text shorter than one window.
    """
    if context < 2:
        raise TqwError(f"expected a context of at least 2 tokens, got {context}")
    if tokenizer is None:
        raise TqwError("expected a model with a tokenizer, found none in its directory: copy the tokenizer files there")
    first = beginning(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = context if first is None else context - 1
    count = len(ids) // body
    if max_tokens is not None:
        count = min(count, max_tokens // context)
    if count < 1:
        raise TqwError(
            f"expected a text and --max-tokens of at least one window of {context} tokens, got {len(ids)} tokens of "
            f"text and max_tokens {max_tokens}: use a longer text or a smaller --context"
        )
    cut = torch.tensor(ids[: count * body]).view(count, body)
    return cut if first is None else torch.cat([torch.full((count, 1), first), cut], 1)


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)


def _batches(ids: Tensor) -> tuple[Tensor, ...]:
    return ids.split(max(1, _BATCH_TOKENS // ids.shape[1]))


@torch.no_grad()
def reference_log_probabilities(model: nn.Module, ids: Tensor, progress: Progress | None = None) -> list[Tensor]:
    """The float model's next-token log-probabilities, one tensor for each batch of windows, on the CPU."""
    result = []
    batches = _batches(ids)
    for count, batch in enumerate(batches, 1):
        result.append(_log_probabilities(model, batch.to(next(model.parameters()).device)).cpu())
        if progress is not None:
            progress("reference", count, len(batches))
    return result


@torch.no_grad()
def evaluate(
    model: nn.Module, ids: Tensor, reference: list[Tensor] | nn.Module | None = None, progress: Progress | None = None
) -> Quality:
    """Perplexity of `model` on windows `ids` [windows, context]; KLD and top-1 against a reference.

    reference: another model (run batch by batch, nothing is kept) or what `reference_log_probabilities` returned.
    """
    device = next(model.parameters()).device
    batches = _batches(ids)
    nll = kld = agree = 0.0
    tokens = 0
    for count, batch in enumerate(batches):
        batch = batch.to(device)
        ours = _log_probabilities(model, batch)
        targets = batch[:, 1:]
        nll -= float(ours.gather(-1, targets.unsqueeze(-1)).double().sum())
        tokens += targets.numel()
        if reference is not None:
            theirs = _log_probabilities(reference, batch) if isinstance(reference, nn.Module) else reference[count]
            theirs = theirs.to(device)
            kld += float(nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True).double())
            agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        if progress is not None:
            progress("evaluate", count + 1, len(batches))
    perplexity = math.exp(min(nll / tokens, 700.0))
    if reference is None:
        return Quality(tokens, perplexity)
    return Quality(tokens, perplexity, kld / tokens, agree / tokens)


def _by_group(weight: Tensor, group: int, side_bits: float, code: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """`code` on groups of each row (the last filled with zeros), and `side_bits` a group spread over the weights."""
    in_features = weight.shape[-1]
    padding = -in_features % group
    groups = nn.functional.pad(weight.float(), (0, padding)).unflatten(-1, (-1, group)).contiguous()
    return code(groups).flatten(-2)[..., :in_features], side_bits * (in_features + padding) / group / in_features


def rtn(weight: Tensor, group: int = 64) -> tuple[Tensor, float]:
    """Round to nearest, 4-bit asymmetric: w' = (round(w / s) + z - z) s, fp16 scale and 4-bit zero point a group."""

    def code(w: Tensor) -> Tensor:
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).half().float().clamp(min=2.0**-24)
        zero = (-low / scale).round().clamp(0, 15)
        return (((w / scale).round() + zero).clamp(0, 15) - zero) * scale

    dense, side_bits = _by_group(weight, group, 20, code)
    return dense, 4 + side_bits


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4(weight: Tensor, group: int = 64) -> tuple[Tensor, float]:
    """NF4 (QLoRA, arXiv 2305.14314, appendix E) with an fp16 absolute maximum for each group of 64."""

    def code(w: Tensor) -> Tensor:
        table = torch.tensor(_NF4, device=w.device)
        scale = w.abs().amax(-1, keepdim=True).half().float()
        return table[torch.bucketize(w / scale.clamp(min=2.0**-24), (table[1:] + table[:-1]) / 2)] * scale

    dense, side_bits = _by_group(weight, group, 16, code)
    return dense, 4 + side_bits


def q8_0(weight: Tensor, group: int = 32) -> tuple[Tensor, float]:
    """llama.cpp's Q8_0: w' = round(w / s) s, s = fp16(absmax / 127) for each group of 32."""

    def code(w: Tensor) -> Tensor:
        scale = (w.abs().amax(-1, keepdim=True) / 127).half().float()
        return (w / scale.clamp(min=2.0**-24)).round() * scale

    dense, side_bits = _by_group(weight, group, 16, code)
    return dense, 8 + side_bits


BASELINES: dict[str, Callable[[Tensor], tuple[Tensor, float]]] = {"rtn": rtn, "nf4": nf4, "q8_0": q8_0}


@dataclass(frozen=True)
class BaselineStatistics:
    """Size and weight error of a baseline over all linears."""

    bits_per_weight: float
    weights: int
    relative_mse: float


@contextmanager
def baseline_weights(
    model: nn.Module, names: list[str], quantizer: Callable[[Tensor], tuple[Tensor, float]]
) -> Iterator[BaselineStatistics]:
    """Inside the context, the named modules compute with the baseline's dequantized weights."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    bits, count, error = 0.0, 0, 0.0
    for name in names:
        module = model.get_submodule(name)
        kind = kind_of(module)
        assert kind is not None
        for weight in dense_weights(module, kind).values():  # views: writing them writes the parameter
            dense, bits_per_weight = quantizer(weight)
            energy = float(weight.float().square().sum())
            error += float((dense - weight.float()).square().sum()) / max(energy, 1e-30) * weight.numel()
            bits += bits_per_weight * weight.numel()
            count += weight.numel()
            kept.append((weight, weight.clone()))  # type: ignore[arg-type]
            weight.copy_(dense)
    try:
        yield BaselineStatistics(bits / count, count, error / count)
    finally:
        for weight, original in kept:
            weight.copy_(original)
