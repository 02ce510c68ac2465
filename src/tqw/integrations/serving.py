"""What the plug-ins of serving engines share: what a checkpoint stores, by its headers, and layers made of stored rows.

Engines fuse layers that read one input (q, k, v; gate, up): their rows are stacked, and their equal channel scales
become one. A row-parallel layer is cut along its inputs, at whole groups and whole rotation blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tqw import kernels
from tqw.config import format_bits
from tqw.errors import TqwError
from tqw.layer import ROTATION_MATRIX, attached, kept_weight, parameter_names
from tqw.weight import QuantizedWeight

BITS_OVERRIDE = "tqw_bits"  # an attribute of the model's config: load the first passes only
Stored = dict[str, dict[str, QuantizedWeight]]
_CHANNEL = "channel_scale"
_DTYPES = {"U8": torch.uint8, "F16": torch.float16}


def holder(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with these parameters, for `attached` to read."""
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def stored_weights(headers: Mapping[str, Any], rotation: str) -> Stored:
    """Module -> parameter prefix ("" but for experts) -> its weight on the meta device.

    headers: tensor name -> {"dtype": ..., "shape": ...}, as safetensors files begin.
    """
    owners: dict[str, dict[str, Tensor]] = {}
    for name, info in headers.items():
        if info.get("dtype") in _DTYPES:
            owner, _, key = name.rpartition(".")
            empty = torch.empty(info["shape"], dtype=_DTYPES[info["dtype"]], device="meta")
            owners.setdefault(owner, {})[key] = empty
    found: Stored = {}
    for owner, tensors in owners.items():
        channels = [key for key in tensors if key.endswith(_CHANNEL) and "residual_" not in key]
        if channels:
            module = holder(tensors)
            prefixes = [key.removesuffix(_CHANNEL).rstrip("_") for key in channels]
            found[owner] = {prefix: attached(module, rotation, prefix) for prefix in prefixes}
    if not found:
        raise TqwError(
            "expected safetensors files with quantized weights beside config.json, found none: download the model again"
        )
    return found


def first_passes(stored: Stored, bits: tuple[int, ...] | None) -> Stored:
    """Weights whose widths begin with `bits`, cut to those passes; others (overrides, embeddings) as they are."""
    if bits is None:
        return stored
    widths = {qw.bits for weights in stored.values() for qw in weights.values()}
    if not any(width[: len(bits)] == bits for width in widths):
        raise TqwError(
            f"expected {BITS_OVERRIDE} to be the first passes of what is stored "
            f"({', '.join(sorted(map(format_bits, widths)))}), got {format_bits(bits)}: quantize the model again"
        )
    return {
        module: {prefix: qw.prefix(len(bits)) if qw.bits[: len(bits)] == bits else qw for prefix, qw in weights.items()}
        for module, weights in stored.items()
    }


def tensor_names(module: str, prefix: str, passes: Iterable[int]) -> set[str]:
    """Names in the checkpoint of everything that these passes of a module may have."""
    return {f"{module}.{name}" for index in passes for name in parameter_names(prefix, index)}


def parts_of(prefix: str, fused: Mapping[str, list[str]], find: Callable[[str], str | None]) -> list[str]:
    """Stored names of the layers that an engine's layer `prefix` is made of; empty when it stays dense.

    fused: last part of a fused layer's name -> those of its parts. find: engine's name -> stored name or None.
    """
    whole = find(prefix)
    if whole is not None:  # the model stores it fused
        return [whole]
    parent, _, leaf = prefix.rpartition(".")
    leaves = fused.get(leaf, [leaf])
    found = {part: find(f"{parent}.{part}" if parent else part) for part in leaves}
    missing = [part for part, name in found.items() if name is None]
    names = [name for name in found.values() if name is not None]
    if names and missing:
        raise TqwError(
            f"expected {', '.join(leaves)} of {parent} to be quantized alike, since they are fused here, but "
            f"{', '.join(missing)} is not: quantize again with one override for all of them"
        )
    return names


def check_columns(name: str, qw: QuantizedWeight, columns: int) -> None:
    """A rank's share of the inputs must be whole groups and whole rotation blocks."""
    if columns == qw.in_features or (
        qw.padded_in == qw.in_features and columns % qw.group_size == 0 and columns % qw.block == 0
    ):
        return
    raise TqwError(
        f"{name}: expected a tensor parallel size that cuts {qw.in_features} inputs into whole groups of "
        f"{qw.group_size} and whole rotation blocks of {qw.block}, got {qw.in_features // columns} ranks of {columns} "
        "inputs: take a smaller tensor parallel size, or quantize with a smaller --group-size if the block fits"
    )


