"""A Bernoulli mask that is named by a seed and never stored."""

from fastadvisor_kernels.bernoulli.reference import Bernoulli, random_bits

__all__ = ["Bernoulli", "random_bits"]
