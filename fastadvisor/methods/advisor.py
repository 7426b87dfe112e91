"""The advisor network Ψ (paper 3.5). Shapes: B samples, D features, C classes."""

import torch
from torch import Tensor, nn


class Advisor(nn.Module):
    """Watches a sample's features and its loss, and answers with a feature mask, an equalisation, or both.

    f (D) → Linear → ReLU and ℓpre (1) → Linear → ReLU, concatenated; one Linear for each output. Outputs are returned
    before the sigmoid (mask W = σ(u), equalisation s = σ(v)); default torch initialisation, so W ≈ 0.5 at the start.

    Args:
        features: D.
        classes: C.
        width: size of each of the two embeddings.
        mask: whether to answer with u.
        equalisation: whether to answer with v.
    """

    def __init__(self, features: int, classes: int, width: int = 100, *, mask: bool, equalisation: bool) -> None:
        super().__init__()
        self.embed_features = nn.Linear(features, width)
        self.embed_loss = nn.Linear(1, width)
        self.to_mask = nn.Linear(2 * width, features) if mask else None
        self.to_equalisation = nn.Linear(2 * width, classes) if equalisation else None

    def forward(self, f_BD: Tensor, loss_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (u_BD, v_BC), each None where this advisor does not give it; computed in the parameters' dtype.

        Both inputs are constants to the advisor: pass them detached (paper's precursor code, MW-Net).
        """
        dtype = self.embed_loss.weight.dtype
        embedding = torch.cat(
            [
                torch.relu(self.embed_features(f_BD.to(dtype))),
                torch.relu(self.embed_loss(loss_B.to(dtype)[:, None])),
            ],
            dim=1,
        )
        u_BD = None if self.to_mask is None else self.to_mask(embedding)
        v_BC = None if self.to_equalisation is None else self.to_equalisation(embedding)
        return u_BD, v_BC
