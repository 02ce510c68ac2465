"""Second moments of the layers' inputs, one input at a time, as everything quantized before it produces them.

    S[name] = mean over tokens of x x^T,   C[name] = mean of x0 x^T        x: what weight `name` multiplies

Only one input's moments and two sets of hidden states are in memory. The hidden states of all calibration sequences
walk through the decoder layers in step with the quantization. Within a layer an input is measured when its weight is
next, so that a weight makes up for the errors of the layers before it and of those in its own layer, once: moments of
a layer still dense would have every weight of it correct the same drift. (GPTQ, arXiv 2210.17323, section 4.) The float
model's own hidden states, whose inputs are x0, walk beside them (GPTAQ, arXiv 2504.02692).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tqw.errors import TqwError
from tqw.gptq import DRIFT_SHARE, Moments
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

    def mean(self, drift: float) -> Moments:
        count = max(self.tokens, 1)
        return Moments(self.second.div_(count), None if self.cross is None else self.cross.div_(count), drift)


class LayerMoments:
    """moments(name) for weights of the decoder layers, asked for in model order; None for others.

    ids: sequences of one length, or batches of such: what a model usually reads, whole. No padding is known of.
    drift: how much of the drift each layer makes up for; 1 is best where the texts are what the model will read.
    weights: w_t of each input's tokens in the means above, from `tqw.gradients.token_weights` of the same batches;
    inputs that it does not name have weights of 1.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor | Sequence[Tensor],
        drift: float = DRIFT_SHARE,
        weights: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        self.inputs = LayerInputs(model, ids)
        self.prefix, self.layers = self.inputs.prefix, self.inputs.layers
        self.drift, self.weights = drift, weights or {}
        self.dense: nn.Module | None = None  # the current layer before any of it was quantized
        self.dense_hidden = list(self.inputs.hidden)  # as the float model has it

    def _input(self, key: str, batch: int, layer: nn.Module, hidden: Tensor) -> Tensor | None:
        """What the linears called `key` read when `layer` stands in the current one's place: float32 [tokens, in]."""
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].flatten(0, -2).float())
            raise _Stop

        handles = [
            module.register_forward_pre_hook(keep)
            for name, module in layer.named_modules(prefix=f"{self.prefix}.{self.inputs.current}")
            if input_name(name) == key and kind_of(module) in ("linear", "conv1d")
        ]
        try:
            self.inputs.output(batch, layer, hidden)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen[0] if seen else None

    def _weighted(self, key: str, batch: int, x: Tensor | None) -> Tensor | None:
        """sqrt(w_t) x_t, so that sums over tokens are weighted."""
        if x is None or key not in self.weights:
            return x
        weights = self.weights[key][batch].to(x.device)
        if len(weights) != len(x):
            raise TqwError(
                f"expected a weight for each of {len(x)} tokens of {key}, got {len(weights)}: "
                "give token_weights the batches that LayerMoments gets"
            )
        return x * weights.sqrt()[:, None]

    def _measure(self, key: str) -> Moments | None:
        layer = self.layers[self.inputs.current]
        if self.dense is None:
            tensors = (*layer.parameters(), *layer.buffers())
            self.dense = copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})  # modules, not their tensors
        sums: _Sums | None = None
        for batch, (hidden, dense_hidden) in enumerate(zip(self.inputs.hidden, self.dense_hidden, strict=True)):
            x = self._weighted(key, batch, self._input(key, batch, layer, hidden))
            if x is not None:
                sums = sums or _Sums(x)
                sums.add(x, self._weighted(key, batch, self._input(key, batch, self.dense, dense_hidden)))
        return None if sums is None else sums.mean(self.drift)

    def _advance(self) -> None:
        for batch, hidden in enumerate(self.dense_hidden):
            self.dense_hidden[batch] = self.inputs.output(batch, self.dense, hidden)
        self.dense = None
        self.inputs.advance()

    @torch.no_grad()
    def __call__(self, name: str) -> Moments | None:
        """name: of a module."""
        head, _, rest = name.removeprefix(f"{self.prefix}.").partition(".")
        if not name.startswith(f"{self.prefix}.") or not head.isdigit() or not rest:
            return None
        while self.inputs.current < int(head):
            self._advance()
        return self._measure(input_name(name))
