"""The advisor network Ψ (advisor paper, section 3.5). Shapes: B samples, D features, C classes."""

import torch
from torch import Tensor, nn


class Advisor(nn.Module):
    """From a sample's features f and loss ℓpre to a feature mask, an equalisation, or both.

    f (D) → Linear → ReLU and ℓpre (1) → Linear → ReLU are concatenated, and each output is a Linear of that. Outputs are
    returned before the sigmoid: the mask is W = σ(u), the equalisation s = σ(v) of the paper's equations 3 and 8. Weights have
    torch's default initialisation, so W ≈ 0.5 at the start.

    Args:
        features: D.
        classes: C.
        width: size of each of the two embeddings (100 in the paper, section 4.2).
        mask: whether there is an output u.
        equalisation: whether there is an output v.
    """

    def __init__(self, features: int, classes: int, width: int = 100, *, mask: bool, equalisation: bool) -> None:
        super().__init__()
        self.embed_features = nn.Linear(features, width)
        self.embed_loss = nn.Linear(1, width)
        self.to_mask = nn.Linear(2 * width, features) if mask else None
        self.to_equalisation = nn.Linear(2 * width, classes) if equalisation else None

    def forward(self, f_BD: Tensor, loss_B: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (u_BD, v_BC), in the dtype of the parameters; None for an output that this advisor does not have.

        Args:
            f_BD: features, detached, as in MW-Net and in the code that preceded the paper.
            loss_B: ℓpre, detached.
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
