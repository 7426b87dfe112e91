"""Which device, and in which precision."""

import torch

from fastadvisor.errors import UserError


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
