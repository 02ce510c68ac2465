"""Second moments of the layers' inputs, one decoder layer at a time, as the quantized layers before it produce them.

    S[name] = mean over tokens of x x^T,   C[name] = mean of x0 x^T        x: what weight `name` multiplies

Only one layer's moments and two sets of hidden states are in memory. The hidden states of all calibration sequences
walk through the model in step with the quantization: layer i is run dense for its moments, then again, quantized, for
the inputs of layer i + 1, so that each layer makes up for the errors before it (GPTQ, arXiv 2210.17323, section 4). The
float model's own hidden states, whose inputs are x0, walk beside them (GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tqw.errors import TqwError
from tqw.gptq import Moments
from tqw.model import input_name, kind_of

_BATCH = 8  # sequences


class _Stop(Exception):
    """Ends the capturing forward pass before the last layer."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's stack of layers: the ModuleList that holds the most weights and is in no other."""
    stacks = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outermost = {
        n: m for n, m in stacks.items() if not any(n.startswith(f"{other}.") for other in stacks if other != n)
    }
    if not outermost:
        raise TqwError("expected a model with a list of layers for --method gptq, found none: use --method rtn")
    name = max(outermost, key=lambda n: sum(p.numel() for p in outermost[n].parameters()))
    return name, outermost[name]


class LayerInputs:
    """The hidden states of all sequences in front of one decoder layer, and what else each layer was called with."""

    def __init__(self, model: nn.Module, ids: Tensor | Sequence[Tensor]) -> None:
        self.prefix, self.layers = decoder_layers(model)
        self.current = 0
        self.hidden: list[Tensor] = []  # of each batch
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # of each batch and layer
        device = next(model.parameters()).device
        for batch in ids.split(_BATCH) if isinstance(ids, Tensor) else ids:
            self._capture(model, batch.to(device))

    @torch.no_grad()
    def _capture(self, model: nn.Module, batch: Tensor) -> None:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if not calls:
                self.hidden.append(hidden)
            calls.append((rest, kwargs))
            if len(calls) == len(self.layers):
                raise _Stop

        handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self.layers]
        try:
            model(input_ids=batch, use_cache=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.layers):
            raise TqwError(
                f"expected every layer of {self.prefix} to run once, {len(calls)} of {len(self.layers)} did: "
                "use --method rtn"
            )
        self.calls.append(calls)

    def output(self, batch: int, call: Callable[..., Any] | None = None, hidden: Tensor | None = None) -> Tensor:
        """What the current layer (or `call` in its place) makes of one batch, or of `hidden` in its place."""
        args, kwargs = self.calls[batch][self.current]
        hidden = self.hidden[batch] if hidden is None else hidden
        output = (call or self.layers[self.current])(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def advance(self) -> None:
        """Run the current layer, as it is now, and go on to the next."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.output(batch)
        self.current += 1


class _Sums:
    """Sums over tokens for one input; cross is given up where the float model's tokens went other ways."""

    def __init__(self, x: Tensor) -> None:
        self.second = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        self.cross: Tensor | None = torch.zeros_like(self.second)
        self.tokens = 0

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        self.second.addmm_(x.T, x)
        self.tokens += len(x)
        if self.cross is not None and dense is not None and dense.shape == x.shape:
            self.cross.addmm_(dense.T, x)
        else:
            self.cross = None

    def mean(self) -> Moments:
        count = max(self.tokens, 1)
        return Moments(self.second.div_(count), None if self.cross is None else self.cross.div_(count))


class LayerMoments:
    """moments(name) for weights of the decoder layers, asked for in model order; None for others.

    ids: sequences of one length, or batches of such: what a model usually reads, whole. No padding is known of.
    """

    def __init__(self, model: nn.Module, ids: Tensor | Sequence[Tensor]) -> None:
        self.inputs = LayerInputs(model, ids)
        self.prefix, self.layers = self.inputs.prefix, self.inputs.layers
        self.moments: dict[str, Moments] = {}
        self.measured = -1
        self.dense_hidden = list(self.inputs.hidden)  # as the float model has it

    @torch.no_grad()
    def _measure(self, index: int) -> None:
        self.moments = {}
        found: dict[str, _Sums] = {}
        for batch in range(len(self.inputs.hidden)):
            with self._watched(index) as dense:
                self.dense_hidden[batch] = self.inputs.output(batch, hidden=self.dense_hidden[batch])
            with self._watched(index) as now:
                self.inputs.output(batch)
            for key, x in now.items():
                if key not in found:
                    found[key] = _Sums(x)
                found[key].add(x, dense.get(key))
        self.moments = {key: sums.mean() for key, sums in found.items()}
        self.measured = index

    def _advance(self) -> None:
        if self.inputs.current != self.measured:  # still dense: the float model's hidden states pass it here
            with torch.no_grad():
                for batch, hidden in enumerate(self.dense_hidden):
                    self.dense_hidden[batch] = self.inputs.output(batch, hidden=hidden)
        self.inputs.advance()

    @contextmanager
    def _watched(self, index: int) -> Iterator[dict[str, Tensor]]:
        """What each input of the layer's linears is, in a forward pass inside: float32 [tokens, in]."""
        seen: dict[str, Tensor] = {}

        def keep(key: str, x: Tensor) -> None:
            seen.setdefault(key, x.flatten(0, -2).float())

        handles = []
        for name, module in self.layers[index].named_modules(prefix=f"{self.prefix}.{index}"):
            key = input_name(name)
            if kind_of(module) in ("linear", "conv1d"):
                handles.append(module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args[0])))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, name: str) -> Moments | None:
        """name: of a module."""
        head, _, rest = name.removeprefix(f"{self.prefix}.").partition(".")
        if not name.startswith(f"{self.prefix}.") or not head.isdigit() or not rest:
            return None
        index = int(head)
        if index != self.measured:
            while self.inputs.current < index:
                self._advance()
            self._measure(index)
        return self.moments.get(input_name(name))
