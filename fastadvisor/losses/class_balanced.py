"""Class-balanced weights (Cui et al. 2019): the inverse of the effective number of samples of each class."""

from torch import Tensor


def class_balanced_weights(counts: Tensor, b: float = 0.9999) -> Tensor:
    """Return (1 − b) / (1 − b^n_c) for each class c, scaled to sum to C: (C,) float64.

    The loss of a sample is to be multiplied by the weight of its label.

    Args:
        counts: n (C,), the number of training samples of each class; 0 counts as 1.
        b: in [0, 1). At 0 all weights are equal; towards 1 they become proportional to 1 / n_c.
    """
    effective = (1 - b ** counts.double().clamp_min(1)) / (1 - b)
    weights = 1 / effective
    return weights * (len(weights) / weights.sum())
