"""QuantConfig: valid or not at all, and the same after a round trip through JSON."""

from __future__ import annotations

import json

import pytest

from tqw.config import QuantConfig, block_size, group_size, padded_features, parse_bits
from tqw.errors import TqwError


@pytest.mark.parametrize(
    ("text", "bits"), [(4, (4,)), ("4", (4,)), ("4+4", (4, 4)), ([3, 2], (3, 2)), ("4+2+8", (4, 2, 8))]
)
def test_parse_bits(text, bits):
    assert parse_bits(text) == bits


@pytest.mark.parametrize("bad", [0, 1, 7, 16, "", "4+", "four", "4+7", "2+2+2+2+2", [], None, 4.5])
def test_unknown_bits_name_the_choices(bad):
    with pytest.raises(TqwError, match="2, 3, 4, 5, 6, 8"):
        parse_bits(bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_size", 0),
        ("group_size", 16),
        ("group_size", 96),
        ("group_size", "64"),
        ("rotation", "dct"),
        ("rotation_strategy", "same"),
        ("scale", "max"),
        ("overrides", (("(", "4"),)),
        ("overrides", (("x", "7"),)),
        ("overrides", ("x",)),
    ],
)
def test_invalid_settings_do_not_exist(field, value):
    with pytest.raises(TqwError, match="expected"):
        QuantConfig(**{field: value})


def test_json_round_trip():
    config = QuantConfig(
        bits="4+4",  # type: ignore[arg-type]
        group_size=-1,
        rotation="qr",
        rotation_strategy="different",
        scale="norm",
        seed=3,
        overrides=((r"down_proj$", "5"), ("gate", "skip")),
        embedding="8",  # type: ignore[arg-type]
        lm_head="6",  # type: ignore[arg-type]
        modules_to_not_convert=("a.b",),
    )
    entry = json.loads(json.dumps(config.to_dict()))
    assert entry["quant_method"] == "tqw"
    assert entry["format_version"] == 1
    assert QuantConfig.from_dict(entry) == config


def test_foreign_newer_and_unknown_entries_are_refused():
    entry = QuantConfig().to_dict()
    with pytest.raises(TqwError, match="quant_method 'tqw'"):
        QuantConfig.from_dict({**entry, "quant_method": "gptq"})
    with pytest.raises(TqwError, match=r"format_version 1, got 2: upgrade tqw"):
        QuantConfig.from_dict({**entry, "format_version": 2})
    with pytest.raises(TqwError, match="'surprise'"):
        QuantConfig.from_dict({**entry, "surprise": 1})


def test_first_matching_override_wins():
    config = QuantConfig(overrides=((r"layers\.0\.", "8"), ("down_proj", "skip")))
    assert config.override_for("layers.0.down_proj") == "8"
    assert config.override_for("layers.1.down_proj") == "skip"
    assert config.override_for("layers.1.up_proj") is None


@pytest.mark.parametrize(
    ("in_features", "padded", "block", "group_128"),
    [(1, 32, 32, 32), (7, 32, 32, 32), (100, 128, 128, 128), (576, 576, 64, 64), (4096, 4096, 128, 128),
     (11008, 11008, 128, 128), (4864, 4864, 128, 128), (48, 64, 64, 64), (33, 64, 64, 64)],
)  # fmt: skip
def test_padding_block_and_group(in_features, padded, block, group_128):
    assert padded_features(in_features) == padded
    assert block_size(in_features) == block
    assert group_size(in_features, 128) == group_128
    assert group_size(in_features, -1) == padded
    assert padded % block == 0
    assert padded % group_128 == 0
