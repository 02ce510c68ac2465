"""Packing of integer codes into bytes, at their true size.

Each row is packed group by group along `in`. A width is a sum of planes: 1, 2, 4 and 8 are one plane, 3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2; the first plane holds the low bits. A plane of width w puts 8 / w codes into a byte, the first
in the low bits. One group of 32 codes at 3 bits:

    byte   0                         7   8                          11
          [c0 c1 c2 c3: low 2 bits] ... [c0 .. c7: high bit] ... [c24 .. c31]
           \\_______ plane of 2 ______/  \\________ plane of 1 _________/

A group is a multiple of 32 codes, so every plane, and with it every slice at a group boundary, is whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tqw.errors import TqwError

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def packed_bytes(features: int, bits: int) -> int:
    """Bytes of one row: features * bits / 8."""
    return features * bits // 8


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, device=device, dtype=torch.uint8)


def pack(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """uint8 codes [..., n] < 2^bits  ->  uint8 bytes [..., n * bits / 8]; 32 | group_size | n."""
    if codes.shape[-1] % group_size or group_size % 32:
        raise TqwError(
            f"expected a group_size that is a multiple of 32 and divides the row, got group_size {group_size} "
            f"for rows of {codes.shape[-1]} codes"
        )
    groups = codes.unflatten(-1, (codes.shape[-1] // group_size, group_size))
    planes, low = [], 0
    for width in PLANES[bits]:
        field = (groups >> low) & (2**width - 1)
        fields = field.unflatten(-1, (-1, 8 // width)) << _shifts(width, codes.device)
        planes.append(fields.sum(-1, dtype=torch.uint8))
        low += width
    return torch.cat(planes, -1).flatten(-2)


def unpack(packed: Tensor, bits: int, group_size: int) -> Tensor:
    """The inverse of `pack`: uint8 bytes [..., n * bits / 8]  ->  uint8 codes [..., n]."""
    group_bytes = packed_bytes(group_size, bits)
    groups = packed.unflatten(-1, (packed.shape[-1] // group_bytes, group_bytes))
    codes, low, start = None, 0, 0
    for width in PLANES[bits]:
        count = packed_bytes(group_size, width)
        plane = groups[..., start : start + count].unsqueeze(-1)
        field = ((plane >> _shifts(width, packed.device)) & (2**width - 1)).flatten(-2)
        codes = field if codes is None else codes | (field << low)
        low, start = low + width, start + count
    assert codes is not None
    return codes.flatten(-2)
