"""The Bernoulli variable β of MES (advisor paper, section 3.4, equation 8, and section 4.2)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastadvisor.config import Fraction
from fastadvisor_kernels import Bernoulli, Beta
from fastadvisor_kernels.dispatch import uses_triton


@dataclass
class BetaSettings:
    """The settings of β, for methods with the loss of MES."""

    beta_probability: Fraction = 0.9
    """Probability rho that beta is 1 (paper 4.2)."""
    beta_draw: Literal["class", "sample", "batch", "expected"] = "class"
    """What one draw of beta covers; expected: beta is rho itself."""


def draw_beta(settings: BetaSettings, rows: int, classes: int, device: torch.device) -> Beta:
    """Draw β ~ Bernoulli(ρ) for a batch of B samples.

    The default draws for each sample and class, as the only public implementation of the softmax equalisation loss does. With
    Triton's kernels the default draws only a seed, from which the kernels compute β, so that nothing of size (B, C) is stored.

    Args:
        settings: ρ, and what one draw covers.
        rows: B.
        classes: C.
        device: where β is needed.

    Returns:
        Zeros and ones in float32, of the shape (B, C), (B, 1) or (1, 1) for "class", "sample" or "batch"; a
        :class:`Bernoulli` with the seed; or ρ itself for "expected".
    """
    if settings.beta_draw == "expected":
        return settings.beta_probability
    if settings.beta_draw == "class" and uses_triton(torch.empty(0, device=device)):
        return Bernoulli.draw(settings.beta_probability, device)
    shape = {"class": (rows, classes), "sample": (rows, 1), "batch": (1, 1)}[settings.beta_draw]
    return (torch.rand(shape, device=device) < settings.beta_probability).float()


def select_rows(beta: Beta, rows: slice) -> Beta:
    """Return the part of ``beta``, drawn for a batch, that belongs to its samples ``rows``."""
    if isinstance(beta, Bernoulli):
        return beta.rows(rows.start)
    return beta[rows] if isinstance(beta, Tensor) and len(beta) > 1 else beta
