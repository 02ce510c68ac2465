"""Rotations are orthogonal, invertible and the documented ones."""

from __future__ import annotations

import pytest
import torch

from tqw.rotation import hadamard_matrix, qr_matrix, rotate, rotation_signs, unrotate


@pytest.mark.parametrize("block", [32, 64, 128])
def test_hadamard_is_symmetric_orthogonal_and_normalised(block):
    h = hadamard_matrix(block)
    assert torch.equal(h, h.T)
    torch.testing.assert_close(h @ h, torch.eye(block), atol=1e-6, rtol=0)
    i, j = 5, 19
    assert float(h[i, j]) == pytest.approx((-1) ** (i & j).bit_count() / block**0.5)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_qr_is_orthogonal_and_depends_on_the_seed(block):
    q = qr_matrix(block, 1)
    torch.testing.assert_close(q @ q.T, torch.eye(block), atol=1e-6, rtol=0)
    assert not torch.equal(q, qr_matrix(block, 2))
    assert torch.equal(q, qr_matrix(block, 1))


@pytest.mark.parametrize("matrix", [None, hadamard_matrix(64), qr_matrix(64, 0)])
def test_unrotate_inverts_rotate_and_keeps_norms(matrix):
    x = torch.randn(3, 5, 192)
    y = rotate(x, matrix)
    torch.testing.assert_close(unrotate(y, matrix), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), atol=1e-4, rtol=1e-5)


def test_signs_are_fixed_by_seed_and_pass():
    assert torch.equal(rotation_signs(100, 0), rotation_signs(100, 0))
    assert not torch.equal(rotation_signs(100, 0), rotation_signs(100, 1))
    assert not torch.equal(rotation_signs(100, 0), rotation_signs(100, 0, 1))
    assert set(rotation_signs(576, 0).tolist()) == {-1.0, 1.0}
    assert rotation_signs(16, 0).tolist() == [1, 1, -1, -1, 1, -1, 1, 1, 1, 1, 1, -1, -1, 1, -1, -1]
    assert rotation_signs(16, 5, 1).tolist() == [-1, -1, 1, 1, 1, 1, -1, 1, 1, 1, 1, -1, 1, -1, 1, 1]
