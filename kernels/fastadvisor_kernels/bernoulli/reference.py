"""Philox 4x32-10 (Salmon et al. 2011) in plain torch, and the mask made of it. Shapes: B rows, C classes."""

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


class Bernoulli(NamedTuple):
    """A (B, C) mask of {0, 1}, each entry 1 with ``probability``, that is a function of ``seed`` alone.

    The kernels compute it where they use it, so nothing of size (B, C) is stored; forward and backward see the same mask.
    """

    probability: float
    """In [0, 1]."""
    seed: Tensor
    """One int64, shape (): on the device of the mask, so that nothing waits for the host and a CUDA graph can renew it."""
    first_row: int = 0
    """Where this mask begins in the one that ``seed`` names: a batch drawn as a whole can be cut into parts."""

    @classmethod
    def draw(cls, probability: float, device: torch.device | str, generator: torch.Generator | None = None) -> "Bernoulli":
        """Take a seed from torch's random numbers of ``device``, or from ``generator``.

        Raises:
            ValueError: ``probability`` outside [0, 1].
        """
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], got {probability}.")
        return cls(probability, torch.randint(2**63 - 1, (), device=device, generator=generator))

    @property
    def threshold(self) -> int:
        """Bits below it give a 1; 2³² for probability 1."""
        return round(self.probability * 2**32)

    def mask(self, rows: int, classes: int) -> Tensor:
        """Return the mask (``rows``, ``classes``) as bool, the same that the kernels draw."""
        return random_bits(self.seed, rows, classes, self.first_row) < self.threshold

    def rows(self, first: int) -> "Bernoulli":
        """Return the mask from row ``first`` of this one on."""
        return self._replace(first_row=self.first_row + first)


def random_bits(seed: Tensor, rows: int, classes: int, first: int = 0) -> Tensor:
    """Return (rows, classes) int64 in [0, 2³²): word k % 4 of Philox with key ``seed`` and counter (k // 4, row, 0, 0), rows
    counted from ``first``.
    """
    row = torch.arange(first, first + rows, device=seed.device)[:, None]
    quad = torch.arange((classes + 3) // 4, device=seed.device)[None, :]
    words = philox(seed, (quad, row, torch.zeros_like(quad), torch.zeros_like(quad)))
    return torch.stack(torch.broadcast_tensors(*words), dim=2).reshape(rows, -1)[:, :classes]


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words, as int64, for four counter words and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Return high and low word of a product of two words: int64 wraps, and its 64 bits are those of the unsigned product."""
    product = a * b
    return (product >> 32) & WORD, product & WORD
