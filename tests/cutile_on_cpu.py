"""The part of `cuda.tile` that our kernels use, on numpy: what tests the kernels' arithmetic where there is no GPU.

Elements beyond an array are read as garbage unless the kernel asks for zeros, as on a GPU.
"""

from __future__ import annotations

from enum import Enum
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import torch

GARBAGE = {"f": np.nan, "u": 255}


class Narrow(Enum):
    """Types that numpy lacks: tiles of them are float32, rounded."""

    BFLOAT16 = 16
    TFLOAT32 = 13


class Tile(np.ndarray):
    def astype(self, dtype: Any, **kwargs: Any) -> Any:
        if dtype is Narrow.BFLOAT16:  # rounded by the store
            return super().astype(np.float32)
        if dtype is Narrow.TFLOAT32:  # to nearest, 11 significant bits
            bits = np.asarray(self, np.float32).view(np.uint32)
            rounded = ((bits + np.uint32(1 << 12)) & np.uint32(~0x1FFF & 0xFFFFFFFF)).view(np.float32)
            return np.where(np.isfinite(self), rounded, self).astype(np.float32).view(Tile)
        return super().astype(dtype, **kwargs)


class Array:
    """A tensor as a kernel sees it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.dtype = Narrow.BFLOAT16 if tensor.dtype == torch.bfloat16 else np.dtype(str(tensor.dtype)[6:]).type

    def part(self, index: tuple[int, ...], shape: tuple[int, ...], order: Any) -> torch.Tensor:
        view = self.tensor if order == "C" else self.tensor.permute(order)
        assert len(index) == len(shape) == view.ndim
        assert all(size & (size - 1) == 0 for size in shape), "a tile's sizes are powers of two"
        assert all(i * size < most for i, size, most in zip(index, shape, view.shape, strict=True)), "all outside"
        return view[tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, shape, strict=True))]


_block: list[int] = [0, 0, 0]


def load(array: Array, index: Any, shape: Any, *, order: Any = "C", padding_mode: Any = None) -> Tile:
    part = array.part(index, shape, order)
    values = (part.float() if array.dtype is Narrow.BFLOAT16 else part).numpy()
    outside = 0 if padding_mode == "zero" else GARBAGE[values.dtype.kind]
    missing = [(0, size - have) for size, have in zip(shape, values.shape, strict=True)]
    return np.pad(values, missing, constant_values=outside).view(Tile)


def store(array: Array, index: Any, tile: Tile, *, order: Any = "C") -> None:
    part = array.part(index, tile.shape, order)
    part.copy_(torch.from_numpy(np.asarray(tile)[tuple(slice(size) for size in part.shape)].copy()))


def gather(array: Array, codes: Tile, *, check_bounds: bool) -> Tile:
    del check_bounds
    return array.tensor.numpy()[codes].view(Tile)


def launch(grid: tuple[int, int, int], kernel: Any, arguments: tuple) -> None:
    arrays = [Array(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with np.errstate(all="ignore"):
        for block in product(*map(range, grid)):
            _block[:] = block
            kernel(*arrays)


def module() -> Any:
    ct: Any = ModuleType("cuda.tile")
    ct.kernel = lambda function=None, **hints: function or (lambda function: function)
    ct.Constant, ct.IndexedWithInt64 = {int: int}, object
    ct.PaddingMode = type("PaddingMode", (), {"ZERO": "zero"})
    ct.bid = lambda axis: _block[axis]
    ct.load, ct.store, ct.gather = load, store, gather
    ct.bitcast = lambda tile, dtype: tile.view(dtype)
    ct.pack_to_bytes = lambda tile: np.ascontiguousarray(tile).view(np.uint8).reshape(-1).view(Tile)
    ct.unpack_from_bytes = lambda tile, dtype: tile.view(dtype)
    ct.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(Tile)
    ct.arange = lambda size, *, dtype: np.arange(size, dtype=dtype).view(Tile)
    ct.max = lambda tile, axis, *, keepdims: tile.max(axis, keepdims=keepdims)
    ct.abs, ct.maximum, ct.mma = np.abs, np.maximum, _mma
    ct.uint16, ct.uint32, ct.int32, ct.float16, ct.float32 = np.uint16, np.uint32, np.int32, np.float16, np.float32
    ct.bfloat16, ct.tfloat32 = Narrow.BFLOAT16, Narrow.TFLOAT32
    return ct


def _mma(a: Tile, b: Tile, accumulator: Tile) -> Tile:
    assert a.dtype == b.dtype
    return accumulator + np.asarray(a, np.float32) @ np.asarray(b, np.float32)
