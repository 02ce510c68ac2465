"""Packing: exact inverses, true sizes, literal bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqw.config import WIDTHS
from tqw.errors import TqwError
from tqw.packing import pack, packed_bytes, unpack


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from((32, 64, 96, 128, 256)),
    groups=st.integers(1, 4),
    lead=st.sampled_from(((), (1,), (3,), (2, 5))),
    seed=st.integers(0, 2**31),
)
def test_round_trip(bits, group, groups, lead, seed):
    codes = torch.randint(
        2**bits, (*lead, group * groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits, group)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, packed_bytes(group * groups, bits))
    assert torch.equal(unpack(packed, bits, group), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_slices_at_group_boundaries_are_whole_bytes(bits):
    codes = torch.randint(2**bits, (4, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits, 64)
    half = packed[:, : packed.shape[1] // 2]
    assert torch.equal(unpack(half, bits, 64), codes[:, :128])


def test_bit_order_is_the_documented_one():
    codes = torch.arange(32, dtype=torch.uint8)
    assert pack(codes % 16, 4, 32)[:3].tolist() == [0x10, 0x32, 0x54]
    assert pack(codes % 4, 2, 32)[:2].tolist() == [0b11100100, 0b11100100]
    three = pack(codes % 8, 3, 32)
    assert three[:2].tolist() == [0b11100100, 0b11100100]  # low two bits of codes 0..7
    assert three[8:].tolist() == [0b11110000] * 4  # high bit of codes 0..7, 8..15, ...
    five = pack(codes, 5, 32)
    assert five[:2].tolist() == [0x10, 0x32]
    assert five[16:].tolist() == [0, 0, 255, 255]
    six = pack(codes, 6, 32)
    assert six[16:20].tolist() == [0, 0, 0, 0]
    assert six[20:24].tolist() == [0b01010101] * 4  # codes 16..31: high two bits are 1
    assert pack(codes, 8, 32).tolist() == codes.tolist()


@pytest.mark.parametrize(("length", "group"), [(40, 32), (64, 48), (64, 16)])
def test_ragged_groups_are_refused(length, group):
    with pytest.raises(TqwError, match="group_size"):
        pack(torch.zeros(length, dtype=torch.uint8), 4, group)
