"""Label-distribution-aware margins (Cao et al. 2019): rare classes are to be separated by more."""

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fastadvisor.losses.wide import at_least_float32


def ldam(cosine_BC: Tensor, labels: Tensor, counts: Tensor, largest: float = 0.5, scale: float = 30.0) -> Tensor:
    """Return the cross-entropy of s (cos − m_y e_y), (B,): the label's margin is taken off its own logit.

    Args:
        cosine_BC: (B, C) cosines between features and class weights.
        labels: (B,) int64.
        counts: (C,) training samples of each class.
        largest: margin of the rarest class.
        scale: s.
    """
    cosine_BC = at_least_float32(cosine_BC)
    off_BC = one_hot(labels, cosine_BC.shape[1]) * margins(counts, largest).to(cosine_BC)
    return cross_entropy(scale * (cosine_BC - off_BC), labels, reduction="none")


def margins(counts: Tensor, largest: float = 0.5) -> Tensor:
    """Return m_c ∝ n_c^(−1/4), (C,) float64, the largest of them ``largest``; no samples count as one."""
    raw = counts.double().clamp_min(1) ** -0.25
    return largest * raw / raw.max()
