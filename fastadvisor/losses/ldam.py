"""Label-distribution-aware margins (Cao et al. 2019): the rarer a class, the larger the margin it is separated by."""

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fastadvisor.losses.wide import at_least_float32


def ldam(cosine_BC: Tensor, labels: Tensor, counts: Tensor, largest: float = 0.5, scale: float = 30.0) -> Tensor:
    """Return the cross-entropy of s (cos − m_y e_y), (B,), in float32 or wider: the label's logit is reduced by its margin.

    Args:
        cosine_BC: (B, C) cosines between features and class weights, of any floating dtype.
        labels: (B,) int64.
        counts: n (C,), the number of training samples of each class; 0 counts as 1.
        largest: margin of the rarest class.
        scale: s, the factor of all logits.
    """
    cosine_BC = at_least_float32(cosine_BC)
    off_BC = one_hot(labels, cosine_BC.shape[1]) * margins(counts, largest).to(cosine_BC)
    return cross_entropy(scale * (cosine_BC - off_BC), labels, reduction="none")


def margins(counts: Tensor, largest: float = 0.5) -> Tensor:
    """Return the margins m_c ∝ n_c^(−1/4), (C,) float64, the largest of which is ``largest``; a count of 0 counts as 1."""
    raw = counts.double().clamp_min(1) ** -0.25
    return largest * raw / raw.max()
