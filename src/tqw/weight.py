"""QuantizedWeight: the quantized form of one dense weight, and the four steps between the two.

T(x)  = H (a * x)                      input transform, a = channel_scale
V     = weight_scale * level[code]     quantized weight in the rotated domain (a sum over residual passes)
dense = (V H) * a                      dequantize; linear(x) = T(x) V^T = x dense^T
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from tqw import config as configuration
from tqw.codebook import level_table, nearest_codes
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.packing import pack, packed_bytes, unpack
from tqw.rotation import matrix_for, qr_matrix, rotate, rotation_signs, unrotate
from tqw.scaling import decode_channel_scale, fold_channel_scale, group_scales

_CHUNK_CPU = 1 << 18  # elements worked on at once: one megabyte of float32 stays in the L2 cache
_CHUNK_GPU = 1 << 25


@dataclass(frozen=True)
class QuantizedWeight:
    """One dense weight [..., out, in] as residual passes of packed codes. Device-free plain layout (docs/format.md).

    packed          one uint8 tensor [..., out, padded_in * bits / 8] for each pass
    weight_scale    one fp16 tensor [..., out, padded_in / group_size] for each pass
    channel_scale   one uint8 (e5m2) tensor [in] for each rotation: a single one when all passes share it
    rotation        hadamard | qr | none
    rotation_matrix float32 [block, block] for `qr`, else None
    """

    packed: tuple[Tensor, ...]
    weight_scale: tuple[Tensor, ...]
    channel_scale: tuple[Tensor, ...]
    rotation: str = "hadamard"
    rotation_matrix: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.channel_scale[0].shape[-1]

    @property
    def out_features(self) -> int:
        return self.packed[0].shape[-2]

    @property
    def padded_in(self) -> int:
        return configuration.padded_features(self.in_features)

    @property
    def block(self) -> int:
        return configuration.block_size(self.in_features)

    @property
    def bits(self) -> tuple[int, ...]:
        return tuple(packed.shape[-1] * 8 // self.padded_in for packed in self.packed)

    @property
    def group_size(self) -> int:
        return self.padded_in // self.weight_scale[0].shape[-1]

    @property
    def shares_rotation(self) -> bool:
        return len(self.channel_scale) == 1

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.packed[0].shape[:-1], self.in_features))

    @property
    def device(self) -> torch.device:
        return self.packed[0].device

    def nbytes(self) -> int:
        """Bytes of everything stored: codes, weight scales, channel scales (not a checkpoint's one `qr` matrix)."""
        return sum(t.nbytes for group in (self.packed, self.weight_scale, self.channel_scale) for t in group)

    def bits_per_weight(self) -> float:
        """8 nbytes / number of weights: scales and padding counted."""
        return 8 * self.nbytes() / max(self.shape.numel(), 1)

    def matrix(self, like: Tensor) -> Tensor | None:
        """The rotation matrix on the device and in the dtype of `like`; None for rotation `none`."""
        return matrix_for(self.rotation, self.block, self.rotation_matrix, like)

    def scale_of_pass(self, index: int) -> Tensor:
        return self.channel_scale[0 if self.shares_rotation else index]

    def prefix(self, passes: int) -> QuantizedWeight:
        """The model that the first `passes` passes make on their own (nested precision)."""
        if not 1 <= passes <= len(self.packed):
            raise TqwError(f"expected 1 to {len(self.packed)} passes, got {passes}")
        return replace(
            self,
            packed=self.packed[:passes],
            weight_scale=self.weight_scale[:passes],
            channel_scale=self.channel_scale if self.shares_rotation else self.channel_scale[:passes],
        )

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One expert of a stacked weight [experts, out, in]."""
        return replace(
            self,
            packed=tuple(packed[index] for packed in self.packed),
            weight_scale=tuple(scale[index] for scale in self.weight_scale),
        )

    def split(self, out_features: Sequence[int]) -> list[QuantizedWeight]:
        """The weights of siblings that were quantized as one, stacked along `out`; each owns its tensors."""
        ends = torch.tensor([0, *out_features]).cumsum(0).tolist()
        return [
            replace(
                self,
                packed=tuple(packed[start:end].clone() for packed in self.packed),
                weight_scale=tuple(scale[start:end].clone() for scale in self.weight_scale),
                channel_scale=tuple(scale.clone() for scale in self.channel_scale),
            )
            for start, end in pairwise(ends)
        ]


def normal_tensor(tensor: Tensor) -> Tensor:
    """The tensor; of one made under torch.inference_mode, which autograd refuses and which has no version, a copy."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def transform(x: Tensor, channel_scale: Tensor, matrix: Tensor | None) -> Tensor:
    """T(x) = H (a * x): [..., in] -> [..., padded_in], in the dtype of x."""
    scaled = x * decode_channel_scale(channel_scale).to(x.dtype)
    padding = configuration.padded_features(x.shape[-1]) - x.shape[-1]
    return rotate(functional.pad(scaled, (0, padding)) if padding else scaled, matrix)


def untransform(v: Tensor, channel_scale: Tensor, matrix: Tensor | None) -> Tensor:
    """(v H) * a: the transpose of `transform`, [..., padded_in] -> [..., in]. dense = untransform(V)."""
    return unrotate(v, matrix)[..., : channel_scale.shape[-1]] * decode_channel_scale(channel_scale).to(v.dtype)


def rotated_levels(packed: Tensor, weight_scale: Tensor, padded_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """V = weight_scale[n, k // group_size] * level[code[n, k]]: one pass, [..., out, padded_in]."""
    bits = packed.shape[-1] * 8 // padded_in
    groups = weight_scale.shape[-1]
    codes = unpack(packed, bits, padded_in // groups)
    values = level_table(bits, packed.device, dtype).index_select(0, codes.flatten().int()).view(codes.shape)
    return (values.unflatten(-1, (groups, -1)) * weight_scale.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """dense = sum over passes of (V H) * a, computed in float32, returned in `dtype`: [..., out, in]."""
    dense = torch.zeros(qw.shape, dtype=torch.float32, device=qw.device)
    matrix = qw.matrix(dense)
    if qw.shares_rotation:
        return untransform(sum_of_passes(qw), qw.channel_scale[0], matrix).to(dtype)
    for packed, scale, channel_scale in zip(qw.packed, qw.weight_scale, qw.channel_scale, strict=True):
        dense += untransform(rotated_levels(packed, scale, qw.padded_in), channel_scale, matrix)
    return dense.to(dtype)


def sum_of_passes(qw: QuantizedWeight) -> Tensor:
    """V = V1 + V2 + ... of passes that share a rotation: float32 [..., out, padded_in]."""
    assert qw.shares_rotation
    passes = zip(qw.packed, qw.weight_scale, strict=True)
    total = rotated_levels(*next(passes), qw.padded_in)
    for packed, scale in passes:
        total += rotated_levels(packed, scale, qw.padded_in)
    return total


def choose_channel_scale(
    weights: Sequence[Tensor], config: QuantConfig, scale: Tensor | None = None, rotation_pass: int = 0
) -> Tensor:
    """The channel scale a (uint8 e5m2 [in]) for layers that read the same input.

    weights: dense [..., out, in], all with the same in_features. scale: float [in] from `activation_scale`, None for 1.
    """
    size = weights[0].shape[-1]
    signs = torch.ones(size) if config.rotation == "none" else rotation_signs(size, config.seed, rotation_pass)
    energy = sum(float(weight.float().square().sum()) for weight in weights)
    count = sum(weight.numel() for weight in weights)
    return fold_channel_scale(signs, scale, (energy / max(count, 1)) ** 0.5)


def _rotation_of_pass(strategy: str, index: int) -> int:
    """Which random signs pass `index` uses."""
    return {"different": index, "alternating": index % 2}[strategy]


def check(weight: Tensor) -> None:
    """Raise TqwError for a weight that cannot be quantized: not [..., out, in], not floating, empty, NaN or Inf."""
    if weight.ndim < 2 or not weight.is_floating_point():
        raise TqwError(f"expected a floating-point weight [out, in], got {weight.dtype} {list(weight.shape)}")
    if weight.numel() == 0:
        raise TqwError(f"expected a weight with at least one element, got shape {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise TqwError(
            "expected finite weights, got NaN or Inf: the checkpoint is damaged, or keep the layer with an override"
        )


def quantize(
    weight: Tensor,
    config: QuantConfig | None = None,
    *,
    channel_scale: Tensor | None = None,
    rotation_matrix: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a dense weight: V = (W / a) H^T, then for each pass the nearest codes of what is left of V.

    weight: floating [..., out, in], finite. channel_scale: uint8 (e5m2) [in] from `choose_channel_scale`, needed when
    several layers share their input. rotation_matrix: the checkpoint's `qr` matrix, made from the seed when absent.
    Raises TqwError for empty, non-finite or integer weights.
    """
    config = config or QuantConfig()
    check(weight)
    in_features = weight.shape[-1]
    first = choose_channel_scale([weight], config) if channel_scale is None else channel_scale
    scales = [first.to(weight.device, copy=True)]  # every layer owns its copy: a file stores no shared tensors
    if config.rotation_strategy != "shared":
        signs = [_rotation_of_pass(config.rotation_strategy, index) for index in range(len(config.bits))]
        scales = [_with_signs(scales[0], config, rotation_pass) for rotation_pass in signs]
    if config.rotation == "qr" and rotation_matrix is None:
        rotation_matrix = qr_matrix(configuration.block_size(in_features), config.seed)
    layout = QuantizedWeight((), (), tuple(scales), config.rotation, rotation_matrix)

    rows = weight.reshape(-1, in_features)
    step = max(1, (_CHUNK_GPU if weight.is_cuda else _CHUNK_CPU) // in_features)
    chunks = [_quantize_rows(rows[start : start + step].float(), config, layout) for start in range(0, len(rows), step)]
    lead = weight.shape[:-1]
    packed, weight_scale = (
        tuple(
            torch.cat([chunk[kind][index] for chunk in chunks]).unflatten(0, lead) for index in range(len(config.bits))
        )
        for kind in (0, 1)
    )
    return replace(layout, packed=packed, weight_scale=weight_scale)


def _with_signs(channel_scale: Tensor, config: QuantConfig, rotation_pass: int) -> Tensor:
    """The same magnitudes with the signs of another pass: flips bit 7 where the two sign vectors differ."""
    if config.rotation == "none" or rotation_pass == 0:
        return channel_scale
    size = channel_scale.shape[-1]
    differ = rotation_signs(size, config.seed) != rotation_signs(size, config.seed, rotation_pass)
    return channel_scale ^ (differ.to(channel_scale.device, torch.uint8) << 7)


def _quantize_rows(rows: Tensor, config: QuantConfig, layout: QuantizedWeight) -> tuple[list[Tensor], list[Tensor]]:
    """All passes of float32 rows [r, in]: packed codes and scales, one entry for each pass."""
    matrix = layout.matrix(rows)
    group = configuration.group_size(layout.in_features, config.group_size)
    packed, scales = [], []
    residual = rows  # dense when rotations differ, rotated once when they are shared
    if layout.shares_rotation:
        residual = into_rotated(rows, layout.channel_scale[0], matrix)
    for index, bits in enumerate(config.bits):
        channel_scale = layout.scale_of_pass(index)
        rotated = residual if layout.shares_rotation else into_rotated(residual, channel_scale, matrix)
        groups = rotated.unflatten(-1, (-1, group))
        scale = group_scales(groups, bits, config.scale)
        inverse = torch.where(scale > 0, 1 / scale.float(), 0)
        codes = nearest_codes(groups * inverse, bits).flatten(-2)
        packed.append(pack(codes, bits, group))
        scales.append(scale.squeeze(-1))
        if index + 1 < len(config.bits):
            values = rotated_levels(packed[-1], scales[-1], layout.padded_in)
            residual = residual - (values if layout.shares_rotation else untransform(values, channel_scale, matrix))
    return packed, scales


def into_rotated(rows: Tensor, channel_scale: Tensor, matrix: Tensor | None) -> Tensor:
    """V = (W / a) H^T, padded with zero columns."""
    scaled = rows / decode_channel_scale(channel_scale)
    padding = configuration.padded_features(rows.shape[-1]) - rows.shape[-1]
    return rotate(functional.pad(scaled, (0, padding)), matrix)


def merge_passes(qw: QuantizedWeight, bits: int = 8) -> QuantizedWeight:
    """One pass of `bits` in place of several that share a rotation: requantizes V1 + V2 + ... in the rotated domain.

    Decodes once instead of once for each pass; adds the error of one `bits`-wide code to V, nothing else.
    """
    if not qw.shares_rotation:
        raise TqwError("expected passes that share one rotation (rotation_strategy 'shared'): others cannot be merged")
    (bits,) = configuration.parse_bits(bits)
    group = qw.group_size
    total = sum_of_passes(qw).unflatten(-1, (-1, group))
    scale = group_scales(total, bits, "search")
    codes = nearest_codes(total * torch.where(scale > 0, 1 / scale.float(), 0), bits).flatten(-2)
    return replace(qw, packed=(pack(codes, bits, group),), weight_scale=(scale.squeeze(-1),))


def empty_weight(shape: Sequence[int], config: QuantConfig, device: torch.device | str = "meta") -> QuantizedWeight:
    """An unfilled QuantizedWeight for a dense weight of `shape` [..., out, in]: what a loader fills in."""
    *lead, in_features = shape
    padded = configuration.padded_features(in_features)
    groups = padded // configuration.group_size(in_features, config.group_size)
    block = configuration.block_size(in_features)
    rotations = 1 if config.rotation_strategy == "shared" else len(config.bits)

    def new(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return QuantizedWeight(
        tuple(new(*lead, packed_bytes(padded, bits)) for bits in config.bits),
        tuple(new(*lead, groups, dtype=torch.float16) for _ in config.bits),
        tuple(new(in_features) for _ in range(rotations)),
        config.rotation,
        new(block, block, dtype=torch.float32) if config.rotation == "qr" else None,
    )
