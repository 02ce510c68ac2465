"""Gradients of what a model computes with respect to the outputs of its layers, and what they say of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tqw.errors import TqwError
from tqw.model import input_name, kind_of

TOKEN_POWER = 0.5  # measured: docs/quality.md


@contextmanager
def _gradients_of_activations(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient for the while, the embedding's output does."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_(True))  # type: ignore[operator]
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


def sampled_loss(output: Any, generator: torch.Generator) -> Tensor | None:
    """A random scalar whose gradients' squares have the sensitivity as their mean; None for outputs not known."""
    logits, hidden = getattr(output, "logits", None), getattr(output, "last_hidden_state", None)
    if logits is not None:
        logs = logits.flatten(0, -2).float().log_softmax(-1)
        sampled = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
        return logs.gather(-1, sampled).sum()
    if hidden is not None:
        return (hidden.float() * torch.randn(hidden.shape, generator=generator).to(hidden.device)).sum()
    return None


def run_backward(
    model: nn.Module,
    batches: Sequence[Tensor],
    hooks: Mapping[str, Callable[..., None]],
    after: Callable[[int], None],
) -> None:
    """One forward and one backward pass of `sampled_loss` for each batch, int64 [sequences, tokens].

    hooks: forward hooks by module name, whose outputs have gradients. after(count): called behind each batch. For
    outputs not known nothing is run backward.
    """
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    handles = []
    with _gradients_of_activations(model):  # its hook first: the embedding's output needs a gradient when watched
        try:
            handles += [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
            for count, batch in enumerate(batches, 1):
                loss = sampled_loss(model(input_ids=batch.to(device), use_cache=False), generator)
                if loss is None:
                    return
                loss.backward()
                after(count)
        finally:
            for handle in handles:
                handle.remove()


def token_weights(model: nn.Module, batches: Sequence[Tensor], power: float = TOKEN_POWER) -> dict[str, list[Tensor]]:
    """How much an error in what a layer makes of a token matters, by the name of the layer's input.

        w_t  ~  (sum over the linears of the input of  mean_n g_nt^2)^power,    mean over all tokens = 1

    g: gradients of `sampled_loss` with respect to a linear's outputs, so that E g g^T is the Fisher matrix. For each of
    `batches` (int64 [sequences, tokens]) float32 [sequences * tokens], on the CPU. One forward and one backward pass of
    the float model. A power below 1 keeps the tokens of a single draw, whose g is noisy, from deciding alone. Layers
    that no gradient reaches are left out. Source: guidance by the end loss (GuidedQuant, arXiv 2505.07004), here with
    one weight for all outputs, and tempered.
    """
    found: dict[str, list[Tensor]] = {}
    now: dict[tuple[str, int], Tensor] = {}  # of one batch, by input and number of tokens

    def watch(name: str) -> Any:
        def forward(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            energy = gradient.float().square().mean(-1).flatten().cpu()
            key = input_name(name), len(energy)
            now[key] = now[key] + energy if key in now else energy

        return forward

    def keep(count: int) -> None:
        for (key, tokens), energy in now.items():
            if tokens == batches[count - 1].numel():  # others read tokens of their own, as experts do
                found.setdefault(key, []).append(energy)
        now.clear()

    linears = [name for name, module in model.named_modules() if kind_of(module) in ("linear", "conv1d")]
    run_backward(model, batches, {name: watch(name) for name in linears}, keep)
    if not found:
        raise TqwError("expected linears on which the model's logits or last hidden states depend, found none")
    complete = {name: parts for name, parts in found.items() if len(parts) == len(batches)}
    return {name: _normalised(parts, power) for name, parts in complete.items()}


def _normalised(parts: list[Tensor], power: float) -> list[Tensor]:
    parts = [part.pow(power) for part in parts]
    mean = torch.cat(parts).mean().clamp(min=1e-30)
    return [part / mean for part in parts]
