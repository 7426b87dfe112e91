"""SuperLoss (Castells et al. 2020): losses that are larger than usual, such as those of wrong labels, count less."""

import math

import torch
from torch import Tensor

from fastadvisor.losses.wide import at_least_float32

HALLEY_STEPS = 6
"""Number of Halley's iterations. From 4 on W is exact to 1e-14 in float64, except near −1/e, where it has no derivative."""


def superloss(loss_B: Tensor, tau: float, lam: float = 4.0) -> Tensor:
    """Return (ℓ − τ) σ + λ (log σ)², (B,), in float32 or wider, with the confidence σ = exp(−W(½ max(−2/e, (ℓ − τ) / λ))).

    W is the Lambert function. The confidence is treated as a constant; it is 1 at ℓ = τ, and at most e. (The long-tail paper
    prints 2/e instead of −2/e, which is a misprint.)

    Args:
        loss_B: ℓ (B,), the losses of the samples, such as cross-entropies.
        tau: τ, the loss of a sample that is neither easy nor hard, such as log C for C classes.
        lam: λ > 0; the larger λ, the closer all confidences are to 1.
    """
    loss_B = at_least_float32(loss_B)
    with torch.no_grad():
        log_sigma_B = -lambert_w(0.5 * ((loss_B - tau) / lam).clamp_min(-2 / math.e))
    return (loss_B - tau) * log_sigma_B.exp() + lam * log_sigma_B**2


def lambert_w(x: Tensor) -> Tensor:
    """Return W(x), the principal branch of the inverse of w ↦ w eʷ, for each element x ≥ −1/e; detached."""
    x = x.detach()
    root = (2 * (math.e * x + 1)).clamp_min(0).sqrt()
    w = torch.where(x < 0.5, -1 + root - root**2 / 3 + 11 / 72 * root**3, torch.log1p(x.clamp_min(0)))
    for _ in range(HALLEY_STEPS):
        power = w.exp()
        error = w * power - x
        above = w + 1
        step = error / (power * above - (w + 2) * error / (2 * above))
        w = torch.where((above > 1e-4) & step.isfinite(), w - step, w)  # at −1/e itself the initial series is exact
    return w
