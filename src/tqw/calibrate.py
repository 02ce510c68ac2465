"""Channel statistics without a data set: what the model's layers read when it meets text of its own making.

    power[name]_j = mean over tokens of x_j^2        for every weight `name` that can be quantized

Sequences always begin at position 0: the first tokens of a sequence carry the largest activations, and statistics
that miss them are wrong where it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tqw.errors import TqwError
from tqw.layer import expert_projections, expert_weight, gate
from tqw.mixture import routed_tokens
from tqw.model import Progress, kind_of

SEQUENCES = 8
LENGTH = 128
SEED = 1234


class _Power:
    """Running mean of x_j^2 for each weight."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, x: Tensor) -> None:
        flat = x.detach().flatten(0, -2).float()
        if not torch.isfinite(flat).all():
            raise TqwError(
                f"expected finite activations in calibration, got NaN or Inf before {name}: is the model sound?"
            )
        total = flat.square().sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.tokens[name] = self.tokens.get(name, 0) + len(flat)

    def means(self) -> dict[str, Tensor]:
        return {name: (total / max(self.tokens[name], 1)).cpu() for name, total in self.sums.items()}


def _expert_hook(power: _Power, name: str) -> Callable[..., None]:
    """Statistics of both projections of fused experts; the inner one needs the dense forward of each routed expert."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        hidden, top_k_index = values[0], values[1]
        up, down = expert_projections(module)
        power.add(f"{name}.{up}", hidden)
        weight, bias = expert_weight(module, up), getattr(module, f"{up}_bias", None)
        for expert, tokens, _ in routed_tokens(top_k_index, weight.shape[0]):
            projected = nn.functional.linear(hidden[tokens], weight[expert], None if bias is None else bias[expert])
            power.add(f"{name}.{down}", gate(module, projected))

    return hook


@torch.no_grad()
def input_power(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """E x_j^2 of the input of every quantizable weight: name in the state dict -> float32 [in], on the CPU.

    batches: what `model` is called with, token ids [sequences, tokens] for language models; `forward(batch)` replaces
    `model(batch)` for models with another signature.
    """
    power = _Power()
    handles = []
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind == "experts":
            handles.append(module.register_forward_pre_hook(_expert_hook(power, name), with_kwargs=True))
        elif kind in ("linear", "conv1d"):
            weight_name = f"{name}.weight"
            handles.append(module.register_forward_pre_hook(lambda _, args, key=weight_name: power.add(key, args[0])))
    try:
        for count, batch in enumerate(batches, 1):
            (forward or model)(batch)
            if progress is not None:
                progress("calibrate", count, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    return power.means()


def first_token(model: nn.Module, tokenizer: Any) -> int:
    """The id that begins a text: bos where the model has one, else eos, else 0."""
    config = getattr(model, "config", None)
    for source in (tokenizer, config):
        for attribute in ("bos_token_id", "eos_token_id"):
            value = getattr(source, attribute, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int):
                return value
    return 0


def vocabulary_size(model: nn.Module) -> int:
    """Number of rows of the input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def random_sequences(model: nn.Module, tokenizer: Any, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """Uniformly random tokens after the first token: int64 [sequences, length], the same at every run."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary_size(model), (sequences, length), generator=generator)
    ids[:, 0] = first_token(model, tokenizer)
    return ids


@torch.no_grad()
def self_generated(
    model: nn.Module,
    tokenizer: Any,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    progress: Progress | None = None,
) -> Tensor:
    """Texts that the model samples from itself at temperature 1: int64 [sequences, length], the same at every run."""
    device = next(model.parameters()).device
    ids = torch.full((sequences, 1), first_token(model, tokenizer), device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    past, step = None, ids
    for count in range(1, length):
        output = model(input_ids=step, past_key_values=past, use_cache=True)
        probabilities = output.logits[:, -1].to(device).float().softmax(-1)
        step = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, step], 1)
        past = output.past_key_values
        if progress is not None:
            progress("sample calibration text", count, length - 1)
    return ids.cpu()


def whole_texts(tokenizer: Any, texts: Sequence[str], size: int = 64) -> list[Tensor]:
    """Each text by itself, as an encoder reads it: int64 [at most `size`, tokens] of one length each, no padding."""
    lengths: dict[int, list[Tensor]] = {}
    for text in texts:
        ids = tokenizer([text], return_tensors="pt", truncation=True)["input_ids"]
        lengths.setdefault(ids.shape[1], []).append(ids)
    return [batch for _, same in sorted(lengths.items()) for batch in torch.cat(same).split(size)]


def text_sequences(model: nn.Module, tokenizer: Any, text: str, sequences: int = 32, length: int = 512) -> Tensor:
    """Windows of a user's text, each begun by the first token: int64 [windows, length]."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = min(sequences, len(ids) // (length - 1))
    if count == 0:
        raise TqwError(
            f"expected a calibration text of at least {length - 1} tokens, got {len(ids)}: use a longer file"
        )
    windows = torch.tensor(ids[: count * (length - 1)]).view(count, length - 1)
    return torch.cat([torch.full((count, 1), first_token(model, tokenizer)), windows], 1)
