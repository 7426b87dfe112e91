"""The Bernoulli variable β of MES (paper 3.4 and 4.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastadvisor.config import Fraction
from fastadvisor_kernels import Bernoulli, Beta
from fastadvisor_kernels.dispatch import uses_triton


@dataclass
class BetaSettings:
    """What methods with MES's loss can be told about β."""

    beta_probability: Fraction = 0.9
    """Probability rho that beta is 1 (paper 4.2)."""
    beta_draw: Literal["class", "sample", "batch", "expected"] = "class"
    """What one draw of beta covers; expected: beta is rho itself."""


def draw_beta(settings: BetaSettings, rows: int, classes: int, device: torch.device) -> Beta:
    """Draw β ~ Bernoulli(ρ) for a batch: (B, C), (B, 1) or (1, 1) of {0, 1} by ``beta_draw``; ρ itself for 'expected'.

    The default draws per sample and class, as the only public softmax-EQL implementation does. Where Triton computes, it
    draws a seed: the kernels make the mask of it where they need it, and nothing of size (B, C) is stored.
    """
    if settings.beta_draw == "expected":
        return settings.beta_probability
    if settings.beta_draw == "class" and uses_triton(torch.empty(0, device=device)):
        return Bernoulli.draw(settings.beta_probability, device)
    shape = {"class": (rows, classes), "sample": (rows, 1), "batch": (1, 1)}[settings.beta_draw]
    return (torch.rand(shape, device=device) < settings.beta_probability).float()


def rows_of(beta: Beta, rows: slice) -> Beta:
    """Return what was drawn for these samples of a batch."""
    if isinstance(beta, Bernoulli):
        return beta.rows(rows.start)
    return beta[rows] if isinstance(beta, Tensor) and len(beta) > 1 else beta