def unfilled(stored: Tensor, rows: int, columns: int, qw: QuantizedWeight) -> Tensor:
    """An empty tensor for `rows` outputs and `columns` inputs of a stored one, on the default device."""
    return torch.empty(*stored.shape[:-2], rows, stored.shape[-1] * columns // qw.in_features, dtype=stored.dtype)


class PartLoader:
    """An engine's loader of one parameter, which counts its parts and sees to it that channel scales are equal."""

    def __init__(self, names: list[str], loader: Callable[..., None]) -> None:
        self.names, self.loader = names, loader
        self.parts: list[Tensor] = []

    def __call__(self, parameter: nn.Parameter, tensor: Tensor, *shard: Any) -> None:
        if tensor.ndim == 1 and self.parts and not torch.equal(tensor, self.parts[0]):
            raise TqwError(
                f"expected equal channel scales in {', '.join(self.names)}, which read the same input, got different "
                "ones: quantize the model again"
            )
        self.loader(parameter, tensor, *shard)
        self.parts.append(tensor if tensor.ndim == 1 else tensor[:0])

    def require_complete(self, name: str) -> None:
        if len(self.parts) != len(self.names):
            raise TqwError(
                f"expected the tensor {name} of {', '.join(self.names)} in the checkpoint, got {len(self.parts)} of "
                f"{len(self.names)}: download or quantize the model again"
            )


class StackedRows:
    """y = x dequantize(weight)^T + bias, or dequantize(weight)[ids], where a layer stacks the rows of stored ones."""

    def __init__(self, stored: Stored, names: list[str]) -> None:
        self.names = names
        self.weight = stored[names[0]][""]
        layouts = {name: stored[name][""] for name in names}
        if len({(qw.bits, qw.group_size, len(qw.channel_scale)) for qw in layouts.values()}) > 1:
            widths = {name: format_bits(qw.bits) for name, qw in layouts.items()}
            raise TqwError(
                f"expected the same bits and group size for layers that are fused here, got {widths}: quantize again "
                "with one override for all of them"
            )

    def create(
        self, layer: nn.Module, rows: int, columns: int, loader: Callable[..., None], grouped: type, channel: type
    ) -> None:
        """Register unfilled parameters under the stored names.

        grouped, channel: the engine's parameter classes for [out, in] and for [in]; loader: its weight loader.
        """
        qw = self.weight
        check_columns(self.names[0], qw, columns)

        def put(name: str, kind: type, data: Tensor, **dims: int) -> None:
            layer.register_parameter(name, kind(data=data, weight_loader=PartLoader(self.names, loader), **dims))

        for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
            packed_name, scale_name, channel_name = parameter_names("", index)
            put(packed_name, grouped, unfilled(packed, rows, columns, qw), input_dim=1, output_dim=0)
            put(scale_name, grouped, unfilled(scale, rows, columns, qw), input_dim=1, output_dim=0)
            if index < len(qw.channel_scale):
                put(channel_name, channel, torch.empty(columns, dtype=torch.uint8), input_dim=0)

    def finish(self, layer: nn.Module, matrix: Callable[[QuantizedWeight, torch.device], nn.Parameter | None]) -> None:
        """After loading: plain parameters, complete, and the rotation matrix of kind `qr`."""
        for name, parameter in list(layer.named_parameters(recurse=False)):
            loader = getattr(parameter, "_weight_loader", None)
            if isinstance(loader, PartLoader):
                loader.require_complete(name)
                layer.register_parameter(name, nn.Parameter(parameter.data, requires_grad=False))
        rotation = matrix(self.weight, layer.get_parameter("weight").device)
        if rotation is not None:
            layer.register_parameter(ROTATION_MATRIX, rotation)

    def linear(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.linear(x, kept_weight(layer, self.weight.rotation), bias)

    def embedding(self, layer: nn.Module, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return kernels.embedding(ids, kept_weight(layer, self.weight.rotation), dtype)


class StackedLinear:
    """An engine's method for linears, made of the stored layers `names`: to be mixed into the engine's base class."""

    parameter_classes: tuple[type, type]  # the engine's, for [out, in] and for [in]

    def __init__(self, config: Any, names: list[str]) -> None:
        self.config = config
        self.rows = StackedRows(config.stored, names)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **extra: Any,
    ) -> None:
        del input_size, output_size, params_dtype, extra
        outputs = sum(output_partition_sizes)
        self.rows.create(layer, outputs, input_size_per_partition, weight_loader, *self.parameter_classes)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.rows.finish(layer, self.config.matrix)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.rows.linear(layer, x, bias)
