"""Class-balanced weights (Cui et al. 2019): one over the effective number of samples of a class."""

from torch import Tensor


def class_balanced_weights(counts: Tensor, b: float = 0.9999) -> Tensor:
    """Return (1 − b) / (1 − b^n_c) for each class, scaled to sum to C: (C,) float64. A loss is multiplied by its label's.

    Args:
        counts: (C,) samples of each class, n_c; a class without any counts as one with one.
        b: in [0, 1); 0 weighs all classes alike, towards 1 the weights become 1 / n_c.
    """
    effective = (1 - b ** counts.double().clamp_min(1)) / (1 - b)
    weights = 1 / effective
    return weights * (len(weights) / weights.sum())
