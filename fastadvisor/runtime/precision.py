"""Which device, in which precision, by which kernels."""

import torch

from fastadvisor.errors import UserError
from fastadvisor_kernels.dispatch import by_triton


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Return the mixed-precision context of ``--amp``: bfloat16 on any device, nothing when not ``enabled``.

    bfloat16 has float32's range, so no loss is scaled and nothing has to be undone after an overflow.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def pick_device(name: str) -> torch.device:
    """Return the device for ``--device``: ``auto`` is a CUDA device if there is one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    if name.startswith("cuda") and not found:
        raise UserError("No CUDA device is available to torch; use --device cpu or --device auto.")
    return torch.device(name)


def check_kernels(device: torch.device) -> None:
    """Find out, before any work is lost, whether the kernels that ``FASTADVISOR_KERNELS`` asks for can run on ``device``.

    Raises:
        UserError: they cannot, or there are none of that name.
    """
    try:
        by_triton(torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(str(error)) from None
