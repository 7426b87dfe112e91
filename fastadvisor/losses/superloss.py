"""SuperLoss (Castells et al. 2020): losses that are larger than usual, as those of wrong labels are, count less."""

import math

import torch
from torch import Tensor

from fastadvisor.losses.wide import at_least_float32

HALLEY_STEPS = 6
"""Of 4 or more float64 is exact to 1e-14 but for a neighbourhood of −1/e, where the function has no derivative."""


def superloss(loss_B: Tensor, tau: float, lam: float = 4.0) -> Tensor:
    """Return (ℓ − τ) σ + λ (log σ)², (B,), with the confidence σ = exp(−W(½ max(−2/e, (ℓ − τ) / λ))), a constant.

    W is the Lambert function. At ℓ = τ the confidence is 1; it is e at most. (The second paper prints 2/e for −2/e: a slip.)

    Args:
        loss_B: losses ℓ (B,), such as cross-entropies.
        tau: τ, the loss that is neither easy nor hard: log C for C classes.
        lam: λ > 0; the larger, the nearer all confidences are to 1.
    """
    loss_B = at_least_float32(loss_B)
    with torch.no_grad():
        log_sigma_B = -lambert_w(0.5 * ((loss_B - tau) / lam).clamp_min(-2 / math.e))
    return (loss_B - tau) * log_sigma_B.exp() + lam * log_sigma_B**2


def lambert_w(x: Tensor) -> Tensor:
    """Return W(x), the principal branch of the inverse of w ↦ w eʷ, for x ≥ −1/e; elementwise, without a graph."""
    x = x.detach()
    root = (2 * (math.e * x + 1)).clamp_min(0).sqrt()
    w = torch.where(x < 0.5, -1 + root - root**2 / 3 + 11 / 72 * root**3, torch.log1p(x.clamp_min(0)))
    for _ in range(HALLEY_STEPS):
        power = w.exp()
        error = w * power - x
        above = w + 1
        step = error / (power * above - (w + 2) * error / (2 * above))
        w = torch.where((above > 1e-4) & step.isfinite(), w - step, w)  # at −1/e the series is exact
    return w
