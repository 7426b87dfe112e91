"""Plain cross-entropy, the baseline."""

from fastadvisor.methods.base import Method


class CrossEntropy(Method):
    """Cross-entropy on the training set, with the labels as given."""
