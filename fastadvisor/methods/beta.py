"""The Bernoulli variable β of MES (paper 3.4 and 4.2)."""

import torch
from torch import Tensor

from fastadvisor.config import MethodConfig
from fastadvisor_kernels import Bernoulli, Beta
from fastadvisor_kernels.dispatch import by_triton


def draw_beta(config: MethodConfig, rows: int, classes: int, device: torch.device) -> Beta:
    """Draw β ~ Bernoulli(ρ) for a batch: (B, C), (B, 1) or (1, 1) of {0, 1} by ``beta_draw``; ρ itself for 'expected'.

    The default draws per sample and class, as the only public softmax-EQL implementation does. Where Triton computes, it
    draws a seed: the kernels make the mask of it where they need it, and nothing of size (B, C) is stored.
    """
    if config.beta_draw == "expected":
        return config.beta_probability
    if config.beta_draw == "class" and by_triton(torch.empty(0, device=device)):
        return Bernoulli.draw(config.beta_probability, device)
    shape = {"class": (rows, classes), "sample": (rows, 1), "batch": (1, 1)}[config.beta_draw]
    return (torch.rand(shape, device=device) < config.beta_probability).float()


def rows_of(beta: Beta, rows: slice) -> Beta:
    """Return what was drawn for these samples of a batch."""
    if isinstance(beta, Bernoulli):
        return beta.rows(rows.start)
    return beta[rows] if isinstance(beta, Tensor) and len(beta) > 1 else beta
