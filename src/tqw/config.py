"""What to quantize and how: one small frozen object that cannot exist invalid. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tqw.errors import TqwError

FORMAT_VERSION = 1
QUANT_METHOD = "tqw"
WIDTHS = (2, 3, 4, 5, 6, 8)
ROTATIONS = ("hadamard", "qr", "none")
ROTATION_STRATEGIES = ("shared", "different", "alternating")
SCALES = ("search", "norm")
MIN_GROUP = 32
MAX_BLOCK = 128
SKIP = "skip"

Bits = tuple[int, ...]


def parse_bits(bits: int | str | Iterable[int]) -> Bits:
    """`4` -> (4,), `"4+4"` -> (4, 4), `[3, 2]` -> (3, 2): one width for each residual pass."""
    widths = bits.split("+") if isinstance(bits, str) else [bits] if isinstance(bits, int) else bits
    try:
        parsed = tuple(int(width) for width in widths)
    except (TypeError, ValueError):
        parsed = ()
    if not 1 <= len(parsed) <= 4 or any(width not in WIDTHS for width in parsed):
        raise TqwError(
            f"expected bits as one of {', '.join(map(str, WIDTHS))}, or 2 to 4 of them joined by '+' "
            f"(for example '4+4'), got {bits!r}"
        )
    return parsed


def format_bits(bits: Bits) -> str:
    """(4, 4) -> "4+4"."""
    return "+".join(map(str, bits))


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise TqwError(f"expected {name} to be one of {', '.join(map(str, allowed))}, got {value!r}")


@dataclass(frozen=True)
class QuantConfig:
    """How the linears of a model are quantized.

    bits              widths of the residual passes; an int or a string such as "4+4" is accepted
    group_size        inputs that share one weight scale: a power of two >= 32, or -1 for a whole row.
                      A layer takes the largest power of two <= group_size that divides its in_features.
    rotation          hadamard | qr | none
    rotation_strategy shared | different | alternating: which pass uses which random signs
    scale             search (least-squares best) | norm (root mean square, the original recipe)
    seed              seed of the random signs and of the `qr` matrix
    overrides         (regex, bits or "skip") pairs; the first that `re.search` finds in a module's name wins
    embedding         bits of the input embedding, None keeps it
    lm_head           bits of the output embedding, None keeps it
    modules_to_not_convert   names of modules that stay as they are (resolved and frozen when a model is quantized)
    """

    bits: Bits = (4,)
    group_size: int = 128
    rotation: str = "hadamard"
    rotation_strategy: str = "shared"
    scale: str = "search"
    seed: int = 0
    overrides: tuple[tuple[str, str], ...] = ()
    embedding: Bits | None = None
    lm_head: Bits | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("bits", parse_bits(self.bits))
        put("embedding", None if self.embedding is None else parse_bits(self.embedding))
        put("lm_head", None if self.lm_head is None else parse_bits(self.lm_head))
        put("modules_to_not_convert", tuple(self.modules_to_not_convert))
        put("overrides", tuple(_parse_override(pair) for pair in self.overrides))
        _require("rotation", self.rotation, ROTATIONS)
        _require("rotation_strategy", self.rotation_strategy, ROTATION_STRATEGIES)
        _require("scale", self.scale, SCALES)
        size = self.group_size
        if not isinstance(size, int) or (size != -1 and (size < MIN_GROUP or size & (size - 1))):
            raise TqwError(
                f"expected group_size to be a power of two >= {MIN_GROUP}, or -1 for whole rows, got {size!r}"
            )

    def override_for(self, name: str) -> str | None:
        """Bits or "skip" from the first override whose regex is found in `name`; None when there is none."""
        return next((value for pattern, value in self.overrides if re.search(pattern, name)), None)

    def with_bits(self, bits: Bits) -> QuantConfig:
        """The same settings at other widths."""
        return replace(self, bits=bits)

    def to_dict(self) -> dict[str, Any]:
        """The JSON value of `quantization_config` in config.json."""
        entry: dict[str, Any] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("bits", "embedding", "lm_head"):
                value = None if value is None else format_bits(value)
            elif field.name == "overrides":
                value = [list(pair) for pair in value]
            elif isinstance(value, tuple):
                value = list(value)
            entry[field.name] = value
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> QuantConfig:
        """Read `quantization_config` back; a newer format or an unknown key is an error, never a guess."""
        method = entry.get("quant_method")
        if method != QUANT_METHOD:
            raise TqwError(f"expected quant_method {QUANT_METHOD!r} in quantization_config, got {method!r}")
        version = entry.get("format_version")
        if version != FORMAT_VERSION:
            raise TqwError(
                f"expected format_version {FORMAT_VERSION}, got {version!r}: "
                "upgrade tqw (pip install -U tqw) or quantize the model again"
            )
        known = {field.name for field in fields(cls)}
        settings = {key: value for key, value in entry.items() if key not in ("quant_method", "format_version")}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise TqwError(f"expected the keys {sorted(known)} in quantization_config, got also {unknown}")
        return cls(**settings)


def _parse_override(pair: Iterable[str]) -> tuple[str, str]:
    try:
        pattern, value = pair
        re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise TqwError(f"expected an override as (regex, bits or 'skip'), got {pair!r}: {error}") from None
    value = str(value)
    if value != SKIP:
        value = format_bits(parse_bits(value))
    return str(pattern), value


def padded_features(in_features: int) -> int:
    """in_features, rounded up to a multiple of 32 when 32 does not divide it (the padding meets zeros)."""
    return -(-in_features // MIN_GROUP) * MIN_GROUP


def _largest_power_of_two(limit: int, multiple: int) -> int:
    """Largest power of two <= limit that divides `multiple`."""
    return min(multiple & -multiple, 1 << (limit.bit_length() - 1))


def block_size(in_features: int) -> int:
    """Rotation block: largest power of two <= 128 that divides the padded in_features."""
    return _largest_power_of_two(MAX_BLOCK, padded_features(in_features))


def group_size(in_features: int, wanted: int) -> int:
    """Scale group: largest power of two <= wanted that divides the padded in_features; all of it for -1."""
    padded = padded_features(in_features)
    return padded if wanted == -1 else _largest_power_of_two(wanted, padded)
