"""Choice of the backend: Triton for tensors on a GPU, plain torch elsewhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "reference", "triton"]
BACKENDS = ("auto", "reference", "triton")
TRITON_INSTALLED = find_spec("triton") is not None

_chosen: str = os.environ.get("FASTADVISOR_KERNELS", "auto")


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Have the operations inside the block computed by ``name``, whatever the environment's ``FASTADVISOR_KERNELS`` says.

    Args:
        name: ``auto``: by Triton on a GPU, by plain torch elsewhere; ``reference``: by plain torch; ``triton``: by Triton,
            also on the CPU where ``TRITON_INTERPRET=1`` was set before Triton was imported.

    Raises:
        ValueError: another name.
    """
    global _chosen
    before, _chosen = _chosen, _known(name)
    try:
        yield
    finally:
        _chosen = before


def uses_triton(tensor: Tensor) -> bool:
    """Return whether Triton computes on ``tensor``.

    Chosen by device: a Triton wheel imports without a driver and fails only at launch.

    Raises:
        ValueError: ``FASTADVISOR_KERNELS`` is none of the backends, or asks for Triton where it cannot run.
    """
    name = _known(_chosen)
    if name == "auto":
        return tensor.is_cuda and TRITON_INSTALLED
    if name == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "FASTADVISOR_KERNELS=triton needs tensors on a GPU (or TRITON_INTERPRET=1, set before Python starts); "
            "use auto or reference."
        )
    return name == "triton"


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """Raise unless all tensors are free of forward-mode tangents: a kernel would drop them without a word.

    Raises:
        NotImplementedError: one is a dual number.
    """
    if forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(explain_forward_mode(operation))


def explain_forward_mode(operation: str) -> str:
    """Return the sentence for someone who asks ``operation`` for a forward-mode derivative."""
    return (
        f"{operation} has no forward-mode derivative, and would lose the tangent: take fastadvisor_kernels.tangent_loss for "
        f'the loss\'s derivative along a direction, or compute out of place inside fastadvisor_kernels.backend("reference").'
    )


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"FASTADVISOR_KERNELS and backend() take one of {', '.join(BACKENDS)}; got {name!r}.")
    return name
