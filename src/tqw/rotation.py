"""The rotation H: a block-diagonal orthogonal matrix that makes weights look Gaussian.

Sources: QuIP# (arXiv 2402.04396, section 3) for randomised Hadamard incoherence, QuaRot (arXiv 2404.00456) for
rotating activations at run time, TurboQuant (arXiv 2504.19874, section 3) for rotation followed by scalar codes.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor


def hadamard_matrix(block: int) -> Tensor:
    """Normalised Walsh-Hadamard matrix: H[i, j] = (-1)^popcount(i & j) / sqrt(block). H = H^T = H^-1.

    block: a power of two. Returns float32 [block, block] on the CPU.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / block**0.5).float()


def qr_matrix(block: int, seed: int) -> Tensor:
    """Haar-distributed orthogonal matrix: Q of a Gaussian's QR with R's diagonal made positive.

    LAPACK builds differ in the last bit, so this matrix is stored in the checkpoint, never regenerated.
    Returns float32 [block, block] on the CPU. (Mezzadri, arXiv math-ph/0609050.)
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(block, block, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().contiguous()


def rotation_signs(size: int, seed: int, rotation_pass: int = 0) -> Tensor:
    """Random signs +-1, float32 [size]: bit i of MT19937's `getrandbits(size)` picks -1.

    Layers that read the same number of inputs get the same signs; each pass of a residual code may have its own.
    """
    bits = random.Random(seed + 2**32 * rotation_pass).getrandbits(size)
    return torch.tensor([-1.0 if bits >> i & 1 else 1.0 for i in range(size)])


@lru_cache(maxsize=64)
def _hadamard_on(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return hadamard_matrix(block).to(device, dtype)


def matrix_for(rotation: str, block: int, rotation_matrix: Tensor | None, like: Tensor) -> Tensor | None:
    """The [block, block] matrix of a rotation kind, on the device and in the dtype of `like`; None for `none`."""
    if rotation == "none":
        return None
    if rotation == "hadamard":
        return _hadamard_on(block, like.device, like.dtype)
    assert rotation_matrix is not None, "rotation 'qr' needs its stored matrix"
    return rotation_matrix.to(like.device, like.dtype)


def rotate(x: Tensor, matrix: Tensor | None) -> Tensor:
    """x H^T on every block of the last dimension: [..., n] -> [..., n], block dividing n."""
    if matrix is None:
        return x
    blocks = x.unflatten(-1, (-1, matrix.shape[0]))
    return (blocks @ matrix.T).flatten(-2)


def unrotate(x: Tensor, matrix: Tensor | None) -> Tensor:
    """x H on every block of the last dimension, the inverse of `rotate`."""
    if matrix is None:
        return x
    blocks = x.unflatten(-1, (-1, matrix.shape[0]))
    return (blocks @ matrix).flatten(-2)
