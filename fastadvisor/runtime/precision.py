"""Choice of the device, the precision and the kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from fastadvisor.errors import UserError
from fastadvisor_kernels.dispatch import uses_triton


def amp_dtype(choice: Literal["auto", "bfloat16", "float16"], device: torch.device) -> torch.dtype:
    """Return the type that ``--amp`` computes in: bfloat16, which has float32's range, unless the GPU would emulate it.

    Raises:
        UserError: bfloat16 is asked for and the GPU lacks it.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if choice == "bfloat16" and not has_bfloat16:
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --amp-dtype float16 or auto.")
    return torch.bfloat16 if has_bfloat16 and choice != "float16" else torch.float16


def use_tf32(enabled: bool) -> None:
    """Turn TF32 on or off for float32 matrix products. Convolutions keep torch's own setting, which is TF32."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")


def memory_format(choice: str, device: torch.device, *, amp: bool) -> torch.memory_format:
    """Return the layout for ``--memory-format``: auto is NHWC under autocast on a GPU, where tensor cores, and cuDNN's batch
    normalisation, take no other without a copy.
    """
    channels_last = choice == "channels-last" or (choice == "auto" and amp and device.type == "cuda")
    return torch.channels_last if channels_last else torch.contiguous_format


@contextmanager
def tune_convolutions(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Let cuDNN measure its algorithms and use the fastest inside the block, on a GPU and unless results must be reproducible.
    It pays because a run has few shapes.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def pick_device(name: str) -> torch.device:
    """Return the device for ``--device``: ``auto`` is a CUDA device if there is one.

    Raises:
        UserError: cuda is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if found else "cpu"
    if name.startswith("cuda") and not found:
        raise UserError("No CUDA device is available to torch; use --device cpu or --device auto.")
    return torch.device(name)


def check_kernels(device: torch.device) -> None:
    """Check, before any work is done, that the kernels that ``FASTADVISOR_KERNELS`` asks for can run on ``device``.

    Raises:
        UserError: they cannot, or there are none of that name.
    """
    try:
        uses_triton(torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(str(error)) from None
