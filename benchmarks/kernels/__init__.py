"""The kernels against plain torch, the compiler, and what others have: ``python -m benchmarks.kernels``."""
